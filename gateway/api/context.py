"""Owns what is known of the HTTP request being served: its id, who asks, and what the cluster said to it."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.agents.tenants import Entry, Tenant
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
    """One HTTP request. `received_s` is monotonic time, `hints` are what the client claims, `trace_headers` what it
    says of its trace, `entry` is what the request takes up of its tenant's limits (None: keys are not asked for).
    `num_groups` counts the prompts it has placed, each with a receipt of its own; `answering` says that an engine has
    begun to answer, `failure` that the request failed before. `tool_called` is the tool that the answer calls; those of
    `on_end` are told so once, when the response is over, however it ends.
    """

    request_id: str
    received_s: float
    hints: Hints = field(default_factory=Hints)
    trace_headers: dict[str, str] = field(default_factory=dict[str, str])
    rejection: Rejection | None = None
    failure: Failure | None = None
    answering: bool = False
    num_groups: int = 0
    tool_called: str | None = None
    on_end: list[Callable[[str | None], None]] = field(default_factory=list[Callable[[str | None], None]])
    entry: Entry | None = None

    @property
    def tenant(self) -> Tenant | None:
        return self.entry.tenant if self.entry else None

    @property
    def capped_hints(self) -> Hints:
        """What the tenant's limits leave of the client's claims; all of them if keys are not asked for."""
        return self.tenant.cap(self.hints) if self.tenant else self.hints

    @property
    def cache_salt(self) -> str | None:
        return self.tenant.cache_salt if self.tenant else None

    def take_prompt(self, num_choices: int) -> Rejection | None:
        """Counts a prompt against its tenant's limits; why not, if they do not allow it."""
        return self.entry.prompt(num_choices) if self.entry else None

    @property
    def is_operators(self) -> bool:
        """Whether what concerns all tenants is its to know: so it is for everybody where keys are not asked for."""
        return self.tenant is None or self.tenant.operator

    def may_see(self, tenant: str | None) -> bool:
        """Whether what concerns this tenant is its to know."""
        return self.is_operators or (self.tenant is not None and self.tenant.name == tenant)

    def next_receipt_id(self) -> str:
        """The first prompt's receipt has the request's own id; further prompts add -1, -2, ..."""
        self.num_groups += 1
        return self.request_id if self.num_groups == 1 else f"{self.request_id}-{self.num_groups - 1}"


current: contextvars.ContextVar[RequestContext | None] = contextvars.ContextVar("baton_request", default=None)
