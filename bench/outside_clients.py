"""Owns the load generators that `bench clients` compares: how each is told the workload, and what its export says.

Pure. All are asked for the same: a closed loop of streamed /v1/completions, prompts and answers of one length, every
prompt new, answers that do not end early, a warm-up that is not in the figures.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean

import msgspec

from bench.packages import Package

OURS = "bench load"
AIPERF = Package("aiperf", "0.13.0")
GUIDELLM = Package("guidellm", "0.8.1", before=("torch==2.13.0",))
PACKAGES = {package.name: package for package in (AIPERF, GUIDELLM)}

PROMPTS_PER_S_AND_REQUEST = 10
"""AIPerf makes its prompts before it sends any, and begins again with the first when it has none left: enough of them,
for each second and each request in flight."""
AIPERF_RATE_PER_S = "500"
"""How often AIPerf looks for a free place among its requests in flight. Without a rate it looks all the time, and
one of its processes keeps a whole core busy."""


@dataclass(frozen=True)
class Workload:
    """So many requests in flight, each answer followed by the next request at once: `warm_up_s`, and then `measured_s`
    that count. Lengths are in tokens."""

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    warm_up_s: float
    measured_s: float


@dataclass(frozen=True)
class Ask:
    """One run of a client. `tokenizer` is a folder; another `seed` gives other prompts; `folder` takes the export."""

    workload: Workload
    url: str
    model: str
    tokenizer: Path
    seed: int
    folder: Path


@dataclass(frozen=True)
class Export:
    """What a client says of its run. `itl_p50_ms` is over requests: of each, the mean time between its tokens.
    Lengths are means by the server's own count. `window` is when the figures begin and end, in seconds since the epoch,
    where the client tells it; else `cores` is how many it kept busy."""

    num_requests: int
    num_failed: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    tokens_per_s: float
    prompt_tokens: float
    output_tokens: float
    cached_share: float | None
    window: tuple[float, float] | None = None
    cores: float | None = None


class ExportError(ValueError):
    """An export that does not hold what it should; the message says what is missing."""


@dataclass(frozen=True)
class Client:
    """`command` gives the arguments of its program; `export` is what it then leaves in the folder, for `read`.
    `environment` is set for it, or removed where a value is None."""

    name: str
    command: Callable[[Ask], list[str]]
    export: str
    read: Callable[[bytes], Export]
    environment: Mapping[str, str | None]


# -- ours


def _our_command(ask: Ask) -> list[str]:
    load = ask.workload
    return [
        *("load", f"fixed:{load.prompt_tokens}/{load.output_tokens}"),
        *("--url", ask.url, "--model", ask.model, "--concurrency", str(load.concurrency)),
        *("--warm-up-s", f"{load.warm_up_s:g}", "--duration-s", f"{load.warm_up_s + load.measured_s:g}"),
        # As the others: text, which the server has to read into tokens first.
        *("--text", "--tokenizer", str(ask.tokenizer)),
        *("--seed", str(ask.seed), "--no-first-in-line", "--json", str(ask.folder / _OUR_EXPORT)),
    ]


_OUR_EXPORT = "load.json"


class _P50P99(msgspec.Struct, frozen=True):
    p50: float
    p99: float


class _OurFigures(msgspec.Struct, frozen=True):
    num_answered: int
    num_refused: int
    num_failed: int
    tokens_per_s: float
    cached_share: float | None
    ttft_ms: _P50P99
    tpot_ms: _P50P99


class _OurUse(msgspec.Struct, frozen=True):
    ran_s: float
    generator_cpu_s: float


class _OurTurn(msgspec.Struct, frozen=True):
    prompt_tokens: int
    output_tokens: int


class _OurReport(msgspec.Struct, frozen=True):
    figures: _OurFigures
    use: _OurUse
    turns: list[_OurTurn]


def _read_ours(data: bytes) -> Export:
    report = msgspec.json.decode(data, type=_OurReport)
    figures = report.figures
    answered = [turn for turn in report.turns if turn.output_tokens]
    return Export(
        num_requests=figures.num_answered,
        num_failed=figures.num_refused + figures.num_failed,
        ttft_p50_ms=figures.ttft_ms.p50,
        ttft_p99_ms=figures.ttft_ms.p99,
        itl_p50_ms=figures.tpot_ms.p50,
        tokens_per_s=figures.tokens_per_s,
        prompt_tokens=mean(turn.prompt_tokens for turn in answered),
        output_tokens=mean(turn.output_tokens for turn in answered),
        cached_share=figures.cached_share,
        cores=report.use.generator_cpu_s / report.use.ran_s,
    )


# -- AIPerf


def _aiperf_command(ask: Ask) -> list[str]:
    load = ask.workload
    num_prompts = load.concurrency * (load.warm_up_s + load.measured_s) * PROMPTS_PER_S_AND_REQUEST
    return [
        *("profile", "--url", ask.url, "--model", ask.model, "--tokenizer", str(ask.tokenizer)),
        *("--endpoint-type", "completions", "--streaming", "--use-server-token-count"),
        *("--isl", str(load.prompt_tokens), "--osl", str(load.output_tokens), "--extra-inputs", "ignore_eos:true"),
        *("--num-dataset-entries", f"{num_prompts:.0f}", "--random-seed", str(ask.seed)),
        *("--concurrency", str(load.concurrency), "--request-rate", AIPERF_RATE_PER_S, "--arrival-pattern", "constant"),
        *("--warmup-duration", f"{load.warm_up_s:g}"),
        *("--benchmark-duration", f"{load.measured_s:g}"),
        *("--output-artifact-dir", str(ask.folder)),
        *("--no-server-metrics", "--no-gpu-telemetry", "--ui", "none"),
    ]


_AIPERF_ENVIRONMENT = {"PYTHONPATH": None, "HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
"""Told to be offline, it takes no tokenizer but from the hub's cache; of a folder it asks nobody."""
_AIPERF_EXPORT = "profile_export_aiperf.json"


