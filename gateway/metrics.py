"""Owns Baton's Prometheus metrics of this process: where requests' time went and what became of them."""

from collections.abc import Collection, Iterator
from dataclasses import fields

from prometheus_client import REGISTRY, Counter, Histogram, Metric

from engine.protocol import Phase
from gateway.routing.receipts import Receipt, Times
from gateway.routing.types import Cause, Priority, Rejection

YES_NO = ("no", "yes")
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

STAGE = Histogram(
    "baton_stage_seconds",
    "Time of a request in one stage, named as in its receipt (times_ms)",
    ["stage"],
    buckets=BUCKETS_S,
)
TTFT = Histogram("baton_ttft_seconds", "From the HTTP request's arrival to its first token", buckets=BUCKETS_S)
DURATION = Histogram("baton_request_seconds", "From the HTTP request's arrival to its last token", buckets=BUCKETS_S)
REQUESTS = Counter("baton_requests", "Prompts by what became of them", ["status", "split"])
REJECTIONS = Counter(
    "baton_rejections",
    "Prompts that were not taken, by what the client was told, why, and the priority it asked for",
    ["status", "cause", "priority"],
)
TENANT_REFUSALS = Counter(
    "baton_tenant_refusals", "What a tenant's own limits have refused; among baton_rejections too", ["tenant", "cause"]
)
UNAUTHENTICATED = Counter("baton_unauthenticated", "HTTP requests without a key that a tenant has")
DEGRADED = Counter(
    "baton_degraded_placements", "Prompts that decode read itself because the prefill pool had no replica"
)
PREDICTED_TTFT = Histogram(
    "baton_predicted_ttft_seconds", "The time to the first token that a prompt was taken with", buckets=BUCKETS_S
)
PREDICTION_ERROR = Histogram(
    "baton_prediction_error_ratio",
    "How far predictions of a placement were off, as a share of what happened",
    ["what"],
    buckets=(0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)
FAULTS = Counter("baton_faults", "Faults met by requests, whether the client noticed or not", ["kind"])
REPLICAS_LOST = Counter("baton_replicas_lost", "Replicas that this gateway heard and lost, by how", ["phase", "cause"])
GATEWAYS_GONE = Counter("baton_gateways_gone", "Other gateways that were there at one scrape and not at the next")
SHADOW = Counter(
    "baton_shadow_decisions",
    "What the shadow policy decided, and whether it chose the same replicas as the live one",
    ["policy", "same_prefill", "same_decode"],
)
POLICY_SWITCHES = Counter(
    "baton_policy_switches",
    "Changes of what decides in this gateway, by what decides since; what it started with is none",
    ["policy", "shadow_policy"],
)
PROPOSALS = Counter("baton_proposals", "What the planner would have done; nobody does it", ["action"])
PROPOSALS_SCORED = Counter(
    "baton_proposals_scored", "What the planner would have done, by what happened without it", ["action", "verdict"]
)
RECEIPTS_DROPPED = Counter("baton_receipts_dropped", "Receipts that came faster than the disk takes them")
PROMPT_TOKENS = Counter("baton_prompt_tokens", "Prompt tokens by where they came from", ["source"])
KV_BYTES = Counter("baton_kv_moved_bytes", "Bytes of KV cache that decode engines fetched from prefill engines")
KV_ASKED_BYTES = Counter("baton_kv_asked_bytes", "Bytes of KV cache that prefill engines fetched from decode engines")


def count(receipt: Receipt) -> None:
    """Counts a closed receipt."""
    outcome = receipt.outcome
    REQUESTS.labels(outcome.status, YES_NO[receipt.placement.prefill is not None]).inc()
    DEGRADED.inc(receipt.placement.degraded)
    if receipt.admission is not None:
        PREDICTED_TTFT.observe(receipt.admission.predicted_ttft_s)
    for what, predicted, happened in _predictions(receipt):
        PREDICTION_ERROR.labels(what).observe(abs(predicted - happened) / happened)
    for kind in outcome.fault_kinds:
        FAULTS.labels(kind).inc()
    if (shadow := receipt.shadow) is not None:
        same_prefill, same_decode = (
            shadow.prefill == receipt.placement.prefill,
            shadow.decode == receipt.placement.decode,
        )
        SHADOW.labels(shadow.policy, YES_NO[same_prefill], YES_NO[same_decode]).inc()
    PROMPT_TOKENS.labels("cache").inc(outcome.reused_tokens)
    PROMPT_TOKENS.labels("computed").inc(max(outcome.prompt_tokens - outcome.reused_tokens, 0))
    KV_BYTES.inc(outcome.kv_bytes_moved)
    KV_ASKED_BYTES.inc(outcome.kv_bytes_asked)
    if outcome.ttft_ms is not None:
        TTFT.observe(outcome.ttft_ms / 1000)
    if outcome.duration_ms is not None:
        DURATION.observe(outcome.duration_ms / 1000)
    for stage in fields(Times):
        if (time_ms := getattr(outcome.times_ms, stage.name)) is not None:
            STAGE.labels(stage.name).observe(time_ms / 1000)


def _predictions(receipt: Receipt) -> Iterator[tuple[str, float, float]]:
    """What was predicted and what happened, where both are known."""
    predicted, outcome = receipt.predicted, receipt.outcome
    if predicted is None or outcome.status != "finished" or outcome.fault_kinds:
        return
    if outcome.ttft_ms:
        yield "ttft", receipt.request.waited_s + predicted.ttft_s, outcome.ttft_ms / 1000
    if outcome.times_ms.decode and outcome.output_tokens > receipt.request.num_choices:
        num_steps = outcome.output_tokens / receipt.request.num_choices - 1
        yield "tpot", predicted.tpot_s, outcome.times_ms.decode / 1000 / num_steps
    if predicted.cached_tokens or outcome.reused_tokens:
        yield "cached_tokens", predicted.cached_tokens, max(outcome.reused_tokens, 1)


def count_rejection(rejection: Rejection, priority: Priority, tenant: str | None = None) -> None:
    """Counts a prompt that has no receipt: nothing was placed. `tenant`: whose it was, if that is known."""
    REJECTIONS.labels(str(rejection.status), rejection.cause, priority).inc()
    if tenant is not None and rejection.cause in (Cause.TENANT_CONCURRENCY, Cause.TENANT_RATE):
        TENANT_REFUSALS.labels(tenant, rejection.cause).inc()


def count_loss(phase: Phase, cause: str) -> None:
    REPLICAS_LOST.labels(phase, cause).inc()


def count_policy_switch(policy: str, shadow_policy: str | None) -> None:
    POLICY_SWITCHES.labels(policy, shadow_policy or "none").inc()


def count_gateways_gone(before: Collection[str], now: Collection[str]) -> None:
    """`before` and `now`: the ids of all gateways at two scrapes."""
    GATEWAYS_GONE.inc(len(set(before) - set(now)))


def collect() -> list[Metric]:
    """Everything this process counts, vLLM's metrics included."""
    return list(REGISTRY.collect())
