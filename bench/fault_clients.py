"""Owns the clients of a fault: each streams one answer over a connection of its own, and may go away."""

import asyncio
import time
from collections.abc import Sequence

import httpx

from bench.fault_asks import Answer, Ask, End

CONNECT_TIMEOUT_S = 10.0
PATIENCE_S = 180.0
"""How long a client waits for the next piece of an answer: longer than a gateway looks for a replica."""


def connections() -> httpx.AsyncClient:
    """For any number of clients; no two share a connection."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(PATIENCE_S, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        trust_env=False,
    )


class Client:
    """One request under way. `answer` grows while it streams."""

    def __init__(self, http: httpx.AsyncClient, url: str, ask: Ask, clock_s: float) -> None:
        """`clock_s`: the monotonic time that the answer's times count from, until the fault's is known."""
        self.ask = ask
        self.answer = Answer(ask.name, sent_s=time.monotonic() - clock_s)
        self._clock_s = clock_s
        self._leaving = False
        self._last_tokens_s: float | None = None
        self._task = asyncio.create_task(self._run(http, url))

    @property
    def has_begun(self) -> bool:
        return self.answer.num_tokens > 0

    @property
    def has_ended(self) -> bool:
        return self._task.done()

    def count_from(self, clock_s: float) -> None:
        """The answer's times count from here, those before included."""
        answer, by_s = self.answer, clock_s - self._clock_s
        self._clock_s = clock_s
        answer.sent_s -= by_s
        answer.first_token_s = None if answer.first_token_s is None else answer.first_token_s - by_s
        answer.ended_s = None if answer.ended_s is None else answer.ended_s - by_s

    def leave(self) -> None:
        """The client goes away now."""
        self._leaving = True
        self._task.cancel()

    async def ended(self) -> None:
        """Returns when the answer has ended, however it did."""
        await asyncio.gather(self._task, return_exceptions=True)

    def give_up(self) -> None:
        self._task.cancel()

    async def _run(self, http: httpx.AsyncClient, url: str) -> None:
        answer = self.answer
        try:
            async with http.stream("POST", f"{url}{self.ask.path}", json=self.ask.body) as response:
                answer.status = response.status_code
                answer.receipt_id = response.headers.get("x-baton-request-id")
                answer.retry_after = response.headers.get("retry-after")
                if response.status_code != httpx.codes.OK:
                    answer.end = End.REFUSED
                    answer.error = (await response.aread()).decode(errors="replace")[:500]
                    return
                async for line in response.aiter_lines():
                    num_before = answer.num_tokens
                    answer.take(line)
                    if answer.num_tokens > num_before:
                        self._took_tokens()
            answer.close()
        except httpx.TimeoutException as error:
            answer.end, answer.error = End.HUNG, repr(error)
        except httpx.HTTPError as error:
            answer.end, answer.error = End.BROKEN, repr(error)
        except (ValueError, KeyError) as error:
            answer.end, answer.error = End.CUT, f"unreadable: {error!r}"
        except asyncio.CancelledError:
            answer.end = End.LEFT if self._leaving else End.HUNG
            raise
        finally:
            answer.ended_s = self._now_s()

    def _took_tokens(self) -> None:
        now_s, answer = time.monotonic(), self.answer
        if self._last_tokens_s is None:
            answer.first_token_s = now_s - self._clock_s
        else:
            answer.longest_gap_s = max(answer.longest_gap_s, now_s - self._last_tokens_s)
        self._last_tokens_s = now_s

    def _now_s(self) -> float:
        return time.monotonic() - self._clock_s


async def all_ended(clients: Sequence[Client], timeout_s: float) -> bool:
    """Whether every answer ended within the time; those that did not are given up."""
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(client.ended() for client in clients))
    except TimeoutError:
        for client in clients:
            client.give_up()
        await asyncio.gather(*(client.ended() for client in clients))
        return False
    return True
