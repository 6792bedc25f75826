"""Owns what a replay is asked for and what one run of it gives: plans, the service level, figures. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.stats import Percentiles, percentiles
from engine.roofline import ROOFLINES, Roofline
from gateway.scaling.demand import ServiceLevel


@dataclass(frozen=True)
class Shape:
    """A cluster. `prefill` 0: every engine reads the prompts it answers (aggregated serving)."""

    prefill: int
    decode: int

    @property
    def num_gpus(self) -> int:
        return self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.prefill}x{self.decode}" if self.prefill else f"aggregated-{self.decode}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Raises ValueError."""
        name, dash, number = text.partition("-")
        prefill, times, decode = text.partition("x")
        if dash and name == "aggregated" and number.isdecimal() and int(number):
            return cls(0, int(number))
        if times and prefill.isdecimal() and decode.isdecimal() and int(prefill) and int(decode):
            return cls(int(prefill), int(decode))
        raise ValueError(f"{text!r} is no shape; write PREFILLxDECODE as in 2x2, or aggregated-4")


SLO = ServiceLevel()
"""What a turn must keep: what pools are sized for (`gateway.scaling`). A turn that was refused has missed it."""
SLO_SHARE = 0.95
"""Of the turns, that must keep it."""


@dataclass(frozen=True)
class RunPlan:
    """One run. Trajectories arrive as a Poisson process of `rate_per_s`; the cohort that is measured is the first
    `num_trajectories` after `warm_up_s`, and no more arrive after it. The turns that are measured, of whatever
    trajectory, begin between the end of the warm-up and the cohort's last arrival. Pauses are cut at `max_pause_s`.
    `load` is the rate over another one, which the report names. Without `drains` the run ends when the measured turns
    have, and says nothing of trajectories. With `reverse` prefill may fetch from decode (docs/adr/0017). `kv_factor` is
    of `engine.roofline.Roofline`. `constants` names those that the policy was tuned to (`bench.replay_tuning`); "" are
    its own."""

    trace: str
    policy: str
    shape: Shape
    rate_per_s: float
    seed: int
    model: str
    num_trajectories: int
    warm_up_s: float = 300.0
    max_pause_s: float = 300.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_leap_steps: int = 64
    load: float | None = None
    drains: bool = True
    reverse: bool = False
    kv_factor: float = 1.0
    constants: str = ""

    @property
    def roofline(self) -> Roofline:
        return replace(ROOFLINES[self.model], kv_factor=self.kv_factor)


@dataclass(frozen=True, slots=True)
class TurnResult:
    """A turn's times in seconds from the moment its client wanted it. `cold_s`: for its prompt on an idle engine."""

    began_s: float
    ttft_s: float
    turn_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_cacheable_tokens: int
    num_cached_tokens: int
    num_computed_tokens: int
    kv_bytes_moved: int
    cold_s: float
    num_refusals: int
    failed: bool = False
    kv_bytes_asked: int = 0

    @property
    def tpot_s(self) -> float:
        return (self.turn_s - self.ttft_s) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else 0.0

    def keeps(self, slo: ServiceLevel) -> bool:
        in_time = slo.keeps_ttft(self.ttft_s, self.cold_s) and slo.keeps_tpot(self.tpot_s)
        return in_time and not self.num_refusals and not self.failed


@dataclass(frozen=True, slots=True)
class TrajectoryResult:
    """Of its root session and of the whole, from the arrival on. `busy_s` is the root session's time without pauses;
    `least_*` what the oracle allows."""

    name: str
    session_s: float
    busy_s: float
    trajectory_s: float
    least_session_s: float
    least_busy_s: float
    least_trajectory_s: float


