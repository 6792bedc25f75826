"""Owns what `bench load` is asked for, and the limits that goodput is counted by. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from bench.results import EngineKind


@dataclass(frozen=True)
class Slo:
    """What a request must keep: its first token within `ttft_ms`, and then `tpot_ms` a token on average."""

    name: str
    ttft_ms: float
    tpot_ms: float


SLO_SHARE = 0.99
"""MLPerf bounds the 99th percentile of TTFT and that of TPOT."""
SLOS: Mapping[str, Slo] = {
    slo.name: slo
    for slo in (
        Slo("mlperf-llama2-70b-server", 2_000, 200),
        Slo("mlperf-llama2-70b-interactive", 450, 40),
        Slo("mlperf-llama3.1-8b-server", 2_000, 100),
        Slo("mlperf-llama3.1-8b-interactive", 500, 30),
        Slo("mlperf-llama3.1-405b-server", 6_000, 175),
        Slo("mlperf-llama3.1-405b-interactive", 4_500, 80),
        Slo("mlperf-deepseek-r1-server", 2_000, 80),
        Slo("mlperf-deepseek-r1-interactive", 1_500, 15),
    )
}
"""Named after the limits of MLPerf Inference's server scenario, `<model>.Server.ttft_latency` and `.tpot_latency` in
loadgen/mlperf.conf of github.com/mlcommons/inference (commit 001712e, rounds 5.1 and later). Only the limits are
theirs: model, prompts and load are not, so no figure here is an MLPerf result."""
DEFAULT_SLOS = ("mlperf-llama3.1-8b-server", "mlperf-llama3.1-8b-interactive")


def slo_of(text: str) -> Slo:
    """A name of `SLOS`, or TTFT/TPOT in milliseconds as in 2000/100. Raises ValueError."""
    if text in SLOS:
        return SLOS[text]
    try:
        ttft_ms, tpot_ms = (float(part) for part in text.split("/"))
    except ValueError:
        ttft_ms = tpot_ms = 0.0
    if not (0 < ttft_ms < float("inf") and 0 < tpot_ms < float("inf")):
        raise ValueError(f"{text!r} is no service level; give TTFT/TPOT in ms as in 2000/100, or {', '.join(SLOS)}")
    return Slo(text, ttft_ms, tpot_ms)


class ServerKind(StrEnum):
    BATON = "baton"
    OTHER = "other"


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself. `engine` is None where it does not tell what stands behind it; then nobody should
    take its figures for those of a model without knowing more. `pools` are numbers of replicas."""

    url: str
    model: str
    kind: ServerKind
    engine: EngineKind | None
    version: str = ""
    max_model_len: int | None = None
    pools: Mapping[str, int] | None = None
    policy: str = ""


@dataclass(frozen=True)
class LoadPlan:
    """One run. Trajectories arrive as a Poisson process of `rate_per_s` for `duration_s`, or, with `concurrency`, so
    many are always under way. Requests are measured that were due between `warm_up_s` and `duration_s`; for
    `drain_s` more, sessions under way go on.

    `scale` is what lengths were multiplied by, `num_cut_turns` those that were left out because they, or one before
    them, are longer than `max_model_len`. Pauses are cut at `max_pause_s`. `salt` makes the text: another run with the
    same one finds its prompts in the caches. `first_in_line`: the generator gets a core as soon as it asks for
    one, where it may (`bench.cpu`).
    """

    workload: str
    rate_per_s: float | None
    concurrency: int | None
    duration_s: float
    warm_up_s: float
    drain_s: float
    seed: int
    salt: str
    slos: tuple[Slo, ...]
    scale: float = 1.0
    max_pause_s: float = 30.0
    request_timeout_s: float = 300.0
    max_lateness_ms: float = 10.0
    max_model_len: int | None = None
    num_trajectories: int = 0
    num_turns: int = 0
    num_cut_turns: int = 0
    vocabulary: str = ""
    as_text: bool = False
    first_in_line: bool = True

    @property
    def how(self) -> str:
        if self.concurrency is not None:
            return f"closed loop, {self.concurrency} trajectories at a time"
        return f"open loop, {self.rate_per_s:g} trajectories/s"
