"""Owns what `bench compare` is asked for: which systems, under which loads, in which turns. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import get_args

from bench.load_plan import LoadPlan
from bench.stats import in_turns
from bench.traces import Session, Trace
from gateway.settings import PolicyName

WAKE_S = 3.0
WAKE_CONCURRENCY = 4
CONFIG_ENDINGS = (".yaml", ".yml")
URL_BEGINNINGS = ("http://", "https://")


class SystemKind(StrEnum):
    """What a system is; the value is the word for it."""

    AGGREGATED = "aggregated"
    SPLIT = "split"
    BARE = "bare"
    ROUTER = "router"
    ROUTER_STOCK = "router-stock"
    CONFIG = "config"
    SERVER = "server"


IS_WHAT: Mapping[SystemKind, str] = {
    SystemKind.AGGREGATED: "Baton with engines on the same cores or GPUs, each of which reads and writes",
    SystemKind.SPLIT: "Baton with the configuration's prefill and decode engines",
    SystemKind.BARE: "one vLLM server with vLLM's own settings, whose data-parallel engines have these cores or GPUs",
    SystemKind.ROUTER: "vllm-router over vLLM servers for prefill and decode, with Baton's engine settings",
    SystemKind.ROUTER_STOCK: "vllm-router over vLLM servers for prefill and decode, with vLLM's own settings",
    SystemKind.CONFIG: "`baton serve` with another configuration",
    SystemKind.SERVER: "a server that runs already; it is neither started nor stopped",
}
AFTER_IT: Mapping[SystemKind, str] = {
    SystemKind.AGGREGATED: "tokens of prompts that a step reads at most, as in aggregated:2048",
    SystemKind.SPLIT: "the policy that routes, as in split:least-tokens",
    SystemKind.CONFIG: "NAME=FILE.yaml",
    SystemKind.SERVER: "NAME=http://...",
}
"""What a system is told, after a colon or an equals sign."""
_AFTER_EQUALS = (SystemKind.CONFIG, SystemKind.SERVER)


@dataclass(frozen=True)
class Contestant:
    """A system to be compared. `argument`: a policy, a chunk, a file or an address, as its kind has it; or empty."""

    name: str
    kind: SystemKind
    argument: str = ""

    @property
    def is_split(self) -> bool:
        return self.kind in (SystemKind.SPLIT, SystemKind.ROUTER, SystemKind.ROUTER_STOCK)

    @classmethod
    def parse(cls, text: str) -> "Contestant":
        """Raises ValueError."""
        name, equals, target = text.partition("=")
        if equals:
            if not name or (not target.startswith(URL_BEGINNINGS) and not target.endswith(CONFIG_ENDINGS)):
                raise ValueError(f"{text!r} must be NAME=FILE.yaml or NAME=http://...")
            is_server = target.startswith(URL_BEGINNINGS)
            return cls(name, SystemKind.SERVER if is_server else SystemKind.CONFIG, target)
        word, _, argument = text.partition(":")
        known = [kind for kind in SystemKind if kind not in _AFTER_EQUALS]
        if word not in known:
            raise ValueError(f"there is no system {text!r}; there are {', '.join(known)}, NAME=FILE.yaml and NAME=URL")
        kind = SystemKind(word)
        if argument and kind not in AFTER_IT:
            raise ValueError(f"{word} takes nothing after a colon; {text!r} has {argument!r}")
        if kind is SystemKind.AGGREGATED and argument and not (argument.isdecimal() and int(argument)):
            raise ValueError(f"{text!r}: after the colon comes a number of tokens, e.g. aggregated:2048")
        if kind is SystemKind.SPLIT and argument and argument not in get_args(PolicyName):
            raise ValueError(f"{text!r}: there is no such policy; there are {', '.join(get_args(PolicyName))}")
        return cls(text, kind, argument)


def parse_contestants(texts: list[str]) -> tuple[Contestant, ...]:
    """Raises ValueError."""
    found = tuple(Contestant.parse(text) for text in texts)
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise ValueError(f"each system once, please: {', '.join(names)}")
    if len(found) < 2:
        raise ValueError("name two systems at least; the first is what the others are compared with")
    return found


@dataclass(frozen=True)
class ComparePlan:
    """In each of `rounds` every system has its turn, under each of `rates_per_s` for as long as `load` says. Where no
    rates are given they are `shares` of what the first system can do in a closed loop of `calibration`.

    Rounds differ in who arrives when; within one all systems get the same. `has_random_weights`: by the configuration.
    """

    contestants: tuple[Contestant, ...]
    config: str
    rates_per_s: tuple[float, ...]
    shares: tuple[float, ...]
    rounds: int
    load: LoadPlan
    calibration: LoadPlan
    wake: LoadPlan
    has_random_weights: bool = False

    @property
    def systems(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.contestants)

    def contestant(self, name: str) -> Contestant:
        return next(one for one in self.contestants if one.name == name)

    def turns(self) -> list[tuple[int, str]]:
        return in_turns(self.systems, self.rounds)

    def load_of(self, round: int, rate_per_s: float) -> LoadPlan:
        load = self.load
        salt = f"{load.salt}-{round}-{rate_per_s:g}"
        return replace(load, rate_per_s=rate_per_s, seed=load.seed + round, salt=salt)

    def wake_of(self, round: int) -> LoadPlan:
        return replace(self.wake, salt=f"{self.wake.salt}-wake-{round}")

    def with_rates(self, trace: Trace, turns_per_s: float, turn_s: float) -> "ComparePlan":
        """At shares of so many turns a second, of which one takes so long, to three digits of trajectories a second."""
        load = self.load
        turns = turns_in_window(trace, load.warm_up_s, load.duration_s, load.max_pause_s, turn_s)
        rates = (share * turns_per_s * (load.duration_s - load.warm_up_s) / turns for share in self.shares)
        return replace(self, rates_per_s=tuple(float(f"{rate:.3g}") for rate in rates))


def turns_in_window(trace: Trace, from_s: float, to_s: float, max_pause_s: float, turn_s: float) -> float:
    """How many turns are due between `from_s` and `to_s` if one trajectory a second arrives from 0 to `to_s`, and each
    turn takes `turn_s`: a run that is shorter than its trajectories never sees most of their turns.

    A turn that is due x after its trajectory arrived falls into it for arrivals between from_s - x and to_s - x.
    """

    def offsets_s(session: Session, began_s: float) -> Iterator[float]:
        now_s = began_s
        for index, turn in enumerate(session.turns):
            if index:
                pause_s = turn.pause_s if turn.arrives_s is None else max(began_s + turn.arrives_s - now_s, 0.0)
                now_s += min(pause_s, max_pause_s)
            yield now_s
            now_s += turn_s
            for child in session.children:
                if child.after_turn == index:
                    yield from offsets_s(child.session, now_s + child.delay_s)

    dues_s = [due_s for trajectory in trace.trajectories for due_s in offsets_s(trajectory.root, 0.0)]
    expected = sum(max(to_s - due_s, 0.0) - max(from_s - due_s, 0.0) for due_s in dues_s)
    return expected / len(trace.trajectories)


def plan(
    contestants: tuple[Contestant, ...],
    config: str,
    rates_per_s: tuple[float, ...],
    shares: tuple[float, ...],
    rounds: int,
    load: LoadPlan,
    calibration_s: float,
    concurrency: int,
) -> ComparePlan:
    """`concurrency`: trajectories at a time in the closed loop that tells what a system can do, and in the shorter one
    that wakes each: its first requests are slow, and the first hand-off of a pair pays a handshake."""
    closed = replace(load, rate_per_s=None, concurrency=concurrency, warm_up_s=0.0, drain_s=0.0, max_pause_s=0.0)
    calibration = replace(closed, duration_s=calibration_s, salt=f"{load.salt}-calibration")
    wake = replace(closed, duration_s=WAKE_S, concurrency=min(concurrency, WAKE_CONCURRENCY))
    return ComparePlan(contestants, config, rates_per_s, shares, rounds, load, calibration, wake)
