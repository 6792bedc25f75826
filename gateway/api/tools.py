"""Owns which tools requests and answers name: the one whose result a request brings, and the one an answer calls. Pure.

Of several at once the first counts. A tool's name is the client's: it is shortened, and what is no letter, digit or one
of `_.:/-` in it becomes `_`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

MAX_NAME_LENGTH = 64
MAX_ITEMS = 256
"""So many of the last items of a conversation are looked at."""

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
CALL_MARKS: Mapping[str, bytes] = {
    CHAT: b'"tool_calls":[{',
    MESSAGES: b'"type":"tool_use"',
    RESPONSES: b'"type":"function_call"',
}
"""By path, what is in each piece of a response that names a called tool. Not in what a model writes: there, quotation
marks are escaped."""

_UNUSUAL = re.compile(r"[^A-Za-z0-9_.:/-]")


def cleaned(name: Any) -> str | None:
    return _UNUSUAL.sub("_", name[:MAX_NAME_LENGTH]) if isinstance(name, str) and name else None


def answered(path: str, body: Mapping[str, Any]) -> str | None:
    """The tool whose result a request ends with."""
    if path == CHAT:
        return cleaned(_answered_in_chat(_objects(body.get("messages"))))
    if path == MESSAGES:
        return cleaned(_answered_in_messages(_objects(body.get("messages"))))
    if path == RESPONSES:
        return cleaned(_answered_in_responses(_objects(body.get("input"))))
    return None


def called(path: str, piece: bytes) -> str | None:
    """The tool that is called in a piece of a response: a whole JSON body, or one or more whole events."""
    mark = CALL_MARKS.get(path)
    if mark is None or mark not in piece:
        return None
    lines = piece.split(b"\n")
    texts = [piece] if piece.startswith(b"{") else [line[5:] for line in lines if line.startswith(b"data:")]
    return next((name for text in texts if mark in text for name in _called_in(path, text)), None)


def _objects(items: Any) -> list[dict[str, Any]]:
    """The last items of a list, up to the last one that is no object."""
    found: list[dict[str, Any]] = []
    for item in reversed(items[-MAX_ITEMS:] if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            break
        found.append(item)
    return found[::-1]


def _answered_in_chat(messages: list[dict[str, Any]]) -> Any:
    call_id: Any = None
    for message in reversed(messages):
        if message.get("role") == "tool":
            call_id = message.get("tool_call_id")
            continue
        calls = _objects(message.get("tool_calls")) if call_id is not None else ()
        return next((_object(call.get("function")).get("name") for call in calls if call.get("id") == call_id), None)
    return None


def _answered_in_messages(messages: list[dict[str, Any]]) -> Any:
    if not messages or messages[-1].get("role") != "user":
        return None
    results = [block for block in _objects(messages[-1].get("content")) if block.get("type") == "tool_result"]
    if not results or len(messages) < 2:
        return None
    call_id, calls = results[0].get("tool_use_id"), _objects(messages[-2].get("content"))
    return next((b.get("name") for b in calls if b.get("type") == "tool_use" and b.get("id") == call_id), None)


def _answered_in_responses(items: list[dict[str, Any]]) -> Any:
    call_id: Any = None
    for position in range(len(items) - 1, -1, -1):
        if items[position].get("type") != "function_call_output":
            calls = items[: position + 1] if call_id is not None else []
            break
        call_id = items[position].get("call_id")
    else:
        return None
    calls = [item for item in calls if item.get("type") == "function_call" and item.get("call_id") == call_id]
    return calls[-1].get("name") if calls else None


def _called_in(path: str, text: bytes) -> Iterator[str]:
    try:
        data = _object(msgspec.json.decode(text))
    except msgspec.DecodeError:
        return
    for call in _calls(path, data):
        if name := cleaned(call.get("name")):
            yield name


def _calls(path: str, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if path == CHAT:
        for choice in _objects(data.get("choices")):
            message = _object(choice.get("message") or choice.get("delta"))
            yield from (_object(call.get("function")) for call in _objects(message.get("tool_calls")))
        return
    one, several, kind = (
        ("content_block", "content", "tool_use") if path == MESSAGES else ("item", "output", "function_call")
    )
    for item in (_object(data.get(one)), *_objects(data.get(several))):
        if item.get("type") == kind:
            yield item


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