@dataclass(frozen=True)
class RunFigures:
    """One run's figures. `slo_share` is of the measured turns, and no refusal or failure keeps it. GPU-seconds are of
    the measured window, as a share of it in `*_busy`. `slowdown` is each root session's time without pauses over the
    oracle's. `kv_moved_bytes` travelled from prefill to decode, `kv_asked_bytes` from decode to prefill, for
    `num_asked_turns`."""

    plan: RunPlan
    num_turns: int
    num_turns_in_all: int
    num_refusals: int
    num_failed: int
    slo_share: float
    window_s: float
    ttft_mean_s: float
    turn_mean_s: float
    session_mean_s: float
    busy_mean_s: float
    ttft_s: Percentiles
    tpot_s: Percentiles
    turn_s: Percentiles
    session_s: Percentiles
    busy_s: Percentiles
    trajectory_s: Percentiles
    slowdown: Percentiles
    least_session_s: Percentiles
    least_busy_s: Percentiles
    hit_rate: float
    hit_rate_ceiling: float
    kv_moved_bytes: int
    prefill_gpu_s: float
    decode_gpu_s: float
    prefill_busy: float
    decode_busy: float
    cpu_s: float
    kv_asked_bytes: int = 0
    num_asked_turns: int = 0

    @property
    def keeps_slo(self) -> bool:
        return self.slo_share >= SLO_SHARE


def figures(
    plan: RunPlan,
    turns: Sequence[TurnResult],
    trajectories: Sequence[TrajectoryResult],
    num_turns_in_all: int,
    window_s: float,
    gpu_s: tuple[float, float],
    cpu_s: float,
) -> RunFigures:
    """From the measured turns and the cohort. Raises ValueError if no turn was measured."""
    if not turns:
        raise ValueError(f"no turn was measured in a window of {window_s:g} s; replay more trajectories")
    num_prompt = sum(turn.num_prompt_tokens for turn in turns)
    shape = plan.shape
    return RunFigures(
        plan=plan,
        num_turns=len(turns),
        num_turns_in_all=num_turns_in_all,
        num_refusals=sum(turn.num_refusals for turn in turns),
        num_failed=sum(turn.failed for turn in turns),
        slo_share=sum(turn.keeps(SLO) for turn in turns) / len(turns),
        window_s=window_s,
        ttft_mean_s=_mean([turn.ttft_s for turn in turns]),
        turn_mean_s=_mean([turn.turn_s for turn in turns]),
        session_mean_s=_mean([one.session_s for one in trajectories]),
        busy_mean_s=_mean([one.busy_s for one in trajectories]),
        ttft_s=percentiles([turn.ttft_s for turn in turns]),
        tpot_s=percentiles([turn.tpot_s for turn in turns]),
        turn_s=percentiles([turn.turn_s for turn in turns]),
        session_s=_percentiles([one.session_s for one in trajectories]),
        busy_s=_percentiles([one.busy_s for one in trajectories]),
        trajectory_s=_percentiles([one.trajectory_s for one in trajectories]),
        slowdown=_percentiles([one.busy_s / one.least_busy_s for one in trajectories]),
        least_session_s=_percentiles([one.least_session_s for one in trajectories]),
        least_busy_s=_percentiles([one.least_busy_s for one in trajectories]),
        hit_rate=sum(turn.num_cached_tokens for turn in turns) / num_prompt,
        hit_rate_ceiling=sum(turn.num_cacheable_tokens for turn in turns) / num_prompt,
        kv_moved_bytes=sum(turn.kv_bytes_moved for turn in turns),
        prefill_gpu_s=gpu_s[0],
        decode_gpu_s=gpu_s[1],
        prefill_busy=gpu_s[0] / (window_s * shape.prefill) if shape.prefill and window_s else 0.0,
        decode_busy=gpu_s[1] / (window_s * shape.decode) if window_s else 0.0,
        cpu_s=cpu_s,
        kv_asked_bytes=sum(turn.kv_bytes_asked for turn in turns),
        num_asked_turns=sum(turn.kv_bytes_asked > 0 for turn in turns),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _percentiles(values: Sequence[float]) -> Percentiles:
    return percentiles(values) if values else Percentiles(math.nan, math.nan, math.nan)