class _Metric(msgspec.Struct, frozen=True):
    avg: float
    p50: float | None = None
    p99: float | None = None
    sum: float | None = None


class _AiperfReport(msgspec.Struct, frozen=True):
    start_time: datetime
    end_time: datetime
    request_count: _Metric
    time_to_first_token: _Metric
    inter_token_latency: _Metric
    output_token_throughput: _Metric
    usage_prompt_tokens: _Metric
    usage_completion_tokens: _Metric
    usage_prompt_cache_read_tokens: _Metric | None = None
    error_request_count: _Metric | None = None


def _read_aiperf(data: bytes) -> Export:
    report = msgspec.json.decode(data, type=_AiperfReport)
    ttft, prompts, cached = (
        report.time_to_first_token,
        report.usage_prompt_tokens,
        report.usage_prompt_cache_read_tokens,
    )
    return Export(
        num_requests=round(report.request_count.avg),
        num_failed=round(report.error_request_count.avg) if report.error_request_count else 0,
        ttft_p50_ms=_given(ttft.p50),
        ttft_p99_ms=_given(ttft.p99),
        itl_p50_ms=_given(report.inter_token_latency.p50),
        tokens_per_s=report.output_token_throughput.avg,
        prompt_tokens=prompts.avg,
        output_tokens=report.usage_completion_tokens.avg,
        cached_share=None if cached is None else cached.avg / prompts.avg,
        window=(report.start_time.timestamp(), report.end_time.timestamp()),
    )


def _given(figure: float | None) -> float:
    if figure is None:
        raise msgspec.ValidationError("a percentile is missing")
    return figure


# -- GuideLLM


