"""Owns how load is counted: requests and tokens in flight, an engine's pace, ratios over the recent past."""

from collections import deque
from dataclasses import dataclass

from engine.protocol import InFlight

PACE_STEPS = 32
"""Over how many steps with prefill the prefill rate is taken."""


@dataclass(slots=True)
class _Request:
    num_tokens: int
    has_written: bool = False


class Ledger:
    """The requests in flight somewhere. Each counts its prompt and what it has written, until it ends.

    Tokens of a request are queued until it has written its first token: its prompt waits or is being read.
    """

    def __init__(self) -> None:
        self.num_queued_tokens = 0
        self.num_running_tokens = 0
        self._requests: dict[str, _Request] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def in_flight(self) -> InFlight:
        num_tokens = self.num_queued_tokens + self.num_running_tokens
        return InFlight(len(self._requests), num_tokens, self.num_queued_tokens)

    def began(self, request_id: str, num_prompt_tokens: int) -> None:
        self.ended(request_id)
        self._requests[request_id] = _Request(num_prompt_tokens)
        self.num_queued_tokens += num_prompt_tokens

    def wrote(self, request_id: str, num_tokens: int) -> None:
        """Unknown requests are ignored, here and in `ended`: an engine may still tell of one that was aborted."""
        request = self._requests.get(request_id)
        if request is None or not num_tokens:
            return
        if not request.has_written:
            request.has_written = True
            self.num_queued_tokens -= request.num_tokens
            self.num_running_tokens += request.num_tokens
        request.num_tokens += num_tokens
        self.num_running_tokens += num_tokens

    def ended(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        if request.has_written:
            self.num_running_tokens -= request.num_tokens
        else:
            self.num_queued_tokens -= request.num_tokens


class Pace:
    """How long an engine's last step took, how many tokens of prompts it read, and how fast the engine reads prompts.

    The prefill rate is the prompt tokens of the last PACE_STEPS steps that read prompts, divided by the time those
    steps took. Requests that decode in the same steps slow it down: it is what prefill gets, not what it could get.
    """

    def __init__(self) -> None:
        self.step_duration_s = 0.0
        self.step_prefill_tokens = 0
        self._steps: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS)

    def stepped(self, duration_s: float, num_prefill_tokens: int) -> None:
        """`num_prefill_tokens` is 0 for a step in which no request computed more than one token of its prompt."""
        self.step_duration_s, self.step_prefill_tokens = duration_s, num_prefill_tokens
        if num_prefill_tokens:
            self._steps.append((num_prefill_tokens, duration_s))

    @property
    def prefill_tokens_per_s(self) -> float:
        """0 until a prompt was read."""
        total_s = sum(duration_s for _, duration_s in self._steps)
        return sum(num_tokens for num_tokens, _ in self._steps) / total_s if total_s else 0.0


class Recent:
    """A ratio of two sums over the last `number` additions: an average that follows a change and needs no clock."""

    def __init__(self, number: int) -> None:
        self._added: deque[tuple[float, float]] = deque(maxlen=number)
        self._ratio: float | None = None

    def add(self, numerator: float, denominator: float = 1.0) -> None:
        self._added.append((numerator, denominator))
        total = sum(denominator for _, denominator in self._added)
        self._ratio = sum(numerator for numerator, _ in self._added) / total if total else None

    @property
    def ratio(self) -> float | None:
        """None until something was added."""
        return self._ratio
