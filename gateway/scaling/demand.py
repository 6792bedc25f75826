"""Owns what the requests of a gateway ask of the pools, in replicas' worth, over the last minute.

Nothing of it counts requests that are open: those become more when engines are slow, and streams of reports are open
for ever. What is counted is the work that comes, refused requests included, by the costs that were learnt. Times are
of the caller's clock.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.routing.costs import Costs, StepCost
from gateway.routing.types import ReplicaView

WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What a turn should keep: its first token within `ttft_s` and `ttft_per_read` times what an idle engine takes to
    read its whole prompt, and then `tpot_s` a token on average."""

    ttft_s: float = 2.0
    ttft_per_read: float = 1.5
    tpot_s: float = 0.05

    def keeps_ttft(self, ttft_s: float, cold_read_s: float) -> bool:
        """`cold_read_s`: what an idle engine takes for the whole prompt."""
        return ttft_s <= self.ttft_s + self.ttft_per_read * cold_read_s

    def keeps_tpot(self, tpot_s: float) -> bool:
        return tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Demand:
    """In replicas' worth, except for the three counts. Those of several gateways add up.

    `read`: engines that do nothing but read what comes of prompts and is not cached; `read_on_decode` is the part of it
    that was placed on decode replicas. `write`: engines that do nothing but write the answers to what comes, in the
    largest batches that keep the time per token. `keep`: decode engines whose KV cache holds what is being written and
    what sessions in a pause will want back. Of `num_ended` turns, so many had their first token in time, and so many
    their tokens.
    """

    read: float = 0.0
    read_on_decode: float = 0.0
    write: float = 0.0
    keep: float = 0.0
    num_ended: float = 0.0
    num_ttft_kept: float = 0.0
    num_tpot_kept: float = 0.0

    def __add__(self, other: "Demand") -> "Demand":
        return Demand(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


def writing_tokens_per_s(step: StepCost, context_tokens: float, max_num_seqs: int, tpot_s: float) -> float:
    """What one decode engine writes in the largest batch whose steps keep `tpot_s`, of answers with so much context.

    A step of n requests takes `step.seconds(n, n * context_tokens)`, which is linear in n. One request is always
    written, however slow.
    """
    each_s = step.request_s + step.context_token_s * context_tokens
    room_s = tpot_s - step.fixed_s
    fits = room_s / each_s if each_s > 0 else float(max_num_seqs or 1)
    batch = min(max(fits, 1.0), float(max_num_seqs or fits))
    return batch / step.seconds(batch, batch * context_tokens)


@dataclass(slots=True)
class _Second:
    """Sums over what came, and what was answered, in one second of the clock. `context_tokens`: weighed by output."""

    second: int
    read_s: float = 0.0
    read_on_decode_s: float = 0.0
    output_tokens: float = 0.0
    context_tokens: float = 0.0
    num_ended: int = 0
    num_ttft_kept: int = 0
    num_tpot_kept: int = 0


class DemandMeter:
    """Of one gateway. Its memory is a sum for each of the last seconds, whatever comes."""

    def __init__(self, slo: ServiceLevel, now_s: float) -> None:
        self._slo = slo
        self._since_s = now_s
        self._seconds: deque[_Second] = deque()

    def asked(
        self, now_s: float, read_s: float, on_decode: bool, num_output_tokens: float, num_prompt_tokens: int
    ) -> None:
        """A turn has come, and was placed or refused: how long its prompt will be read, and how long its answer will
        be, as predicted."""
        now = self._second(now_s)
        now.read_s += read_s
        now.read_on_decode_s += read_s if on_decode else 0.0
        now.output_tokens += num_output_tokens
        now.context_tokens += num_output_tokens * (num_prompt_tokens + num_output_tokens / 2)

    def ended(self, now_s: float, ttft_s: float, cold_read_s: float, tpot_s: float) -> None:
        """A turn was answered. `cold_read_s`: what an idle engine takes for its whole prompt."""
        now = self._second(now_s)
        now.num_ended += 1
        now.num_ttft_kept += self._slo.keeps_ttft(ttft_s, cold_read_s)
        now.num_tpot_kept += self._slo.keeps_tpot(tpot_s)

    def demand(self, now_s: float, costs: Costs, decode: Iterable[ReplicaView]) -> Demand:
        """`decode`: the replicas as this gateway sees them, with what it has there itself."""
        self._second(now_s)
        over_s = min(max(now_s - self._since_s, 1.0), WINDOW_S)
        views = list(decode)
        capacity_tokens = max((view.num_kv_blocks * view.block_size_tokens for view in views), default=0)
        num_tokens = sum(one.output_tokens for one in self._seconds)
        context_tokens = sum(one.context_tokens for one in self._seconds)
        max_num_seqs = max((view.max_num_seqs for view in views), default=0)
        per_s = writing_tokens_per_s(
            costs.decode.step, context_tokens / num_tokens if num_tokens else 0.0, max_num_seqs, self._slo.tpot_s
        )
        wanted_tokens = sum(max(view.in_flight_tokens, view.promised_tokens) for view in views)
        return Demand(
            read=sum(one.read_s for one in self._seconds) / over_s,
            read_on_decode=sum(one.read_on_decode_s for one in self._seconds) / over_s,
            write=num_tokens / over_s / per_s,
            keep=wanted_tokens / capacity_tokens if capacity_tokens else 0.0,
            num_ended=sum(one.num_ended for one in self._seconds),
            num_ttft_kept=sum(one.num_ttft_kept for one in self._seconds),
            num_tpot_kept=sum(one.num_tpot_kept for one in self._seconds),
        )

    def _second(self, now_s: float) -> _Second:
        """The present one; those before the window are forgotten."""
        second = int(now_s)
        while self._seconds and self._seconds[0].second <= second - WINDOW_S:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1].second != second:
            self._seconds.append(_Second(second))
        return self._seconds[-1]
