"""Asking the other gateways is bounded in time, and no gateway's silence or failure takes the others' answers away."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from gateway.peers import Answers, gather_answers
from gateway.peers_ray import TIMEOUT_S, RayPeers
from tests.unit.virtual_time import now_s, simulate

ASKED = ("one", "two")


async def after(delay_s: float, answer: Any, cancelled: list[Any] | None = None) -> Any:
    try:
        await asyncio.sleep(delay_s)
    except asyncio.CancelledError:
        if cancelled is not None:
            cancelled.append(answer)
        raise
    if isinstance(answer, Exception):
        raise answer
    return answer


# gather_answers


def test_all_who_answer_in_time_are_heard_and_nobody_waits_longer_than_they_take() -> None:
    async def main() -> None:
        answers = await gather_answers([after(0.5, ("one", 1)), after(0.2, ("two", 2))], ASKED, 1.0)
        assert answers == Answers({"two": 2, "one": 1}, ())
        assert now_s() == pytest.approx(0.5)

    simulate(main)


def test_who_does_not_answer_in_time_is_missing_and_no_longer_asked() -> None:
    async def main() -> None:
        cancelled: list[Any] = []
        answers = await gather_answers([after(0.2, ("one", 1)), after(9.0, ("two", 2), cancelled)], ASKED, 1.0)
        assert answers == Answers({"one": 1}, ("two",))
        assert now_s() == pytest.approx(1.0)
        assert cancelled == [("two", 2)]

    simulate(main)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), RayServeException("cancelled")])
def test_who_fails_is_missing_and_the_others_are_heard(error: Exception) -> None:
    async def main() -> None:
        answers = await gather_answers([after(0.1, error), after(0.2, ("two", 2))], ASKED, 1.0)
        assert answers == Answers({"two": 2}, ("one",))

    simulate(main)


def test_a_call_that_somebody_else_cancels_is_an_answer_that_is_missing() -> None:
    async def main() -> None:
        call = asyncio.create_task(after(5.0, ("one", 1)))
        asyncio.get_running_loop().call_later(0.1, call.cancel)
        assert await gather_answers([call, after(0.2, ("two", 2))], ASKED, 1.0) == Answers({"two": 2}, ("one",))

    simulate(main)


def test_who_was_not_expected_may_answer_and_none_is_nobodys_answer() -> None:
    async def main() -> None:
        answers = await gather_answers([after(0.1, None), after(0.1, ("new", 3))], ("one",), 1.0)
        assert answers == Answers({"new": 3}, ("one",))

    simulate(main)


def test_with_enough_nobody_else_is_waited_for_or_called_missing() -> None:
    async def main() -> None:
        cancelled: list[Any] = []
        calls = [after(0.1, ("one", 1)), after(9.0, ("two", 2), cancelled)]
        answers = await gather_answers(calls, ASKED, 1.0, lambda answer: answer == 1)
        assert answers == Answers({"one": 1}, ())
        assert now_s() == pytest.approx(0.1)
        assert cancelled == [("two", 2)]

    simulate(main)


def test_a_caller_who_goes_away_leaves_no_call_behind() -> None:
    async def main() -> None:
        cancelled: list[Any] = []
        asking = asyncio.create_task(gather_answers([after(9.0, ("one", 1), cancelled)], ASKED, 5.0))
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert cancelled == [("one", 1)]

    simulate(main)


# RayPeers


class Handle:
    """A Serve handle whose deployment has these replicas, or does not know yet; `sent` is what a broadcast does."""

    def __init__(self, replica_ids: list[str] | None, sent: Any = None) -> None:
        router = None
        if replica_ids is not None:
            replicas = [SimpleNamespace(unique_id=replica_id) for replica_id in replica_ids]
            router = SimpleNamespace(curr_replicas=replicas)
        self._router = SimpleNamespace(_asyncio_router=SimpleNamespace(request_router=router))
        self._sent = sent
        self.asked: list[tuple[Any, ...]] = []

    def options(self) -> "Handle":
        return self

    def broadcast(self, *call: Any) -> Any:
        self.asked.append(call)
        return SimpleNamespace(_fetch_replica_results_async=self._sent)


class Result:
    """A Serve replica's result, `answer` after `delay_s`."""

    def __init__(self, delay_s: float, answer: Any) -> None:
        self._delay_s, self._answer = delay_s, answer
        self.cancelled = False

    async def get_async(self) -> Any:
        return await after(self._delay_s, self._answer)

    def cancel(self) -> None:
        self.cancelled = True


def peers(handle: Handle) -> RayPeers:
    return RayPeers("own", handle)  # type: ignore[arg-type]


@pytest.mark.parametrize("known", [None, [], ["own"]])
def test_a_gateway_without_others_asks_nobody(known: list[str] | None) -> None:
    async def main() -> None:
        handle = Handle(known)
        assert peers(handle).members() == ("own",)
        assert await peers(handle).metrics() == Answers({})
        assert await peers(handle).receipt("r") == Answers({})
        assert handle.asked == []

    simulate(main)


def test_a_gateway_that_is_not_listed_itself_is_a_member_all_the_same() -> None:
    async def main() -> None:
        assert peers(Handle(["b", "a"])).members() == ("a", "b", "own")

    simulate(main)


def test_the_others_answers_come_with_who_is_missing() -> None:
    async def main() -> None:
        results = [Result(0.1, None), Result(0.1, ("a", "receipt")), Result(99.0, ("b", None))]

        async def sent() -> list[Result]:
            return results

        handle = Handle(["own", "a", "b"], sent)
        assert await peers(handle)._ask("peer_receipt", "r") == Answers({"a": "receipt"}, ("b",))
        assert now_s() == pytest.approx(TIMEOUT_S)
        assert handle.asked == [("peer_receipt", "own", "r")]
        assert results[2].cancelled

    simulate(main)


def test_a_receipt_that_is_found_ends_the_search() -> None:
    async def main() -> None:
        async def sent() -> list[Result]:
            return [Result(0.1, ("a", None)), Result(0.2, ("b", {"request_id": "r"})), Result(99.0, ("c", None))]

        answers = await peers(Handle(["own", "a", "b", "c"], sent)).receipt("r")
        assert answers == Answers({"a": None, "b": {"request_id": "r"}}, ())
        assert now_s() == pytest.approx(0.2)

    simulate(main)


def test_a_broadcast_that_cannot_be_sent_means_that_all_others_are_missing() -> None:
    async def main() -> None:
        async def fails() -> list[Result]:
            raise RayServeException("the deployment is not available")

        async def hangs() -> list[Result]:
            await asyncio.sleep(99.0)
            return []

        assert await peers(Handle(["own", "a", "b"], fails)).metrics() == Answers({}, ("a", "b"))
        assert now_s() == pytest.approx(0.0)
        assert await peers(Handle(["own", "a", "b"], hangs)).metrics() == Answers({}, ("a", "b"))
        assert now_s() == pytest.approx(TIMEOUT_S)

    simulate(main)
