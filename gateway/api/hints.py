"""Owns what requests say of themselves beside their prompt: who calls, how urgent it is, what comes next. Pure.

Agents say it in several dialects: in headers, and in body fields that the allow-list drops afterwards (`nvext`,
`vllm_xargs.agentic_context`, `session_id`). Baton's own headers must be right; what others made up is ignored where it
makes no sense. Names of sessions are hashed: of a fixed length, whatever the client sends, and what it sends stays out
of receipts.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gateway.api import tools
from gateway.api.fields import Refused
from gateway.routing.types import Hints, Priority

PRIORITY_HEADER = "x-baton-priority"
DEADLINE_HEADER = "x-baton-ttft-deadline-ms"
OUTPUT_HEADER = "x-baton-output-tokens"
FINAL_HEADER = "x-baton-session-final"
TOOL_HEADER = "x-baton-tool"
AGENT_HEADER = "x-baton-agent"
CLAUDE_CODE_HEADER = "x-claude-code-session-id"
SESSION_HEADERS = (
    "x-baton-session", "x-session-id", CLAUDE_CODE_HEADER, "x-session-affinity", "x-dynamo-session-id", "thread-id",
    "session-id",
)  # fmt: skip
"""The names under which agents say which conversation a request belongs to; the first that is there counts. In a body
it is `session_id`, not `prompt_cache_key`: many conversations share one."""
PARENT_HEADERS = (
    "x-baton-parent-session", "x-parent-session-id", "x-dynamo-parent-session-id", "x-codex-parent-thread-id",
)  # fmt: skip

RETRY_HEADER = "x-stainless-retry-count"
"""OpenAI's and Anthropic's clients count in it how often they have sent the request before."""

SESSION_BYTES = 16
MAX_DEADLINE_MS = 3_600_000
MAX_OUTPUT_TOKENS = 1_000_000
MAX_AGENT_LENGTH = 32

_NUMBER = re.compile(r"[0-9]{1,7}")
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_PRODUCT = re.compile(r"[A-Za-z0-9_.-]+")


def _is_number(value: str, most: int) -> bool:
    return bool(_NUMBER.fullmatch(value)) and 0 < int(value) <= most


_OWN: Mapping[str, tuple[Callable[[str], object], str]] = {
    PRIORITY_HEADER: (set(Priority).__contains__, ", ".join(Priority)),
    DEADLINE_HEADER: (
        lambda value: _is_number(value, MAX_DEADLINE_MS),
        f"a whole number of milliseconds, 1 to {MAX_DEADLINE_MS}: how long the first token may take",
    ),
    OUTPUT_HEADER: (
        lambda value: _is_number(value, MAX_OUTPUT_TOKENS),
        f"a whole number of tokens, 1 to {MAX_OUTPUT_TOKENS}: how long the answer is expected to be",
    ),
    FINAL_HEADER: ({"true", "false"}.__contains__, "true or false: whether the session ends with this turn"),
    TOOL_HEADER: (_NAME.fullmatch, "1 to 64 letters, digits or '_.:/-': the tool whose result this turn brings"),
    AGENT_HEADER: (_NAME.fullmatch, "1 to 64 letters, digits or '_.:/-': the program that calls"),
}


def read_hints(headers: Mapping[str, str], path: str = "", body: Mapping[str, Any] | None = None) -> Hints | Refused:
    """What the client's headers (lower-case names) and body say of its request, or why they are refused."""
    for name, (is_right, words) in _OWN.items():
        value = headers.get(name)
        if value is not None and not is_right(value):
            return Refused(f"the header {name} must be {words}")
    body = body or {}
    nvext = _object(_object(body.get("nvext")).get("agent_hints"))
    agentic = _object(_object(body.get("vllm_xargs")).get("agentic_context"))
    session, parent = _sessions(headers, body, agentic)
    return Hints(
        priority=_priority(headers, nvext, agentic),
        ttft_deadline_s=_deadline_s(headers, agentic),
        session=session,
        parent=parent if parent != session else None,
        output_tokens=_first_number(
            MAX_OUTPUT_TOKENS,
            headers.get(OUTPUT_HEADER),
            nvext.get("osl"),
            agentic.get("expected_output_length"),
            agentic.get("expected_output_tokens"),
        ),
        tool=headers.get(TOOL_HEADER) or tools.answered(path, body),
        agent=headers.get(AGENT_HEADER) or _product(headers.get("user-agent", "")),
        is_last=_is_last(headers, agentic),
        is_retry=(_number(headers.get(RETRY_HEADER)) or 0) > 0,
    )


