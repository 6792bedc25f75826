"""Bad input gets a clear answer, in the shape its client expects, and the server does not notice."""

import json
import select
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.api.live import MAX_BODY_BYTES, MODEL, Live, is_anthropic_error, is_openai_error

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
VALID: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": HELLO, "max_tokens": 4},
    COMPLETIONS: {"model": MODEL, "prompt": "Hello", "max_tokens": 4},
    RESPONSES: {"model": MODEL, "input": "Hello", "max_output_tokens": 4},
    MESSAGES: {"model": MODEL, "messages": HELLO, "max_tokens": 4},
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
HANDLE = {"do_remote_prefill": True, "remote_block_ids": [[1]], "remote_engine_id": "x", "remote_request_id": "y"}


@pytest.fixture(autouse=True, scope="module")
def unharmed(live: Live):
    """Whatever this module sends, engines and answers are the same afterwards."""
    live.is_unharmed()
    yield
    live.is_unharmed()


def refused(live: Live, path: str, body: Any, status: int = 400, stream: bool = False, **request: Any) -> str:
    """Sends a bad body, checks the error's status and shape, and returns its message."""
    if isinstance(body, dict):
        request["json"] = body | ({"stream": True} if stream else {})
    else:
        request["content"] = body
        request.setdefault("headers", {})["content-type"] = "application/json"
    response = live.http.post(path, **request)
    assert response.status_code == status, f"{path} {str(body)[:300]}: {response.status_code} {response.text[:500]}"
    error = response.json()
    if path.startswith(MESSAGES):
        assert is_anthropic_error(error), error
    else:
        assert is_openai_error(status, error), error
    return error["error"]["message"]


STREAM = pytest.mark.parametrize("stream", [False, True])
EVERY_PATH = pytest.mark.parametrize("path", list(VALID))


# -- bodies


@EVERY_PATH
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"5", b"{'a': 1}", b'{"a": NaN}', b'{"temperature": Infinity}',
        b"\xff\xfe\x00", b'{"model": "\\ud800"}', b'{"temperature": 1e999}', b'{"model": 1}{"model": 2}',
    ],
)  # fmt: skip
def test_malformed_json_is_a_400(live, path, body):
    assert "JSON" in refused(live, path, body)


@EVERY_PATH
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_nested_too_deeply_is_a_400(live, path, opening):
    refused(live, path, opening * 20_000)
    closing = b"]" if opening == b"[" else b"}"
    deep = opening * 5_000 + b"1" + closing * 5_000
    refused(live, path, b'{"model": "baton-mini", "messages": ' + deep + b"}")


@pytest.mark.parametrize("depth", [20, 100, 400])
def test_a_schema_nested_deeply_is_answered_not_suffered(live, depth):
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    response_format = {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}
    body = json.dumps(VALID[CHAT] | {"response_format": response_format})
    response = live.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code < 500, response.text[:300]


@EVERY_PATH
def test_a_body_over_the_limit_is_a_413_whether_declared_or_chunked(live, path):
    large = json.dumps({"model": MODEL, "prompt": "x" * MAX_BODY_BYTES}).encode()
    assert str(MAX_BODY_BYTES) in refused(live, path, large, 413)
    chunked = (large[start : start + 8192] for start in range(0, len(large), 8192))
    refused(live, path, chunked, 413)


def test_an_endless_chunked_body_is_answered_at_the_limit(live):
    address = urlsplit(live.url)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: baton\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"x" * 16_384
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(head.encode())
        sent = 0
        while not select.select([connection], [], [], 0.01)[0]:
            assert sent < 64 * MAX_BODY_BYTES, "the server reads on far beyond its limit"
            connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            sent += len(chunk)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


# -- what reaches the KV-transfer layer (invariant I5)


@STREAM
@EVERY_PATH
@pytest.mark.parametrize("value", [HANDLE, {}, json.dumps(HANDLE), [HANDLE], 1, True, "x", 0, False, "", []])
@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
def test_transfer_parameters_are_refused_in_every_form(live, path, name, value, stream):
    assert name in refused(live, path, VALID[path] | {name: value}, stream=stream)


