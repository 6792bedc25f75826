"""Whatever a client sends, nothing of ours fails: no 5xx, both engines live and answer correctly, no KV block is lost.

Two sources of input: bodies that follow the published schema (and bodies that nearly do), and valid bodies in which
one to three fields, known or not, hold random JSON.
"""

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gateway.api import fields
from tests.api.live import MODEL, Live, is_anthropic_error, is_openai_error

NUM_SCHEMA_EXAMPLES = 60
NUM_FIELD_EXAMPLES = 2000
LONGEST_ANSWER_TOKENS = 8

HELLO = [{"role": "user", "content": "Hello"}]
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": HELLO, "max_tokens": 4},
    "/v1/completions": {"model": MODEL, "prompt": "Hello", "max_tokens": 4},
    "/v1/responses": {"model": MODEL, "input": "Hello", "max_output_tokens": 4},
    "/v1/messages": {"model": MODEL, "messages": HELLO, "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": MODEL, "messages": HELLO},
    "/tokenize": {"model": MODEL, "prompt": "Hello"},
    "/detokenize": {"model": MODEL, "tokens": [5, 6, 7]},
}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
UNKNOWN = ("kv", "remote_block_ids", "extra_args", "sampling_params", "lora_request", "__proto__", "Ünknown", "")


@pytest.fixture(scope="module", autouse=True)
def unharmed(live: Live):
    live.is_unharmed()
    yield
    live.is_unharmed()


def answered(live: Live, path: str, body: Any) -> None:
    """Sends a body; any answer will do, but a failure of ours, and an error in a shape its client does not expect."""
    response = live.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    where = f"{path} {json.dumps(body)[:2000]} -> {response.status_code} {response.text[:500]}"
    assert response.status_code < 500, where
    if response.status_code >= 400:
        right = is_anthropic_error(response.json()) if "messages" in path else None
        assert right or is_openai_error(response.status_code, response.json()), where


def bounded(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body with an answer that is short if it is one at all: what is fuzzed is the gateway, not patience."""
    limits = [name for name in LIMITS if name in body]
    for name in limits:
        value = body[name]
        if value is None or (isinstance(value, int | float | str) and _number(value) > LONGEST_ANSWER_TOKENS):
            body[name] = LONGEST_ANSWER_TOKENS
    if not limits and path in VALID and "tokens" not in path and "tokenize" not in path:
        body["max_output_tokens" if path == "/v1/responses" else "max_tokens"] = LONGEST_ANSWER_TOKENS
    return body


def _number(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return float("inf")


# -- random values in every field

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**3), 10**3)
    | st.sampled_from([0, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["auto", "required", "none", "json_object", "json_schema", "function", "(", "a+", "x" * 2000])
)
KEYS = st.text(max_size=6) | st.sampled_from(
    ["type", "function", "name", "parameters", "json_schema", "schema", "regex", "choice", "grammar", "role", "content",
     "text", "include_usage", "kv_transfer_params", "tool_calls", "image_url", "structural_tag", "format"]
)  # fmt: skip
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)


def field_names(path: str) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(fields.ALLOWED[path])) | st.sampled_from(sorted(fields.REFUSED) + list(UNKNOWN))


BODIES = st.sampled_from(sorted(VALID)).flatmap(
    lambda path: st.tuples(st.just(path), st.dictionaries(field_names(path), JSON, min_size=1, max_size=3))
)


@settings(
    max_examples=NUM_FIELD_EXAMPLES, derandomize=True, deadline=None, database=None,
    phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(request=BODIES)
def test_random_values_in_any_field_never_fail_the_server(live, request):
    path, changes = request
    answered(live, path, bounded(path, VALID[path] | changes))


# -- bodies by the published schema


@pytest.fixture(scope="module")
def published(live: Live):
    document = httpx.get(f"{live.url}/openapi.json", timeout=30).json()
    assert set(VALID) <= set(document["paths"]), "the schema publishes every route that takes a body"
    return schemathesis.openapi.from_dict(document)


@pytest.mark.parametrize("path", sorted(VALID))
def test_bodies_by_the_published_schema_never_fail_the_server(live, published, path):
    operation = published[path]["POST"]

    @settings(
        max_examples=NUM_SCHEMA_EXAMPLES, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def fuzz(case: schemathesis.Case) -> None:
        body = case.body
        if isinstance(body, dict):
            body = bounded(path, {**body, "model": MODEL})
        if isinstance(body, dict | list | str | int | float | bool | None):
            answered(live, path, body)

    fuzz()
