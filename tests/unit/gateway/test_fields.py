"""The allow-list of what clients may send: what passes untouched, what is dropped, what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.fields import ALLOWED, REFUSED, ROUTES, Refused, check_body, check_headers

CHAT = "/v1/chat/completions"
MAX_CHOICES = 4


def checked(body: dict[str, Any], path: str = CHAT) -> dict[str, Any]:
    result = check_body(path, body, MAX_CHOICES)
    assert isinstance(result, dict), result
    return result


def refusal(body: dict[str, Any], path: str = CHAT) -> Refused:
    result = check_body(path, body, MAX_CHOICES)
    assert isinstance(result, Refused), result
    return result


# -- fields


def test_no_field_is_both_allowed_and_refused() -> None:
    for path, allowed in ALLOWED.items():
        assert not allowed & set(REFUSED), path


def test_an_ordinary_request_passes_unchanged() -> None:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "n": 2,
        "temperature": 0.5,
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
        "response_format": {"type": "json_object"},
        "stream_options": {"include_usage": True},
    }
    assert checked(body) == body


def test_an_unknown_field_is_dropped() -> None:
    assert checked({"model": "m", "surprise": 1, "data_parallel_rank": 3}) == {"model": "m"}


@pytest.mark.parametrize("path", sorted(ALLOWED))
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_is_refused_on_every_path_with_its_reason(path: str, name: str) -> None:
    refused = refusal({name: "x"}, path)
    assert refused == Refused(f"{name} {REFUSED[name]}", name)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_that_is_null_is_dropped(name: str) -> None:
    assert checked({"model": "m", name: None}) == {"model": "m"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", False),
        ("store", 0),
        ("background", False),
        ("use_beam_search", False),
        ("enable_response_messages", False),
        ("return_mm_kwargs", False),
        ("priority", 0),
        ("vllm_xargs", {"agentic_context": {"program_id": "p"}}),
        ("nvext", {"agent_hints": {"osl": 10}}),
    ],
)
def test_a_value_that_asks_for_nothing_passes_and_is_dropped(name: str, value: Any) -> None:
    assert checked({"model": "m", name: value}) == {"model": "m"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store", True),
        ("store", 1),
        ("store", "false"),
        ("store", 0.0),
        ("priority", 1),
        ("priority", -1),
        ("priority", False),
        ("priority", True),
        ("priority", "0"),
        ("background", True),
        ("vllm_xargs", {}),
        ("vllm_xargs", {"agentic_context": {}, "kv_transfer_params": {}}),
        ("vllm_xargs", ["agentic_context"]),
        ("kv_transfer_params", {}),
        ("kv_transfer_params", {"do_remote_prefill": True}),
        ("kv_transfer_params", False),
        ("cache_salt", ""),
        ("use_beam_search", []),
    ],
)
def test_any_other_value_is_refused(name: str, value: Any) -> None:
    assert refusal({name: value}).param == name


def test_names_inside_other_fields_are_not_looked_at() -> None:
    messages = [{"role": "user", "content": "kv_transfer_params", "kv_transfer_params": 1, "unknown": 2}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"priority": {}, "n": 99}}}}]
    metadata = {"cache_salt": "x", "n": 99}
    body = {"messages": messages, "tools": tools, "chat_template_kwargs": metadata}
    assert checked(body) == body


def test_the_body_that_was_given_is_not_changed() -> None:
    body = {"model": "m", "surprise": 1}
    checked(body)
    assert body == {"model": "m", "surprise": 1}


def test_a_response_is_never_stored() -> None:
    for body in ({"input": "hi"}, {"input": "hi", "store": False}):
        assert checked(body, "/v1/responses") == {"input": "hi", "store": False}


# -- bounds


@pytest.mark.parametrize("n", [None, 0, 1, 4, True, -3, 4.0, "4"])
def test_choices_within_the_bound_pass(n: Any) -> None:
    assert checked({"n": n}) == {"n": n}


@pytest.mark.parametrize("n", [5, 10**9, 10**400, 5.0, "5", " 5 ", "1e3", float("inf")])
def test_more_choices_are_refused_however_they_are_written(n: Any) -> None:
    refused = refusal({"n": n})
    assert refused.param == "n"
    assert "at most 4" in refused.message


@pytest.mark.parametrize(
    "prompt", ["text", [], ["a"] * 4, [[1, 2]] * 4, list(range(1000)), [True] * 1000, {"id": "x"}, None]
)
def test_prompts_within_the_bound_pass(prompt: Any) -> None:
    assert checked({"prompt": prompt}, "/v1/completions") == {"prompt": prompt}


@pytest.mark.parametrize("prompt", [["a"] * 5, [[1, 2]] * 5, [None] * 5, [1.5] * 5])
def test_more_prompts_are_refused(prompt: Any) -> None:
    refused = refusal({"prompt": prompt}, "/v1/completions")
    assert refused == Refused("prompt holds 5 prompts; at most 4 are allowed", "prompt")


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("messages", "hi", "a list"),
        ("messages", {}, "a list"),
        ("tools", {}, "a list"),
        ("response_format", "json", "an object"),
        ("response_format", ["json"], "an object"),
        ("structured_outputs", 1, "an object"),
    ],
)
def test_fields_of_the_wrong_shape_are_refused(name: str, value: Any, what: str) -> None:
    assert refusal({name: value}) == Refused(f"{name} must be {what}", name)


@pytest.mark.parametrize("tool", [1, {}, {"function": "f"}, {"function": {}}, {"function": {"name": 1}}])
def test_a_chat_tool_without_a_named_function_is_refused_with_its_place(tool: Any) -> None:
    good = {"type": "function", "function": {"name": "f"}}
    assert refusal({"tools": [good, tool]}).param == "tools.1"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(sorted({*REFUSED, *ALLOWED[CHAT], *ALLOWED["/v1/completions"]})) | st.text(max_size=8)


@given(path=st.sampled_from(sorted(ALLOWED)), body=st.dictionaries(names, values, max_size=6))
def test_whatever_comes_in_only_allowed_fields_come_out_as_they_were(path: str, body: dict[str, Any]) -> None:
    result = check_body(path, body, MAX_CHOICES)
    if isinstance(result, Refused):
        assert result.message
        return
    if path == "/v1/responses":
        assert result.pop("store") is False
    assert set(result) <= ALLOWED[path]
    assert result == {name: value for name, value in body.items() if name in ALLOWED[path]}


# -- headers and routes


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer x", "x-anything": "y"},
        {"x-vllm-priority": "0"},
        {"x-request-id": "a" * 128},
        {"x-request-id": "A-b_c.9"},
    ],
)
def test_ordinary_headers_pass(headers: dict[str, str]) -> None:
    assert check_headers(headers) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-data-parallel-rank", "0"),
        ("x-data-parallel-rank", ""),
        ("x-vllm-priority", "1"),
        ("x-vllm-priority", "-1"),
        ("x-vllm-priority", ""),
        ("x-request-id", ""),
        ("x-request-id", "a" * 129),
        ("x-request-id", "a b"),
        ("x-request-id", "a\n"),
        ("x-request-id", "../status"),
        ("x-request-id", "é"),
    ],
)
def test_headers_that_would_steer_an_engine_are_refused(name: str, value: str) -> None:
    refused = check_headers({name: value})
    assert refused is not None
    assert name.lower() in refused.message.lower()


def test_every_path_with_a_body_is_a_route_and_nothing_else_takes_one() -> None:
    assert {path for method, path in ROUTES if method == "POST"} == set(ALLOWED)