@EVERY_PATH
@pytest.mark.parametrize("inner", [HANDLE, json.dumps(HANDLE), [HANDLE], "x", 1])
def test_transfer_parameters_inside_engine_arguments_are_refused(live, path, inner):
    for outer in ("vllm_xargs", "extra_args", "extra_body", "sampling_params"):
        body = VALID[path] | {outer: {"kv_transfer_params": inner}}
        if outer == "vllm_xargs":
            assert "vllm_xargs" in refused(live, path, body)
        else:
            assert live.http.post(path, json=body).status_code == 200, f"{outer} is not known and is dropped"


@EVERY_PATH
def test_transfer_parameters_in_other_fields_change_no_placement_and_move_nothing(live, path):
    nested = {"kv_transfer_params": HANDLE}
    spots: list[dict] = [{"metadata": {"kv_transfer_params": "x"}}, {"chat_template_kwargs": nested}]
    if path == CHAT:
        spots += [
            {"messages": [HELLO[0] | nested]},
            {"structured_outputs": {"regex": "a+", **nested}},
            {"stream_options": {"include_usage": True, **nested}, "stream": True},
            {"tools": [TOOL | nested]},
        ]
    for spot in spots:
        response = live.http.post(path, json=VALID[path] | spot)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 200:
            outcome = live.receipt(response)["outcome"]
            assert outcome["status"] == "finished"
            assert outcome["faults"] == []


# -- headers


@EVERY_PATH
@pytest.mark.parametrize(
    "headers",
    [
        {"X-data-parallel-rank": "0"}, {"X-Data-Parallel-Rank": "7"}, {"x-data-parallel-rank": "x"},
        {"X-Vllm-Priority": "1"}, {"X-Vllm-Priority": "-1"}, {"X-Vllm-Priority": "high"}, {"X-Vllm-Priority": ""},
        {"X-Request-Id": "a" * 200}, {"X-Request-Id": "a b"}, {"X-Request-Id": ""},
    ],
)  # fmt: skip
def test_headers_that_steer_an_engine_are_refused(live, path, headers):
    message = refused(live, path, VALID[path], headers=headers)
    assert next(iter(headers)).lower() in message.lower()


def test_harmless_headers_are_let_through(live):
    headers = {"X-Vllm-Priority": "0", "X-Request-Id": "turn-1.a_B", "X-Session-ID": "s"}
    assert live.http.post(CHAT, json=VALID[CHAT], headers=headers).status_code == 200


def test_a_content_type_that_is_not_json_is_refused(live):
    response = live.http.post(CHAT, content=json.dumps(VALID[CHAT]), headers={"content-type": "text/plain"})
    assert response.status_code in (400, 415)
    assert is_openai_error(response.status_code, response.json())


# -- what Baton does not do


@STREAM
@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (RESPONSES, {"background": True}),
        (RESPONSES, {"store": True}),
        (RESPONSES, {"previous_response_id": "resp_1"}),
        (RESPONSES, {"previous_input_messages": []}),
        (CHAT, {"use_beam_search": True}),
        (CHAT, {"use_beam_search": "true"}),
        (CHAT, {"use_beam_search": 1}),
        (COMPLETIONS, {"use_beam_search": True, "n": 4}),
        (CHAT, {"priority": 5}),
        (CHAT, {"priority": -5}),
        (CHAT, {"cache_salt": "salt"}),
        (CHAT, {"request_id": "mine"}),
        (CHAT, {"chat_template": "{{ 1 / 0 }}"}),
        (CHAT, {"mm_processor_kwargs": {}}),
        (CHAT, {"store": True}),
        (COMPLETIONS, {"prompt_embeds": "AAAA"}),
        (MESSAGES, {"vllm_xargs": {"a": 1}}),
        (MESSAGES, {"cache_salt": "salt"}),
    ],
)
def test_what_is_not_supported_says_so(live, path, wrong, stream):
    message = refused(live, path, VALID[path] | wrong, stream=stream)
    assert next(iter(wrong)) in message


@STREAM
@EVERY_PATH
def test_another_model_or_a_lora_name_is_a_404(live, path, stream):
    for name in ("gpt-4", "my-lora", f"{MODEL}:lora", "../../etc/passwd"):
        refused(live, path, VALID[path] | {"model": name}, 404, stream)


@STREAM
def test_media_parts_are_a_400(live, stream):
    url = "data:image/png;base64,iVBORw0KGgo="
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": url}},
    ):
        refused(live, CHAT, VALID[CHAT] | {"messages": [{"role": "user", "content": [part]}]}, stream=stream)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    refused(live, MESSAGES, VALID[MESSAGES] | {"messages": [{"role": "user", "content": [image]}]}, stream=stream)
    part = {"type": "input_image", "image_url": url}
    refused(live, RESPONSES, VALID[RESPONSES] | {"input": [{"role": "user", "content": [part]}]}, stream=stream)


