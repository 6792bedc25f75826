"""Owns how many replicas each pool should have: both together, from the work that comes. Pure.

Decode has what writing in time and keeping sessions' KV needs; prefill has what reading needs beside that which decode
has room for, as far as the policy lets decode read. How full an engine may be is no constant: it is lowered while turns
are late although every replica that was wanted serves, and raised slowly while they are in time. What was needed at any
moment of the last while is kept, so a pool grows at once and shrinks late, and the KV of a replica is not thrown away
for a lull.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gateway.scaling.demand import Demand


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """Replicas."""

    prefill: int
    decode: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """The fewest and the most replicas of each pool. Without a prefill pool both of its are 0."""

    least: PoolSizes
    most: PoolSizes


@dataclass(frozen=True, slots=True)
class SizingConfig:
    """`read_share`, `write_share`, `keep_share`: how much of an engine's time and of its KV cache may be asked for, to
    begin with; margins multiply what is needed, between `least_margin` and `most_margin`. `late_gain` and `early_gain`
    are by how much a margin changes in a second, for each unit that the share of turns in time is below and above
    `target`; it stays with fewer than `min_ended` turns to judge by, and where turns are late while replicas start. A
    pool shrinks to what was needed in the last `hold_s`."""

    read_share: float = 0.6
    write_share: float = 0.8
    keep_share: float = 0.8
    target: float = 0.95
    least_margin: float = 0.5
    most_margin: float = 2.0
    late_gain: float = 0.01
    early_gain: float = 0.001
    min_ended: int = 10
    hold_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Need:
    """At one moment: how many replicas, rounded up."""

    at_s: float
    sizes: PoolSizes


@dataclass(frozen=True, slots=True)
class Memory:
    """What one sizing leaves to the next. `read_margin` follows the turns whose first token was late, `write_margin`
    those whose tokens were."""

    read_margin: float = 1.0
    write_margin: float = 1.0
    at_s: float | None = None
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True, slots=True)
class Sizing:
    """`needed` at this moment; `sizes` with what is held. `reason` in words."""

    sizes: PoolSizes
    needed: PoolSizes
    memory: Memory
    reason: str


def size_pools(
    demand: Demand,
    bounds: Bounds,
    serving: PoolSizes,
    memory: Memory,
    now_s: float,
    config: SizingConfig = SizingConfig(),
) -> Sizing:
    """Both pools together, of which so many replicas serve now. The same arguments give the same sizes, bit for bit."""
    memory = _with_margins(demand, serving, memory, now_s, config)
    needed, reason = _needed(demand, bounds, memory, config)
    needs = (*(need for need in memory.needs if need.at_s > now_s - config.hold_s), Need(now_s, needed))
    held = _most(needs)
    if held != needed:
        reason += f"; held at {held.prefill}+{held.decode} by the last {config.hold_s:g} s"
    return Sizing(held, needed, replace(memory, needs=needs), reason)


def _most(needs: Sequence[Need]) -> PoolSizes:
    return PoolSizes(max((n.sizes.prefill for n in needs), default=0), max((n.sizes.decode for n in needs), default=0))


def _with_margins(demand: Demand, serving: PoolSizes, memory: Memory, now_s: float, config: SizingConfig) -> Memory:
    elapsed_s = 0.0 if memory.at_s is None else max(now_s - memory.at_s, 0.0)
    wanted = _most(memory.needs)
    # Turns that are late while replicas start tell nothing of how many are enough.
    is_whole = serving.prefill >= wanted.prefill and serving.decode >= wanted.decode

    def moved(margin: float, num_kept: float) -> float:
        if demand.num_ended < config.min_ended:
            return margin
        below = config.target - num_kept / demand.num_ended
        if below > 0 and not is_whole:
            return margin
        gain = config.late_gain if below > 0 else config.early_gain
        return min(max(margin + gain * below * elapsed_s, config.least_margin), config.most_margin)

    return replace(
        memory,
        read_margin=moved(memory.read_margin, demand.num_ttft_kept),
        write_margin=moved(memory.write_margin, demand.num_tpot_kept),
        at_s=now_s,
    )


def _needed(demand: Demand, bounds: Bounds, memory: Memory, config: SizingConfig) -> tuple[PoolSizes, str]:
    least, most = bounds.least, bounds.most
    read = demand.read / config.read_share * memory.read_margin
    write = demand.write / config.write_share * memory.write_margin
    keep = demand.keep / config.keep_share * memory.read_margin
    has_prefill = most.prefill > 0
    wanted = max(write, keep) if has_prefill else max(write + read, keep)
    decode = _clamp(wanted, least.decode, most.decode)
    room = max(decode - write, 0.0) if demand.read_on_decode > 0 else 0.0
    prefill = _clamp(read - room, least.prefill, most.prefill) if has_prefill else 0
    if demand.read_on_decode > 0 and has_prefill:
        # What a full prefill pool leaves to read is decode's.
        decode = max(decode, _clamp(read + write - prefill, least.decode, most.decode))
    reason = (
        f"{prefill}+{decode}: reading needs {read:.2f}, writing {write:.2f}, KV {keep:.2f} replicas, with margins "
        f"{memory.read_margin:.2f} and {memory.write_margin:.2f}"
    )
    return PoolSizes(prefill, decode), reason


def _clamp(wanted: float, least: int, most: int) -> int:
    return min(max(math.ceil(wanted), least), most)
