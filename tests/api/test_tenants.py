"""Tenants over real engines: nobody asks without a key, and no tenant sees another's cache, receipts or sessions."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import Anthropic, AuthenticationError
from openai import AuthenticationError as OpenAIAuthenticationError
from openai import OpenAI

from gateway.agents.tenants import key_sha256, new_key
from tests.api.live import (
    BLOCK_TOKENS,
    DEADLINE_S,
    MODEL,
    Live,
    is_anthropic_error,
    is_openai_error,
    local_config,
    served,
    unique_tokens,
)

pytestmark = pytest.mark.engines

COMPLETIONS, CHAT, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
PROMPT_TOKENS = 1200
LIMITS: dict[str, dict[str, Any]] = {
    "alice": {},
    "bob": {"max_priority": "high"},
    "one-at-once": {"max_concurrent_requests": 1},
    "one-a-minute": {"requests_per_minute": 1},
    "ops": {"operator": True},
}


@dataclass
class Site:
    """A server with tenants, the keys they have, and what it has printed."""

    url: str
    keys: dict[str, str]
    log: Path
    operator: Live

    def http(self, tenant: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(base_url=self.url, timeout=DEADLINE_S, headers=headers)

    def post(self, tenant: str, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.http(tenant) as http:
            return http.post(path, json={"model": MODEL} | body, headers=named)

    def get(self, tenant: str, path: str) -> httpx.Response:
        with self.http(tenant) as http:
            return http.get(path)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    keys = {name: new_key() for name in LIMITS}
    config = local_config()
    config["tenants"] = [
        {"name": name, "api_key_sha256": [key_sha256(keys[name].encode()).hex()], **limits}
        for name, limits in LIMITS.items()
    ]
    folder = tmp_path_factory.mktemp("tenants")
    with served(config, folder) as url:
        operator = Live(url, keys["ops"])
        yield Site(url, keys, folder / "serve.log", operator)
        operator.close()


# -- one prompt, two tenants (invariant I7)


def cached_tokens(response: httpx.Response) -> int:
    assert response.status_code == 200, response.text
    return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def work_of(site: Site, response: httpx.Response) -> dict[str, int]:
    """What the engines did for an answer: what takes its time is what they computed and moved."""
    outcome = site.operator.receipt(response)["outcome"]
    return {
        name: outcome[f"{name}"] for name in ("prefill_computed_tokens", "decode_computed_tokens", "kv_blocks_moved")
    }


def test_a_prompt_that_one_tenant_has_warmed_is_cold_for_another_in_tokens_and_in_work(site: Site) -> None:
    body = {"prompt": unique_tokens(PROMPT_TOKENS), "max_tokens": 4, "temperature": 0.0}
    reusable = PROMPT_TOKENS // BLOCK_TOKENS * BLOCK_TOKENS
    cold = site.post("alice", COMPLETIONS, body)
    warm = site.post("alice", COMPLETIONS, body)
    others = site.post("bob", COMPLETIONS, body)
    assert cached_tokens(cold) == 0
    assert cached_tokens(warm) == reusable
    assert cached_tokens(others) == 0
    assert work_of(site, cold)["prefill_computed_tokens"] == PROMPT_TOKENS
    assert work_of(site, others) == work_of(site, cold)
    assert work_of(site, warm)["prefill_computed_tokens"] == PROMPT_TOKENS - reusable
    # Nor does the router believe that there is anything of it.
    snapshot = site.operator.receipt(others)["snapshot"]
    assert snapshot["cached_tokens"] == {}, "nobody has anything of it under this tenant's salt"
    # Each has its own from then on, and neither's has displaced the other's.
    assert cached_tokens(site.post("bob", COMPLETIONS, body)) == reusable
    assert cached_tokens(site.post("alice", COMPLETIONS, body)) == reusable
    texts = {response.json()["choices"][0]["text"] for response in (cold, warm, others)}
    assert len(texts) == 1


def test_a_session_of_the_same_name_is_another_ones(site: Site) -> None:
    hints = {}
    for tenant in ("alice", "bob"):
        response = site.post(tenant, COMPLETIONS, {"prompt": "Hello", "max_tokens": 2}, x_session_id="the-same")
        hints[tenant] = site.operator.receipt(response)["request"]["hints"]
    assert hints["alice"]["session"]
    assert hints["alice"]["session"] != hints["bob"]["session"]
    assert [hints[name]["tenant"] for name in ("alice", "bob")] == ["alice", "bob"]


@pytest.mark.parametrize("field", ["cache_salt", "vllm_xargs", "kv_transfer_params"])
def test_no_key_opens_what_is_closed_to_clients(site: Site, field: str) -> None:
    for tenant in ("alice", "ops"):
        assert site.post(tenant, COMPLETIONS, {"prompt": "Hello", field: "alice"}).status_code == 400


# -- what a tenant may read


def test_a_receipt_is_its_tenants_and_the_operators(site: Site) -> None:
    response = site.post("alice", COMPLETIONS, {"prompt": "Hello", "max_tokens": 2})
    path = f"/baton/receipts/{response.headers['x-baton-request-id']}"
    assert site.get("alice", path).json()["request"]["hints"]["tenant"] == "alice"
    assert site.get("ops", path).status_code == 200
    hidden, unknown = site.get("bob", path), site.get("bob", f"/baton/receipts/{uuid.uuid4().hex}")
    assert (hidden.status_code, unknown.status_code) == (404, 404)
    assert is_openai_error(404, hidden.json())
    texts = [r.json()["error"]["message"].replace(r.url.path.rpartition("/")[2], "ID") for r in (hidden, unknown)]
    assert texts[0] == texts[1]


def test_load_and_metrics_are_the_operators(site: Site) -> None:
    refused = site.get("alice", "/metrics")
    assert refused.status_code == 403
    assert is_openai_error(403, refused.json())
    assert "baton_requests_total" in site.get("ops", "/metrics").text
    tenants_status, operators_status = (site.get(name, "/baton/status").json() for name in ("alice", "ops"))
    assert set(operators_status) - set(tenants_status) == {"learnt", "proposals"}
    (tenants_view,), (operators_view,) = (status["pools"]["decode"] for status in (tenants_status, operators_status))
    assert set(tenants_view) == {"id", "phase", "attached", "ready", "info"}
    assert set(operators_view) > {"load", "cached_kv_blocks", "in_flight_tokens"}


def test_health_needs_no_key_and_everything_else_does(site: Site) -> None:
    with httpx.Client(base_url=site.url, timeout=DEADLINE_S) as http:
        assert http.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/baton/status", "/baton/receipts/x", "/nowhere"):
            response = http.get(path)
            assert response.status_code == 401, path
            assert is_openai_error(401, response.json())
        refused = http.post(MESSAGES, json={}, headers={"x-api-key": "wrong"})
        assert refused.status_code == 401
        assert is_anthropic_error(refused.json())
        assert http.post(CHAT, content=b"not even read").status_code == 401


# -- clients


def test_openais_client_asks_with_its_key_and_not_without(site: Site) -> None:
    client = OpenAI(base_url=f"{site.url}/v1", api_key=site.keys["alice"], max_retries=0)
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4)  # type: ignore[arg-type]
    assert answer.choices
    with pytest.raises(OpenAIAuthenticationError, match="no tenant has this API key"):
        client.with_options(api_key="none").models.list()


def test_anthropics_client_asks_with_its_key_and_not_without(site: Site) -> None:
    client = Anthropic(base_url=site.url, api_key=site.keys["alice"], max_retries=0)
    answer = client.messages.create(model=MODEL, messages=HELLO, max_tokens=4)  # type: ignore[arg-type]
    assert answer.content
    with pytest.raises(AuthenticationError, match="no tenant has this API key"):
        client.with_options(api_key="none").messages.create(model=MODEL, messages=HELLO, max_tokens=4)  # type: ignore[arg-type]


# -- limits


def is_refusal(response: httpx.Response, says: str) -> bool:
    body = response.json()
    return (
        response.status_code == 429
        and int(response.headers["retry-after"]) >= 1
        and is_openai_error(429, body)
        and says in body["error"]["message"]
    )


def test_a_priority_above_the_tenants_is_lowered_and_the_receipt_says_so(site: Site) -> None:
    hints = {}
    for tenant in ("alice", "bob"):
        body = {"prompt": "Hello", "max_tokens": 2}
        headers = {"x_baton_priority": "high", "x_baton_ttft_deadline_ms": "3600000"}
        hints[tenant] = site.operator.receipt(site.post(tenant, COMPLETIONS, body, **headers))["request"]["hints"]
    assert (hints["alice"]["priority"], hints["alice"]["ttft_deadline_s"]) == ("normal", 30.0)
    assert hints["alice"]["capped"] == ["priority high to normal", "ttft_deadline_s 3600 to 30"]
    assert (hints["bob"]["priority"], hints["bob"]["capped"]) == ("high", ["ttft_deadline_s 3600 to 30"])


def test_a_client_that_leaves_or_is_refused_gives_its_tenants_place_back(site: Site) -> None:
    tenant = "one-at-once"
    short = {"prompt": "Hello", "max_tokens": 1}
    long = {"model": MODEL, "prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}

    def is_served() -> bool:
        response = site.post(tenant, COMPLETIONS, short)
        assert response.status_code == 200 or is_refusal(response, "may have 1 requests at once")
        return response.status_code == 200

    for _ in range(2):
        with site.http(tenant) as http, http.stream("POST", COMPLETIONS, json=long) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()  # it closes the connection when nobody holds it
            next(lines)
            for _ in range(3):
                assert not is_served()
            assert site.post("alice", COMPLETIONS, short).status_code == 200
        site.operator.wait(is_served, "the client that left is counted out")
    for refused in ({"prompt": "Hello", "cache_salt": "x"}, {"prompt": []}, {"prompt": "Hello", "temperature": "hot"}):
        assert site.post(tenant, COMPLETIONS, refused).status_code == 400
        assert is_served()


def test_choices_and_prompts_count_each(site: Site) -> None:
    for body in ({"prompt": "Hello", "n": 2, "temperature": 1.0}, {"prompt": ["Hello", "Hi"]}):
        response = site.post("one-at-once", COMPLETIONS, body | {"max_tokens": 1})
        assert response.status_code == 429, response.text
        assert is_refusal(response, "tenant one-at-once")
    site.operator.quiet()
    assert site.post("one-at-once", COMPLETIONS, {"prompt": "Hello", "max_tokens": 1}).status_code == 200


def test_a_tenant_that_has_asked_too_often_is_told_when_to_ask_again(site: Site) -> None:
    assert site.get("one-a-minute", "/v1/models").status_code == 200
    stream = {"prompt": "Hello", "max_tokens": 1, "stream": True}
    assert is_refusal(site.post("one-a-minute", COMPLETIONS, stream), "may send 1 requests a minute")
    samples = site.get("ops", "/metrics").text.splitlines()
    assert any(
        line.startswith("baton_tenant_refusals_total{") and 'cause="tenant-rate"' in line and "one-a-minute" in line
        for line in samples
    )


def test_no_key_is_told_to_anybody(site: Site) -> None:
    response = site.post("alice", COMPLETIONS, {"prompt": "Hello", "max_tokens": 2})
    told = [
        response.text,
        site.get("ops", f"/baton/receipts/{response.headers['x-baton-request-id']}").text,
        site.get("ops", "/baton/status").text,
        site.get("ops", "/metrics").text,
        site.log.read_text(),
    ]
    for key in site.keys.values():
        assert not any(key in text or key_sha256(key.encode()).hex() in text for text in told)