# -- values


@STREAM
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_tokens", [0, -1, 8193, 10**9, 10**30, "many", 1.5, [], {}]),
        ("max_completion_tokens", [0, -1, 10**9, "many"]),
        ("n", [0, -1, 17, 10**6, 1e9, "1000000", 10**400, "two", [], 1.5]),
        ("temperature", [-1, -1e-9, 2.1, 1e300, "hot", [], {}]),
        ("top_p", [0, -1, 1.1, "x"]),
        ("top_k", [-5, "x", 1.5]),
        ("min_p", [-1, 2, "x"]),
        ("seed", [10**30, "x", 1.5]),
        ("min_tokens", [-1, 10**6, 10**30, "x"]),
        ("presence_penalty", [-3, 3, "x"]),
        ("frequency_penalty", [-3, 3, "x"]),
        ("repetition_penalty", [0, -1, "x"]),
        ("logit_bias", [{"x": 1}, {"999999": 1}, {"-1": 1}, [], "x", {"1": "x"}]),
        ("logprobs", ["many", [], 2]),
        ("top_logprobs", [-2, 21, "x", [], 5]),
        ("prompt_logprobs", [-2, 21, "x", []]),
        ("stop", [5, [5], "", [""], {}, ["a"] * 1000]),
        ("stop_token_ids", [[-1], [10**20], "x", [1.5]]),
        ("allowed_token_ids", [[], [-1], [10**9], "x"]),
        ("bad_words", [[""], "x", [5]]),
        ("logprob_token_ids", [[1], [-5], "x"]),
        ("truncate_prompt_tokens", [-5, 10**9, "x"]),
        ("response_format", ["json", [], 5, {"type": "nope"}, {"type": "json_schema"}, {}]),
        ("structured_outputs", ["x", [], 5, {}, {"regex": "("}, {"choice": []}, {"choice": 5}, {"json": "nope"},
                                {"grammar": "nope"}, {"structural_tag": "x"}, {"regex": "a", "choice": ["a"]}]),
        ("tools", [5, "x", [], [5], [{}], [{"type": "function"}], {"a": 1}, [{"function": {"name": 5}}],
                   [{"type": "function", "function": {"name": "f", "parameters": 5}}]]),
        ("stream_options", [5, "x", []]),
        ("chat_template_kwargs", [5, "x", [], {"chat_template": "{{ 1 / 0 }}"}]),
        ("messages", [[], 5, "x", None, {}, [5], [None], [[]], [{}], [{"role": 5}], [{"role": "user", "content": 5}],
                      [{"role": "user", "content": [{"type": "nope"}]}], [{"role": "user", "content": [5]}],
                      [{"role": "assistant", "content": "x", "tool_calls": 5}],
                      [{"role": "assistant", "content": "x", "tool_calls": [5]}]]),
        ("model", [5, [], {}, True]),
        ("user", [5, []]),
        ("session_id", [5, []]),
        ("thinking_token_budget", [5, "x"]),
        ("repetition_detection", [5, "x", []]),
        ("stream_interval", [0, -1, "x"]),
        ("echo", [5, "x"]),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_a_400_of_the_chat_route(live, name, values, stream):
    for value in values:
        refused(live, CHAT, VALID[CHAT] | {name: value}, stream=stream)


