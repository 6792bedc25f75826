"""Owns the port from a gateway replica to the others of its deployment, and the bound on waiting for them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client import Metric

log = logging.getLogger("baton.peers")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoliciesInUse:
    """What decides in one gateway, and since when, in seconds of the Unix epoch."""

    policy: str
    shadow_policy: str | None
    since_s: float


@dataclass(frozen=True, slots=True)
class Answers(Generic[T]):
    """What other gateways said, by their ids, and the ids of those that did not answer in time."""

    by_gateway: Mapping[str, T]
    missing: tuple[str, ...] = ()


class Peers(Protocol):
    """The gateways of one deployment. Every call is bounded in time, and a gateway that does not answer fails none."""

    @property
    def own_id(self) -> str: ...

    def members(self) -> tuple[str, ...]:
        """The ids of all gateways, this one's among them, sorted. Asks nobody."""
        ...

    async def metrics(self) -> Answers[list[Metric]]:
        """What the others count."""
        ...

    async def receipt(self, request_id: str) -> Answers[dict[str, Any] | None]:
        """A receipt as JSON, from whoever has it; with one found, nobody else is waited for."""
        ...

    async def policies(self) -> Answers[PoliciesInUse]:
        """What decides in the others."""
        ...


class Alone:
    """The only gateway there is."""

    def __init__(self, own_id: str):
        self.own_id = own_id

    def members(self) -> tuple[str, ...]:
        return (self.own_id,)

    async def metrics(self) -> Answers[list[Metric]]:
        return Answers({})

    async def receipt(self, request_id: str) -> Answers[dict[str, Any] | None]:
        return Answers({})

    async def policies(self) -> Answers[PoliciesInUse]:
        return Answers({})


async def gather_answers(
    calls: Iterable[Awaitable[tuple[str, T] | None]],
    asked: Sequence[str],
    timeout_s: float,
    is_enough: Callable[[T], bool] = lambda answer: False,
) -> Answers[T]:
    """The answers, each with its gateway's id, that arrive within `timeout_s` or before one is enough.

    A call that fails is a gateway that did not answer; None is no gateway's answer. What is unfinished is cancelled.
    """
    answers: dict[str, T] = {}
    enough = False
    pending = {asyncio.ensure_future(call) for call in calls}
    end_s = asyncio.get_running_loop().time() + timeout_s
    try:
        while pending and not enough:
            left_s = end_s - asyncio.get_running_loop().time()
            done, pending = await asyncio.wait(pending, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            for call in done:
                error = asyncio.CancelledError() if call.cancelled() else call.exception()
                if error is not None:
                    log.warning("a gateway could not answer: %r", error)
                elif answer := call.result():
                    answers[answer[0]] = answer[1]
                    enough = enough or is_enough(answer[1])
    finally:
        for call in pending:
            call.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    missing = () if enough else tuple(sorted(set(asked) - answers.keys()))
    return Answers(answers, missing)
