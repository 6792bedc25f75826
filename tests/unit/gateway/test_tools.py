"""The tool whose result a request brings and the one that an answer calls, in three APIs."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.tools import CHAT, MESSAGES, RESPONSES, answered, called, cleaned


def compact(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def chat_call(name: str, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": '{"a": 1}'}}


def chat_result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "result"}


ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [chat_call("read", "c1"), chat_call("write", "c2")]}
USER = {"role": "user", "content": "hi"}
USES = {
    "role": "assistant",
    "content": [
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "t1", "name": "read", "input": {}},
        {"type": "tool_use", "id": "t2", "name": "write", "input": {}},
    ],
}
RESULT = {"type": "tool_result", "tool_use_id": "t2", "content": "result"}


def function_call(name: str, call_id: str) -> dict[str, Any]:
    return {"type": "function_call", "name": name, "call_id": call_id, "arguments": "{}"}


def function_output(call_id: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": "result"}


@pytest.mark.parametrize(
    ("path", "body", "tool"),
    [
        (CHAT, {"messages": [USER, ASSISTANT, chat_result("c1"), chat_result("c2")]}, "read"),
        (CHAT, {"messages": [USER, ASSISTANT, chat_result("c2")]}, "write"),
        (CHAT, {"messages": [USER, ASSISTANT, chat_result("c1"), USER]}, None),
        (CHAT, {"messages": [USER, ASSISTANT, chat_result("c9")]}, None),
        (CHAT, {"messages": [chat_result("c1")]}, None),
        (CHAT, {"messages": [USER]}, None),
        (MESSAGES, {"messages": [USER, USES, {"role": "user", "content": [RESULT]}]}, "write"),
        (
            MESSAGES,
            {"messages": [USES, {"role": "user", "content": [RESULT, {"type": "text", "text": "go"}]}]},
            "write",
        ),
        (MESSAGES, {"messages": [USES, {"role": "user", "content": "hi"}]}, None),
        (MESSAGES, {"messages": [{"role": "user", "content": [RESULT]}]}, None),
        (RESPONSES, {"input": [function_call("read", "c1"), function_output("c1")]}, "read"),
        (
            RESPONSES,
            {
                "input": [
                    function_call("read", "c1"),
                    function_call("write", "c2"),
                    function_output("c1"),
                    function_output("c2"),
                ]
            },
            "read",
        ),
        (RESPONSES, {"input": [function_call("read", "c1"), function_output("c1"), USER]}, None),
        (RESPONSES, {"input": [function_output("c1")]}, None),
        (RESPONSES, {"input": "text"}, None),
        ("/v1/completions", {"messages": [ASSISTANT, chat_result("c1")]}, None),
    ],
)
def test_a_request_brings_the_result_of_the_first_tool_it_ends_with(
    path: str, body: dict[str, Any], tool: str | None
) -> None:
    assert answered(path, body) == tool


STREAMS = {
    CHAT: [
        {"choices": [{"delta": {"role": "assistant", "content": 'say "tool_calls":[{ "name":"no" }]'}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "read"}}]}}]},
    ],
    MESSAGES: [
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": '"type":"tool_use","name":"no"'}},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_start", "content_block": {"type": "tool_use", "id": "t", "name": "read", "input": {}}},
    ],
    RESPONSES: [
        {"type": "response.output_text.delta", "delta": '"type":"function_call","name":"no"'},
        {"type": "response.output_item.added", "item": {"type": "message", "content": []}},
        {"type": "response.output_item.added", "item": {"type": "function_call", "name": "read", "call_id": "c"}},
    ],
}
BODIES = {
    CHAT: {"choices": [{"message": {"content": "x", "tool_calls": [chat_call("read", "c"), chat_call("write", "d")]}}]},
    MESSAGES: {"content": USES["content"], "stop_reason": "tool_use"},
    RESPONSES: {"output": [{"type": "message", "content": []}, function_call("read", "c")]},
}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_called_tool_is_seen_in_the_event_or_the_body_that_names_it(path: str) -> None:
    *others, naming = [b"event: e\ndata: " + compact(event) + b"\n\n" for event in STREAMS[path]]
    assert [called(path, event) for event in others] == [None, None]
    assert called(path, naming) == called(path, b"".join(others) + naming) == "read"
    assert called(path, compact(BODIES[path])) == "read"


def test_an_answer_without_a_call_names_none() -> None:
    assert called(CHAT, compact({"choices": [{"message": {"content": "x", "tool_calls": []}}]})) is None
    assert called(CHAT, b"data: [DONE]\n\n") is None
    assert called("/v1/completions", compact(BODIES[CHAT])) is None


def test_a_piece_that_breaks_off_names_none() -> None:
    assert called(CHAT, compact(BODIES[CHAT])[:-5]) is None


def test_a_name_is_short_and_plain() -> None:
    assert cleaned("mcp__files/read.v2:a-b") == "mcp__files/read.v2:a-b"
    assert cleaned('a "b"\n\u20ac') == "a__b___"
    assert cleaned("x" * 10_000) == "x" * 64
    assert cleaned("") is cleaned(None) is cleaned(["x"]) is None


values = st.recursive(
    st.none() | st.integers() | st.sampled_from(["tool", "c1", "user", "tool_result", "function_call_output"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "tool_call_id", "id", "function", "type", "call_id"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    path=st.sampled_from([CHAT, MESSAGES, RESPONSES]),
    body=st.dictionaries(st.sampled_from(["messages", "input", "choices", "content", "output"]), values),
)
def test_no_shape_of_a_body_is_too_strange(path: str, body: dict[str, Any]) -> None:
    answered(path, body)
    mark = b'{"tool_calls":[{"type":"tool_use"},{"type":"function_call"}],'
    called(path, mark + compact(body)[1:] if body else mark[:-1] + b"}")
