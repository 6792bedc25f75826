"""Owns what is known of the HTTP request being served: its id, and what the cluster said to it."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.routing.types import Hints, Rejection


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed, as its client is told."""

    status: int
    message: str
    param: str | None = None
    kind: str | None = None


@dataclass
class RequestContext:
    """One HTTP request. `received_s` is monotonic time, `hints` come from its headers. `num_groups` counts the prompts
    it has placed, each with a receipt of its own; `answering` says that an engine has begun to answer, `failure` that
    the request failed before. `tool_called` is the tool that the answer calls; those of `on_end` are told so once, when
    the response is over, however it ends.
    """

    request_id: str
    received_s: float
    hints: Hints = field(default_factory=Hints)
    rejection: Rejection | None = None
    failure: Failure | None = None
    answering: bool = False
    num_groups: int = 0
    tool_called: str | None = None
    on_end: list[Callable[[str | None], None]] = field(default_factory=list[Callable[[str | None], None]])

    def next_receipt_id(self) -> str:
        """The first prompt's receipt has the request's own id; further prompts add -1, -2, ..."""
        self.num_groups += 1
        return self.request_id if self.num_groups == 1 else f"{self.request_id}-{self.num_groups - 1}"


current: contextvars.ContextVar[RequestContext | None] = contextvars.ContextVar("baton_request", default=None)