@STREAM
@pytest.mark.parametrize(
    ("path", "name", "values"),
    [
        (COMPLETIONS, "prompt", [[], "", None, {}, 5, [[]], [5, "x"], [-1], [10**9], [10**30], [1.5], ["a"] * 17,
                                 [[1]] * 17, [1] * 8193, "word " * 9000]),
        (COMPLETIONS, "logprobs", [-1, 1000, "x"]),
        (COMPLETIONS, "suffix", ["x"]),
        (COMPLETIONS, "n", [0, 17, "1000000"]),
        (RESPONSES, "input", [[], 5, None, [5], [{}], [{"type": "item_reference", "id": "x"}], {}]),
        (RESPONSES, "max_output_tokens", [-1, 0, 10**9, "x"]),
        (RESPONSES, "text", ["x", 5, [], {"format": {"type": "json_schema", "name": "x",
                                                     "schema": {"type": "nonsense"}}}]),
        (RESPONSES, "tools", [5, "x", [5], [{}]]),
        (RESPONSES, "tool_choice", [{"type": "function", "name": "missing"}, 5]),
        (RESPONSES, "prompt", [{"id": "x"}, 5]),
        (RESPONSES, "instructions", [5, {}]),
        (RESPONSES, "reasoning", [{"effort": "enormous"}, 5]),
        (MESSAGES, "messages", [[], 5, "x", [5], [{"role": "tool", "content": "x"}]]),
        (MESSAGES, "max_tokens", [0, -1, 10**9, "x", None]),
        (MESSAGES, "system", [5, {}]),
        (MESSAGES, "tools", [5, [5], [{"name": "f"}], [{}]]),
        (MESSAGES, "tool_choice", [{"type": "tool"}, {"type": "nope"}, 5]),
        (MESSAGES, "thinking", [{"type": "enabled", "budget_tokens": 1024}, 5]),
        (MESSAGES, "output_config", [{"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}, 5]),
        (MESSAGES, "stop_sequences", [[""], 5]),
        (MESSAGES, "top_k", [-7, "x"]),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_a_400_of_the_other_routes(live, path, name, values, stream):
    for value in values:
        refused(live, path, VALID[path] | {name: value}, stream=stream)


@STREAM
def test_a_number_that_no_engine_can_hold_is_a_400(live, stream):
    for path in (CHAT, COMPLETIONS, RESPONSES, MESSAGES):
        refused(live, path, VALID[path] | {"temperature": 1.0, "top_k": 10**20}, stream=stream)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/tokenize", {"messages": 5}),
        ("/tokenize", {"messages": HELLO, "tools": [{}]}), ("/tokenize", {"prompt": "x", "chat_template": "{{ x }}"}),
        ("/detokenize", {}), ("/detokenize", {"tokens": "x"}), ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**62]}), ("/detokenize", {"tokens": [2**70]}),
        ("/v1/messages/count_tokens", {"model": MODEL, "messages": 5}),
        ("/v1/messages/count_tokens", {"model": MODEL}),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_a_400_of_the_routes_without_engines(live, path, body):
    refused(live, path, body)


@STREAM
@pytest.mark.parametrize(
    "schema",
    [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": 5}, {"properties": 5}, {"type": "string", "pattern": "("}],
)
def test_a_bad_json_schema_is_a_400(live, schema, stream):
    response_format = {"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}}
    refused(live, CHAT, VALID[CHAT] | {"response_format": response_format}, stream=stream)


@STREAM
@pytest.mark.parametrize(
    "choice", ["nope", 5, {}, {"type": "function"}, {"type": "function", "function": {"name": "missing"}}]
)
def test_a_bad_tool_choice_is_a_400(live, choice, stream):
    refused(live, CHAT, VALID[CHAT] | {"tools": [TOOL], "tool_choice": choice}, stream=stream)
    refused(live, CHAT, VALID[CHAT] | {"tool_choice": choice}, stream=stream)
    refused(live, CHAT, VALID[CHAT] | {"tools": [{"type": "function"}], "tool_choice": choice}, stream=stream)


@STREAM
@EVERY_PATH
def test_a_prompt_longer_than_the_context_is_a_400_that_says_so(live, path, stream):
    field = {CHAT: "messages", COMPLETIONS: "prompt", RESPONSES: "input", MESSAGES: "messages"}[path]
    text = "word " * 9000
    value = [{"role": "user", "content": text}] if field == "messages" else text
    assert "8192" in refused(live, path, VALID[path] | {field: value}, stream=stream)


def test_a_field_that_nobody_knows_is_dropped(live):
    body = VALID[CHAT] | {"nobody_knows": {"deep": [1, 2, {"x": None}]}, "__class__": "x", "": 1}
    assert live.http.post(CHAT, json=body).status_code == 200


def test_a_response_input_that_vllm_stumbles_over_is_a_400(live):
    refusal = {"type": "message", "id": "m", "status": "completed", "role": "assistant"}
    refusal["content"] = [{"type": "refusal", "refusal": "no"}]
    body = {"model": "baton-mini", "input": [refusal, {"role": "user", "content": "Hello"}], "max_output_tokens": 4}
    response = live.http.post("/v1/responses", json=body)
    assert response.status_code == 400, response.text
    assert "cannot be read" in response.json()["error"]["message"]
