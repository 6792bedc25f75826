"""Owns which sessions a load asks: a workload by its name or path, made to fit what the server holds."""

from dataclasses import dataclass, replace
from pathlib import Path

from bench.load_plan import LoadPlan
from bench.trace_files import read
from bench.traces import Trace, TraceError, cut_trace
from bench.workloads import FIXED, WORKLOADS, fixed, fixed_lengths, longest_turn_tokens, scaled, synthetic

SCALES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 3 / 64, 1 / 32, 1 / 64)
FITTING_SHARE = 0.5


@dataclass(frozen=True)
class Prepared:
    """`note` says what had to be left out; empty where nothing had."""

    plan: LoadPlan
    trace: Trace
    note: str


def prepare(plan: LoadPlan, whole: Trace, scale: float, max_model_len: int | None) -> Prepared:
    """The trace with lengths `scale` times as long, without the turns that `max_model_len` does not hold; the plan then
    says so. Raises TraceError where none is left."""
    trace = scaled(whole, scale)
    num_turns, note = whole.num_turns, ""
    if max_model_len is not None:
        longest = longest_turn_tokens(trace)
        trace = cut_trace(trace, max_model_len)
        if longest > max_model_len:
            shorter = max(trace.block_size_tokens * max_model_len // longest, 1) / whole.block_size_tokens
            note = (
                f"{num_turns - trace.num_turns:,} of {num_turns:,} turns are left out: the longest has {longest:,} "
                f"tokens, the context {max_model_len:,}; --scale {shorter:.3g} leaves out fewer"
            )
        if not trace.num_turns:
            raise TraceError(f"no turn of {plan.workload} fits {max_model_len:,} tokens; make all shorter with --scale")
    plan = replace(
        plan,
        scale=trace.block_size_tokens / whole.block_size_tokens,
        max_model_len=max_model_len,
        num_trajectories=len(trace.trajectories),
        num_turns=trace.num_turns,
        num_cut_turns=num_turns - trace.num_turns,
    )
    return Prepared(plan, trace, note)


def fitting_scale(whole: Trace, max_model_len: int) -> float:
    """The largest with which the context holds most of the turns; 1 where it does as they are."""
    size = whole.block_size_tokens
    for part in SCALES:
        scale = max(round(size * part), 1) / size
        if cut_trace(scaled(whole, scale), max_model_len).num_turns >= FITTING_SHARE * whole.num_turns:
            break
    return scale


def sessions(plan: LoadPlan) -> Trace:
    """Of the plan's name or path, as long as it is. Raises TraceError, OSError."""
    if (lengths := fixed_lengths(plan.workload)) is not None:
        return fixed(*lengths)
    if plan.workload in WORKLOADS:
        return synthetic(plan.workload, plan.seed)
    if not plan.workload:
        raise TraceError(f"give a workload: {', '.join(WORKLOADS)}, {FIXED}, or the path of a recorded trace")
    if not Path(plan.workload).exists():
        raise TraceError(f"there is no workload and no file {plan.workload}; there are {', '.join(WORKLOADS)}")
    return read(Path(plan.workload))
