"""What requests say of themselves: in which headers and fields, in which dialect, and what is made of nonsense."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.fields import Refused, check_headers
from gateway.api.hints import PARENT_HEADERS, SESSION_HEADERS, read_hints
from gateway.routing.types import Hints, Priority

CHAT = "/v1/chat/completions"


def hints(headers: dict[str, str] | None = None, body: dict[str, Any] | None = None, path: str = "") -> Hints:
    found = read_hints(headers or {}, path, body)
    assert isinstance(found, Hints), found
    return found


def nvext(**said: Any) -> dict[str, Any]:
    return {"nvext": {"agent_hints": said}}


def agentic(**said: Any) -> dict[str, Any]:
    return {"vllm_xargs": {"agentic_context": said}}


NAME = hints({"x-baton-session": "mine"}).session

# -- which session


@pytest.mark.parametrize("header", SESSION_HEADERS)
def test_agents_say_which_session_a_request_belongs_to(header: str) -> None:
    assert hints({header: "mine"}).session == NAME != hints({header: "other"}).session
    assert hints({header: ""}).session is None


@pytest.mark.parametrize("header", PARENT_HEADERS)
def test_agents_say_which_session_has_started_theirs(header: str) -> None:
    assert hints({header: "mine", "x-session-id": "child"}).parent == NAME
    assert hints({header: ""}).parent is None


def test_a_session_is_not_its_own_parent() -> None:
    assert hints({"x-session-id": "mine", "x-parent-session-id": "mine"}) == Hints(session=NAME)


def test_a_body_names_a_session_as_a_header_does_and_the_header_comes_first() -> None:
    for body in ({"session_id": "mine"}, agentic(program_id="mine")):
        assert hints({}, body).session == NAME
        assert hints({"x-session-id": "other"}, body).session == hints({"x-session-id": "other"}).session
    assert hints({}, {"prompt_cache_key": "mine"}).session is None
    assert hints({}, agentic(program_id="child", parent_program_id="mine")).parent == NAME


def test_baton_s_own_name_of_a_session_comes_first_and_none_is_kept_as_it_was_sent() -> None:
    long = "é" * 10_000
    session = hints({"x-session-id": "theirs", "x-baton-session": long}).session
    assert session == hints({"x-baton-session": long}).session
    assert session is not None
    assert len(session) == 32


@pytest.mark.parametrize("value", ["", 5, None, ["mine"], {"a": 1}])
def test_a_body_s_session_that_is_no_name_is_none(value: object) -> None:
    assert hints({}, {"session_id": value}).session is None
    assert hints({}, {"session_id": "\ud800"}).session is not None


def test_sub_agents_of_claude_code_are_sessions_of_their_own_and_know_their_parent() -> None:
    root = {"x-claude-code-session-id": "mine"}
    child = {**root, "x-claude-code-agent-id": "a1"}
    grandchild = {**root, "x-claude-code-agent-id": "a2", "x-claude-code-parent-agent-id": "a1"}
    assert hints(root) == Hints(session=NAME)
    assert hints(child).parent == NAME
    assert hints(grandchild).parent == hints(child).session
    assert len({hints(headers).session for headers in (root, child, grandchild)}) == 3


# -- how urgent


@pytest.mark.parametrize(
    ("headers", "body", "priority"),
    [
        ({}, {}, Priority.NORMAL),
        ({"x-baton-priority": "low"}, {}, Priority.LOW),
        ({"x-baton-priority": "high", "x-other": "low"}, nvext(priority=-5), Priority.HIGH),
        ({"x-baton-priority": "normal"}, nvext(priority=5), Priority.NORMAL),
        ({"x-dynamo-request-priority": "-1"}, nvext(priority=5), Priority.LOW),
        ({}, nvext(priority=5), Priority.HIGH),
        ({}, nvext(priority=0, strict_priority=1), Priority.HIGH),
        ({}, agentic(priority=-3), Priority.LOW),
        ({}, nvext(priority=True), Priority.NORMAL),
        ({}, nvext(priority="soon"), Priority.NORMAL),
        ({}, nvext(priority=1e300), Priority.NORMAL),
    ],
)
def test_a_client_says_how_urgent_its_request_is(
    headers: dict[str, str], body: dict[str, Any], priority: Priority
) -> None:
    assert hints(headers, body).priority is priority


@pytest.mark.parametrize(
    ("headers", "body", "deadline_s"),
    [
        ({}, {}, None),
        ({"x-baton-ttft-deadline-ms": "1"}, {}, 0.001),
        ({"x-baton-ttft-deadline-ms": "3600000"}, agentic(deadline_seconds=5), 3600.0),
        ({"x-llm-d-slo-ttft-ms": "1500.5"}, {}, 1.5005),
        ({"x-llm-d-slo-ttft-ms": "soon"}, agentic(deadline_seconds=2.5), 2.5),
        ({}, agentic(deadline=7), 7.0),
        ({}, agentic(deadline_seconds=-1), None),
        ({}, agentic(deadline_seconds=3601), None),
        ({}, agentic(deadline_seconds=[1]), None),
    ],
)
def test_a_client_says_when_its_first_token_is_due(
    headers: dict[str, str], body: dict[str, Any], deadline_s: float | None
) -> None:
    assert hints(headers, body).ttft_deadline_s == deadline_s


# -- what comes next


@pytest.mark.parametrize(
    ("headers", "body", "output_tokens"),
    [
        ({"x-baton-output-tokens": "100"}, nvext(osl=5), 100),
        ({}, nvext(osl=5), 5),
        ({}, agentic(expected_output_length=2048), 2048),
        ({}, {**nvext(osl=0), **agentic(expected_output_tokens=7)}, 7),
        ({}, nvext(osl=10**30), None),
        ({}, nvext(osl=-1), None),
    ],
)
def test_a_client_says_how_long_its_answer_will_be(
    headers: dict[str, str], body: dict[str, Any], output_tokens: int | None
) -> None:
    assert hints(headers, body).output_tokens == output_tokens


@pytest.mark.parametrize(
    ("headers", "body", "is_last"),
    [
        ({}, {}, False),
        ({"x-baton-session-final": "true"}, {}, True),
        ({"x-baton-session-final": "false", "x-dynamo-session-final": "true"}, {}, False),
        ({"x-dynamo-session-final": "True"}, {}, True),
        ({"x-dynamo-session-final": "perhaps"}, {}, False),
        ({}, agentic(expected_resume=False), True),
        ({}, agentic(expected_resume=0), False),
    ],
)
def test_a_client_says_that_a_session_ends(headers: dict[str, str], body: dict[str, Any], is_last: bool) -> None:
    assert hints(headers, body).is_last is is_last


@pytest.mark.parametrize(
    ("value", "is_retry"), [("0", False), ("1", True), ("12", True), ("-1", False), ("", False), ("again", False)]
)
def test_a_client_says_that_it_sends_a_request_again(value: str, is_retry: bool) -> None:
    assert hints({"x-stainless-retry-count": value}).is_retry is is_retry
    assert not hints({}).is_retry


@pytest.mark.parametrize(
    ("headers", "agent"),
    [
        ({}, None),
        ({"user-agent": "claude-cli/2.1.0 (external, cli)"}, "claude-cli"),
        ({"user-agent": "OpenAI/Python 3.54.0"}, "openai"),
        ({"user-agent": "x" * 1000}, "x" * 32),
        ({"user-agent": "(nothing)"}, None),
        ({"user-agent": "curl/8", "x-baton-agent": "researcher"}, "researcher"),
    ],
)
def test_the_agent_is_the_product_that_calls(headers: dict[str, str], agent: str | None) -> None:
    assert hints(headers).agent == agent


def test_the_tool_is_the_one_whose_result_the_body_brings_unless_a_header_names_it() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "x"}]
    assert hints({}, {"messages": messages}, CHAT).tool == "look"
    assert hints({"x-baton-tool": "test"}, {"messages": messages}, CHAT).tool == "test"


# -- nonsense


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "1e3", " 1", "soon", "3600001", "9" * 100, "\u0661", "0x10"])
def test_a_deadline_that_is_no_time_is_refused(value: str) -> None:
    refused = read_hints({"x-baton-ttft-deadline-ms": value})
    assert isinstance(refused, Refused)
    assert "x-baton-ttft-deadline-ms must be a whole number of milliseconds, 1 to 3600000" in refused.message


@pytest.mark.parametrize("value", ["", "urgent", "HIGH", "1", "high "])
def test_a_priority_that_does_not_exist_is_refused(value: str) -> None:
    assert read_hints({"x-baton-priority": value}) == Refused("the header x-baton-priority must be low, normal, high")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-baton-output-tokens", "0"),
        ("x-baton-output-tokens", "1000001"),
        ("x-baton-session-final", "yes"),
        ("x-baton-tool", ""),
        ("x-baton-tool", "a b"),
        ("x-baton-agent", "a" * 65),
    ],
)
def test_baton_s_own_headers_must_be_right(header: str, value: str) -> None:
    refused = read_hints({header: value})
    assert isinstance(refused, Refused)
    assert refused.message.startswith(f"the header {header} must be ")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
said = st.dictionaries(
    st.sampled_from(
        ["priority", "strict_priority", "osl", "program_id", "parent_program_id", "deadline", "deadline_seconds",
         "expected_output_length", "expected_resume"]
    ),
    anything,
)  # fmt: skip
foreign = st.sampled_from(
    ["x-llm-d-slo-ttft-ms", "x-dynamo-request-priority", "x-dynamo-session-final", "user-agent", "x-session-id",
     "x-claude-code-session-id", "x-claude-code-agent-id", "x-parent-session-id"]
)  # fmt: skip


@given(
    headers=st.dictionaries(foreign, st.text(max_size=10)),
    body=st.fixed_dictionaries(
        {},
        optional={
            "nvext": anything | st.fixed_dictionaries({"agent_hints": anything | said}),
            "vllm_xargs": anything | st.fixed_dictionaries({"agentic_context": anything | said}),
            "session_id": anything,
            "messages": anything,
        },
    ),
)
def test_whatever_others_say_is_bounded_and_never_refused(headers: dict[str, str], body: dict[str, Any]) -> None:
    found = hints(headers, body, CHAT)
    assert check_headers(headers) is None
    assert found.output_tokens is None or 1 <= found.output_tokens <= 1_000_000
    assert found.ttft_deadline_s is None or 0 < found.ttft_deadline_s <= 3600
    assert {len(name) for name in (found.session, found.parent) if name is not None} <= {32}
    assert all(len(name) <= 64 for name in (found.tool, found.agent) if name is not None)