def _sessions(
    headers: Mapping[str, str], body: Mapping[str, Any], agentic: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """The names of the session and of its parent."""
    said = _first(headers, SESSION_HEADERS)
    parent = _first(headers, PARENT_HEADERS)
    if said is not None and said == headers.get(CLAUDE_CODE_HEADER):
        # Its sub-agents bear their parent's session, and an id of their own.
        agent_id = headers.get("x-claude-code-agent-id")
        parent_id = headers.get("x-claude-code-parent-agent-id")
        if agent_id:
            parent = parent or _part(said, parent_id)
            said = _part(said, agent_id)
    said = said or _first(body, ("session_id",)) or _first(agentic, ("program_id",))
    parent = parent or _first(agentic, ("parent_program_id",))
    return _named(said), _named(parent)


def _part(session: str, agent_id: str | None) -> str:
    return f"{session}\0{agent_id}" if agent_id else session


def _named(said: str | None) -> str | None:
    if said is None:
        return None
    return hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=SESSION_BYTES).hexdigest()


def _priority(headers: Mapping[str, str], nvext: Mapping[str, Any], agentic: Mapping[str, Any]) -> Priority:
    """Dynamo's and agentic context's priorities are numbers: above 0 is urgent, below 0 may wait."""
    own = headers.get(PRIORITY_HEADER)
    if own is not None:
        return Priority(own)
    said = (
        headers.get("x-dynamo-request-strict-priority"),
        headers.get("x-dynamo-request-priority"),
        nvext.get("strict_priority"),
        nvext.get("priority"),
        agentic.get("priority"),
    )
    number = next((number for value in said if (number := _number(value))), 0)
    return Priority.HIGH if number > 0 else Priority.LOW if number < 0 else Priority.NORMAL


def _deadline_s(headers: Mapping[str, str], agentic: Mapping[str, Any]) -> float | None:
    """The first token of an answer is of no use after the whole answer's deadline."""
    for value, per_s in (
        (headers.get(DEADLINE_HEADER), 1000),
        (headers.get("x-llm-d-slo-ttft-ms"), 1000),
        (agentic.get("deadline_seconds"), 1),
        (agentic.get("deadline"), 1),
    ):
        number = _number(value)
        if number is not None and 0 < number / per_s <= MAX_DEADLINE_MS / 1000:
            return number / per_s
    return None


def _is_last(headers: Mapping[str, str], agentic: Mapping[str, Any]) -> bool:
    own = headers.get(FINAL_HEADER)
    if own is not None:
        return own == "true"
    return headers.get("x-dynamo-session-final", "").lower() == "true" or agentic.get("expected_resume") is False


def _product(user_agent: str) -> str | None:
    """The product's name in a User-Agent, without its version."""
    product = _PRODUCT.match(user_agent)
    return product[0][:MAX_AGENT_LENGTH].lower() if product else None


def _first(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((value for name in names if isinstance(value := values.get(name), str) and value), None)


def _first_number(most: int, *values: Any) -> int | None:
    numbers = (number for value in values if (number := _number(value)) is not None)
    return next((int(number) for number in numbers if 1 <= number <= most), None)


def _number(value: Any) -> float | None:
    """A number, or a short text that is one; not the truth values, and nothing without an end."""
    if isinstance(value, str) and len(value) <= 16:
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 <= value <= 1e9:
        return None
    return value


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
