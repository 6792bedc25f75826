"""Owns a day of traffic: how the rate rises and falls, what a run of it is asked for, and what it gives. Pure."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench.replay_plan import SLO, RunPlan, Shape, TurnResult
from bench.stats import Percentiles, percentiles
from gateway.scaling.sizing import SizingConfig

DAY_S = 86_400.0


@dataclass(frozen=True)
class Traffic:
    """Trajectories arrive as a Poisson process whose rate begins at its lowest, `1 - swing` of the mean, and is at
    `1 + swing` of it half a day later. Beside that there are `num_bursts` of `burst_s` each, at times drawn evenly, in
    which it is `burst_factor` times as high. `day_s` may be less than a day: then load changes so much faster, but
    turns, pauses and starts of replicas take what they take."""

    mean_per_s: float
    day_s: float = DAY_S
    swing: float = 0.7
    num_bursts: int = 8
    burst_s: float = 900.0
    burst_factor: float = 1.5

    @property
    def most_per_s(self) -> float:
        return self.mean_per_s * (1 + self.swing) * max(self.burst_factor, 1.0)

    @property
    def first_per_s(self) -> float:
        return self.mean_per_s * (1 - self.swing)

    def bursts(self, seed: int) -> list[float]:
        """When each begins."""
        draw = random.Random(f"bursts {seed}")
        return sorted(draw.uniform(0.0, self.day_s - self.burst_s) for _ in range(self.num_bursts))

    def rate_per_s(self, at_s: float, bursts: Sequence[float]) -> float:
        rate = self.mean_per_s * (1 - self.swing * math.cos(2 * math.pi * at_s / self.day_s))
        return rate * self.burst_factor if any(b <= at_s < b + self.burst_s for b in bursts) else rate

    def arrivals(self, seed: int) -> Iterator[float]:
        """Times from 0 to the end of the day, by thinning."""
        draw, bursts, at_s = random.Random(f"arrivals {seed}"), self.bursts(seed), 0.0
        while True:
            at_s += draw.expovariate(self.most_per_s)
            if at_s >= self.day_s:
                return
            if draw.random() * self.most_per_s < self.rate_per_s(at_s, bursts):
                yield at_s


@dataclass(frozen=True)
class DayPlan:
    """One run. `run.shape` is what it begins with, and keeps unless it is `scaled`: then pools have from one decode
    replica to `most` of each, by `sizing`. A replica serves `start_up_s` after it was asked for; sizes are looked at
    every `tick_s`."""

    run: RunPlan
    traffic: Traffic
    scaled: bool
    most: Shape
    start_up_s: float = 180.0
    tick_s: float = 10.0
    sizing: SizingConfig = field(default_factory=SizingConfig)

    @property
    def name(self) -> str:
        return "scaled" if self.scaled else str(self.run.shape)


@dataclass(frozen=True)
class Moment:
    """The pools at one time: replicas that are asked for, and that serve."""

    at_s: float
    prefill: int
    decode: int
    prefill_ready: int
    decode_ready: int
    reason: str = ""


@dataclass(frozen=True)
class DayFigures:
    """GPU-seconds count from when a replica is asked for until it has left. `hourly_share`: of the turns that began in
    each 24th part of the day, how many were in time (None where there was none). `scored`: what the shadow planner
    proposed for pools of a fixed size, by action and verdict."""

    plan: DayPlan
    num_turns: int
    num_refusals: int
    num_failed: int
    slo_share: float
    ttft_share: float
    tpot_share: float
    hourly_share: tuple[float | None, ...]
    ttft_s: Percentiles
    turn_s: Percentiles
    hit_rate: float
    gpu_s: float
    prefill_gpu_s: float
    num_started: int
    num_left: int
    moments: tuple[Moment, ...]
    scored: dict[str, int]
    cpu_s: float

    @property
    def gpu_hours(self) -> float:
        return self.gpu_s / 3600


def day_figures(
    plan: DayPlan,
    turns: Sequence[TurnResult],
    begin_s: float,
    gpu_s: tuple[float, float],
    num_changes: tuple[int, int],
    moments: Sequence[Moment],
    scored: Mapping[str, int],
    cpu_s: float,
) -> DayFigures:
    """`gpu_s`: of prefill and decode; `num_changes`: replicas started and taken out. ValueError without turns."""
    if not turns:
        raise ValueError("no turn was measured; ask for more traffic")
    hours: list[list[bool]] = [[] for _ in range(24)]
    for turn in turns:
        hour = int((turn.began_s - begin_s) / plan.traffic.day_s * 24)
        hours[min(max(hour, 0), 23)].append(turn.keeps(SLO))
    return DayFigures(
        plan=plan,
        num_turns=len(turns),
        num_refusals=sum(turn.num_refusals for turn in turns),
        num_failed=sum(turn.failed for turn in turns),
        slo_share=sum(turn.keeps(SLO) for turn in turns) / len(turns),
        ttft_share=sum(SLO.keeps_ttft(turn.ttft_s, turn.cold_s) for turn in turns) / len(turns),
        tpot_share=sum(SLO.keeps_tpot(turn.tpot_s) for turn in turns) / len(turns),
        hourly_share=tuple(sum(hour) / len(hour) if hour else None for hour in hours),
        ttft_s=percentiles([turn.ttft_s for turn in turns]),
        turn_s=percentiles([turn.turn_s for turn in turns]),
        hit_rate=sum(turn.num_cached_tokens for turn in turns) / sum(turn.num_prompt_tokens for turn in turns),
        gpu_s=sum(gpu_s),
        prefill_gpu_s=gpu_s[0],
        num_started=num_changes[0],
        num_left=num_changes[1],
        moments=tuple(moments),
        scored=dict(sorted(scored.items())),
        cpu_s=cpu_s,
    )