def _guidellm_command(ask: Ask) -> list[str]:
    load = ask.workload
    return [
        *("run", "--backend", f"kind=openai_http,target={ask.url},model={ask.model},request_format=/v1/completions"),
        *("--tokenizer", f"kind=huggingface_auto,model={ask.tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},output_tokens={load.output_tokens}"),
        *("--seed", f"kind=static,value={ask.seed}"),
        *("--profile", f"kind=concurrent,streams={load.concurrency},warmup={load.warm_up_s:g}"),
        *("--constraint", f"kind=max_duration,seconds={load.warm_up_s + load.measured_s:g}"),
        *("--metrics", "kind=generative,sample_size=0"),
        *("--output", f"kind=json,path={ask.folder / _GUIDELLM_EXPORT}", "--disable-progress"),
    ]


_GUIDELLM_ENVIRONMENT = {
    "PYTHONPATH": None,
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "GUIDELLM__MAX_WORKER_PROCESSES": "1",
}
"""It starts a process for each request in flight unless it is told otherwise."""
_GUIDELLM_EXPORT = "guidellm.json"


class _Distribution(msgspec.Struct, frozen=True):
    mean: float
    percentiles: _P50P99


class _Distributions(msgspec.Struct, frozen=True):
    """`total` also holds the requests that were under way when the time was over."""

    successful: _Distribution
    total: _Distribution


class _Counts(msgspec.Struct, frozen=True):
    successful: int
    errored: int


class _GuidellmMetrics(msgspec.Struct, frozen=True):
    request_totals: _Counts
    time_to_first_token_ms: _Distributions
    inter_token_latency_ms: _Distributions
    output_tokens_per_second: _Distributions
    prompt_token_count: _Distributions
    output_token_count: _Distributions


class _GuidellmScheduler(msgspec.Struct, frozen=True):
    measure_start_time: float
    measure_end_time: float


class _GuidellmRequest(msgspec.Struct, frozen=True):
    prompt_tokens: int | None
    cached_tokens: int | None = None


class _GuidellmRequests(msgspec.Struct, frozen=True):
    successful: list[_GuidellmRequest]


class _GuidellmBenchmark(msgspec.Struct, frozen=True):
    metrics: _GuidellmMetrics
    scheduler_metrics: _GuidellmScheduler
    requests: _GuidellmRequests


class _GuidellmReport(msgspec.Struct, frozen=True):
    benchmarks: tuple[_GuidellmBenchmark]


def _read_guidellm(data: bytes) -> Export:
    (benchmark,) = msgspec.json.decode(data, type=_GuidellmReport).benchmarks
    metrics, when = benchmark.metrics, benchmark.scheduler_metrics
    told = [one for one in benchmark.requests.successful if one.cached_tokens is not None]
    num_prompt_tokens = sum(one.prompt_tokens or 0 for one in told)
    ttft_ms = metrics.time_to_first_token_ms.successful.percentiles
    return Export(
        num_requests=metrics.request_totals.successful,
        num_failed=metrics.request_totals.errored,
        ttft_p50_ms=ttft_ms.p50,
        ttft_p99_ms=ttft_ms.p99,
        itl_p50_ms=metrics.inter_token_latency_ms.successful.percentiles.p50,
        tokens_per_s=metrics.output_tokens_per_second.total.mean,
        prompt_tokens=metrics.prompt_token_count.successful.mean,
        output_tokens=metrics.output_token_count.successful.mean,
        cached_share=sum(one.cached_tokens or 0 for one in told) / num_prompt_tokens if num_prompt_tokens else None,
        window=(when.measure_start_time, when.measure_end_time),
    )


# -- all

CLIENTS = {
    client.name: client
    for client in (
        Client(OURS, _our_command, _OUR_EXPORT, _read_ours, {}),
        Client(AIPERF.name, _aiperf_command, _AIPERF_EXPORT, _read_aiperf, _AIPERF_ENVIRONMENT),
        Client(GUIDELLM.name, _guidellm_command, _GUIDELLM_EXPORT, _read_guidellm, _GUIDELLM_ENVIRONMENT),
    )
}


def read_export(client: Client, data: bytes) -> Export:
    """Raises ExportError."""
    try:
        return client.read(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise ExportError(f"the export of {client.name} is not as expected: {error}") from error
