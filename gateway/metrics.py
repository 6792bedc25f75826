"""Owns what this process counts for Prometheus: where requests' time went and what became of them.

Each gateway counts its own requests, so counters and histograms of several gateways are added up. What a gateway sees
at the moment of a scrape is in `gateway.gauges`. Labels have few values, known beforehand: no session, user or request.
Those are there from the start with the value 0, because Prometheus does not see a series grow that begins at 1.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields

from prometheus_client import REGISTRY, Counter, Histogram, Metric, Summary

from engine.protocol import Phase
from gateway.lifecycle import FaultKind
from gateway.membership import Loss
from gateway.routing.joint import split_gain_s
from gateway.routing.receipts import Receipt, Times
from gateway.routing.types import Cause, Priority, Rejection

YES_NO = ("no", "yes")
STATUSES = ("finished", "failed", "aborted")
REFUSED = "refused"
MISSING = (Cause.NO_DECODE, Cause.GATEWAY_FULL)
"""The causes that are answered 503."""

NO_TENANT = "none"
"""Whose requests are counted as where keys are not asked for."""

TPOT_BUCKETS_S = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

STAGE = Histogram(
    "baton_stage_seconds",
    "Time of a request in one stage, named as in its receipt (times_ms)",
    ["stage"],
    buckets=BUCKETS_S,
)
TTFT = Histogram(
    "baton_ttft_seconds", "From the HTTP request's arrival to its first token", ["split"], buckets=BUCKETS_S
)
TPOT = Histogram(
    "baton_tpot_seconds",
    "Time of an answer's token after its first, the mean of one answer",
    ["split"],
    buckets=TPOT_BUCKETS_S,
)
DURATION = Histogram("baton_request_seconds", "From the HTTP request's arrival to its last token", buckets=BUCKETS_S)
DEADLINES = Counter(
    "baton_ttft_deadlines",
    "Prompts that were taken, by whether their first token came within their deadline, and the priority they asked for",
    ["met", "priority"],
)
QUEUE_WAIT = Histogram(
    "baton_queue_wait_seconds",
    "How long a prompt waited in the engine that read it, by the priority it asked for",
    ["priority"],
    buckets=BUCKETS_S,
)
REQUESTS = Counter("baton_requests", "Prompts by what became of them", ["status", "split"])
REJECTIONS = Counter(
    "baton_rejections",
    "Prompts that were not taken, by what the client was told, why, and the priority it asked for",
    ["status", "cause", "priority"],
)
TENANT_REFUSALS = Counter(
    "baton_tenant_refusals", "What a tenant's own limits have refused; among baton_rejections too", ["tenant", "cause"]
)
TENANT_REQUESTS = Counter(
    "baton_tenant_requests",
    "A tenant's prompts by what became of them, those that were refused too",
    ["tenant", "status"],
)
TENANT_WAIT = Summary(
    "baton_tenant_queue_wait_seconds", "How long a tenant's prompts waited in the engines that read them", ["tenant"]
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
SPANS_DROPPED = Counter(
    "baton_trace_spans_dropped",
    "Spans that no collector has got, because too many waited (full) or it did not take them (refused)",
    ["cause"],
)
PROMPT_TOKENS = Counter("baton_prompt_tokens", "Prompt tokens by where they came from", ["source"])
OUTPUT_TOKENS = Counter("baton_output_tokens", "Tokens of answers")
HANDOFF = Histogram(
    "baton_handoff_seconds",
    "From a decode engine's taking a prompt that another has read until it has its KV cache and begins",
    buckets=BUCKETS_S,
)
SPLIT_SECONDS = Counter(
    "baton_split_predicted_seconds",
    "Seconds of everyone's time that splitting prompts was predicted to cost less, or more, than decode reading them",
    ["costs"],
)
KV_BYTES = Counter("baton_kv_moved_bytes", "Bytes of KV cache that decode engines fetched from prefill engines")
KV_ASKED_BYTES = Counter("baton_kv_asked_bytes", "Bytes of KV cache that prefill engines fetched from decode engines")


def _begin() -> None:
    bounded: Iterable[tuple[Counter | Histogram, Iterable[tuple[str, ...]]]] = (
        (STAGE, ((stage.name,) for stage in fields(Times))),
        (TTFT, ((split,) for split in YES_NO)),
        (TPOT, ((split,) for split in YES_NO)),
        (DEADLINES, itertools.product(YES_NO, Priority)),
        (QUEUE_WAIT, ((priority,) for priority in Priority)),
        (REQUESTS, itertools.product(STATUSES, YES_NO)),
        (REJECTIONS, (("503" if c in MISSING else "429", c, p) for c in Cause for p in Priority)),
        (PREDICTION_ERROR, ((what,) for what in ("ttft", "tpot", "cached_tokens"))),
        (FAULTS, ((kind,) for kind in FaultKind)),
        (REPLICAS_LOST, itertools.product(Phase, Loss)),
        (PROMPT_TOKENS, (("cache",), ("computed",))),
        (SPLIT_SECONDS, (("less",), ("more",))),
    )
    for metric, values in bounded:
        for labels in values:
            metric.labels(*labels)


_begin()


def expect_tenants(names: Collection[str]) -> None:
    """From now on these tenants' series are there; without any, those of requests that are nobody's."""
    for tenant in names or (NO_TENANT,):
        TENANT_WAIT.labels(tenant)
        for status in (*STATUSES, REFUSED):
            TENANT_REQUESTS.labels(tenant, status)
    for tenant, cause in itertools.product(names or (NO_TENANT,), (Cause.TENANT_CONCURRENCY, Cause.TENANT_RATE)):
        TENANT_REFUSALS.labels(tenant, cause)


def count(receipt: Receipt) -> None:
    """Counts a closed receipt."""
    outcome = receipt.outcome
    split = YES_NO[receipt.placement.prefill is not None]
    tenant = receipt.request.hints.tenant or NO_TENANT
    REQUESTS.labels(outcome.status, split).inc()
    TENANT_REQUESTS.labels(tenant, outcome.status).inc()
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
    if (met := _deadline_met(receipt)) is not None:
        DEADLINES.labels(YES_NO[met], receipt.request.hints.priority).inc()
    if (gain_s := split_gain_s(receipt.request, receipt.placement, receipt.snapshot)) is not None:
        SPLIT_SECONDS.labels("less" if gain_s >= 0 else "more").inc(abs(gain_s))
    times_ms = outcome.times_ms
    wait_ms = times_ms.decode_wait if times_ms.prefill_wait is None else times_ms.prefill_wait
    if wait_ms is not None:
        QUEUE_WAIT.labels(receipt.request.hints.priority).observe(wait_ms / 1000)
        TENANT_WAIT.labels(tenant).observe(wait_ms / 1000)
    if outcome.kv_blocks_moved and times_ms.decode_wait is not None:
        HANDOFF.observe(times_ms.decode_wait / 1000)
    OUTPUT_TOKENS.inc(outcome.output_tokens)
    PROMPT_TOKENS.labels("cache").inc(outcome.reused_tokens)
    PROMPT_TOKENS.labels("computed").inc(max(outcome.prompt_tokens - outcome.reused_tokens, 0))
    KV_BYTES.inc(outcome.kv_bytes_moved)
    KV_ASKED_BYTES.inc(outcome.kv_bytes_asked)
    if outcome.ttft_ms is not None:
        TTFT.labels(split).observe(outcome.ttft_ms / 1000)
    if (tpot_s := receipt.tpot_s) is not None:
        TPOT.labels(split).observe(tpot_s)
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
    if tpot_s := receipt.tpot_s:
        yield "tpot", predicted.tpot_s, tpot_s
    if predicted.cached_tokens or outcome.reused_tokens:
        yield "cached_tokens", predicted.cached_tokens, max(outcome.reused_tokens, 1)


def _deadline_met(receipt: Receipt) -> bool | None:
    """None where nobody can tell: the client left before its first token was late."""
    outcome, config = receipt.outcome, receipt.admission_config
    deadline_s = receipt.request.hints.ttft_deadline_s or (config.ttft_deadline_s if config else None)
    if deadline_s is None:
        return None
    if outcome.ttft_ms is not None:
        return outcome.ttft_ms <= deadline_s * 1000
    if outcome.status == "aborted" and (outcome.duration_ms or 0.0) <= deadline_s * 1000:
        return None
    return False


def count_rejection(rejection: Rejection, priority: Priority, tenant: str | None = None) -> None:
    """Counts a prompt that has no receipt: nothing was placed. `tenant`: whose it was, if that is known."""
    REJECTIONS.labels(str(rejection.status), rejection.cause, priority).inc()
    TENANT_REQUESTS.labels(tenant or NO_TENANT, REFUSED).inc()
    if tenant is not None and rejection.cause in (Cause.TENANT_CONCURRENCY, Cause.TENANT_RATE):
        TENANT_REFUSALS.labels(tenant, rejection.cause).inc()


def count_loss(phase: Phase, cause: str) -> None:
    REPLICAS_LOST.labels(phase, cause).inc()


def count_policy_switch(policy: str, shadow_policy: str | None) -> None:
    POLICY_SWITCHES.labels(policy, shadow_policy or "none").inc()


def count_dropped_spans(cause: str, num_spans: int) -> None:
    SPANS_DROPPED.labels(cause).inc(num_spans)


def count_gateways_gone(before: Collection[str], now: Collection[str]) -> None:
    """`before` and `now`: the ids of all gateways at two scrapes."""
    GATEWAYS_GONE.inc(len(set(before) - set(now)))


def collect() -> list[Metric]:
    """Everything that this process has counted, what vLLM counts included."""
    return list(REGISTRY.collect())
