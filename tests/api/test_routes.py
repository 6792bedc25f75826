"""Clients reach the routes of the allow-list and nothing else, and every field of vLLM's requests is decided on."""

import dataclasses
import logging

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from prometheus_client import REGISTRY
from starlette.routing import Match
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest

from gateway import metrics
from gateway.api import fields
from gateway.api.server import ServerConfig, make_app, warm_up_sampling
from gateway.orchestrator import Orchestrator, OrchestratorConfig
from gateway.peers import Alone, Peers, PoliciesInUse
from gateway.routing.policies import least_tokens
from gateway.routing.receipts import ReceiptStore
from gateway.transport import InProcessTransport
from tests.api.live import ROOT, is_anthropic_error, is_openai_error

POLICIES_IN_USE = PoliciesInUse("least-tokens", None, 1_700_000_000.0)
DOCS = {("GET", "/openapi.json"), ("GET", "/docs")}
REQUEST_MODELS = {
    "/v1/chat/completions": [ChatCompletionRequest],
    "/v1/completions": [CompletionRequest],
    "/v1/responses": [ResponsesRequest],
    "/v1/messages": [AnthropicMessagesRequest],
    "/v1/messages/count_tokens": [AnthropicCountTokensRequest],
    "/tokenize": [TokenizeCompletionRequest, TokenizeChatRequest],
    "/detokenize": [DetokenizeRequest],
}
CLOSED = [
    ("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping"), ("POST", "/collective_rpc"),
    ("POST", "/pause"), ("POST", "/resume"), ("POST", "/reset_prefix_cache"), ("GET", "/server_info"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"), ("POST", "/inference/v1/generate"),
    ("POST", "/start_profile"), ("POST", "/stop_profile"), ("POST", "/scale_elastic_ep"), ("POST", "/invocations"),
    ("GET", "/ping"), ("POST", "/ping"), ("GET", "/version"), ("GET", "/load"), ("GET", "/tokenizer_info"),
    ("POST", "/v1/chat/completions/batch"), ("POST", "/v1/chat/completions/render"),
    ("POST", "/v1/completions/render"), ("POST", "/v1/embeddings"), ("POST", "/v1/audio/transcriptions"),
    ("POST", "/pooling"), ("POST", "/score"), ("POST", "/rerank"), ("POST", "/init_weights_update_group"),
    ("POST", "/update_weights"), ("POST", "/abort_requests"), ("GET", "/v1/responses/resp_1"),
    ("POST", "/v1/responses/resp_1/cancel"), ("GET", "/metrics/../sleep"), ("GET", "/metrics/x"), ("GET", "/redoc"),
    ("GET", "/"), ("GET", "/nowhere"), ("POST", "/health"), ("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"),
    ("PUT", "/v1/completions"), ("GET", "/baton/receipts/"), ("POST", "/baton/status"),
]  # fmt: skip


def config(**changes: object) -> ServerConfig:
    return dataclasses.replace(
        ServerConfig(
            model=str(ROOT / "configs/models/mini"),
            served_name="baton-mini",
            max_model_len=8192,
            dtype="float32",
            chat_template=None,
            tool_call_parser="hermes",
            reasoning_parser=None,
            trust_remote_code=False,
            max_body_bytes=65536,
            max_choices=16,
            send_timeout_s=30.0,
            enable_docs=False,
        ),
        **changes,  # type: ignore[arg-type]
    )


async def app_of(server_config: ServerConfig, peers: Peers | None = None) -> FastAPI:
    orchestrator = Orchestrator(
        InProcessTransport("gateway", []), least_tokens, ReceiptStore(10),
        OrchestratorConfig(handoff_timeout_s=1.0, max_in_flight_requests=10, warm_up_sampling=warm_up_sampling()),
    )  # fmt: skip
    app, _ = await make_app(
        server_config, orchestrator, peers or Alone("gateway-1"), lambda: POLICIES_IN_USE, dict, metrics.collect
    )
    return app


@pytest.fixture(scope="module")
async def app() -> FastAPI:
    return await app_of(config())


@pytest.fixture(scope="module")
async def client(app):
    transport = ASGITransport(app, raise_app_exceptions=False)
    async with AsyncClient(transport=transport, base_url="http://baton") as client:
        yield client


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """(method, path) of every route; (*, path) of anything without methods: mounts, web sockets."""
    found = set()
    for route in app.routes:
        methods = getattr(route, "methods", None)
        found |= {(method, route.path) for method in methods or {"*"}}
    return {(method, path) for method, path in found if method != "HEAD"}


def rejections() -> float:
    labels = {"status": "503", "cause": "no-decode-replica", "priority": "normal"}
    return REGISTRY.get_sample_value("baton_rejections_total", labels) or 0.0


def test_the_application_has_the_routes_of_the_allow_list_and_no_other(app):
    assert routes_of(app) == fields.ROUTES


async def test_the_documentation_adds_its_own_two_routes_when_it_is_on():
    app = await app_of(config(enable_docs=True))
    assert routes_of(app) == fields.ROUTES | DOCS


def test_no_path_of_an_admin_route_matches_any_route(app):
    for method, path in CLOSED:
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
        reached = [route for route in app.routes if route.matches(scope)[0] is Match.FULL]
        assert not reached, f"{method} {path} reaches {reached}"


@pytest.mark.parametrize(("method", "path"), CLOSED)
async def test_what_is_not_on_the_list_answers_404_in_openais_shape(client, method, path):
    response = await client.request(method, path, json={} if method in ("POST", "PUT") else None)
    assert response.status_code == 404
    assert is_openai_error(404, response.json())


async def test_what_is_not_on_the_list_below_messages_answers_404_in_anthropics_shape(client):
    response = await client.post("/v1/messages/batches", json={})
    assert response.status_code == 404
    assert is_anthropic_error(response.json())


async def test_without_engines_a_request_gets_503_and_when_to_try_again_also_when_it_streams(client):
    body = {"model": "baton-mini", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    for stream in (False, True):
        response = await client.post("/v1/chat/completions", json=body | {"stream": stream})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert is_openai_error(503, response.json())
        response = await client.post("/v1/messages", json=body | {"stream": stream})
        assert response.status_code == 503
        assert is_anthropic_error(response.json())


async def test_a_refused_request_is_counted_and_leaves_nothing_on_the_front_ends_books(app, client):
    body = {"model": "baton-mini", "prompt": "Hello", "max_tokens": 4, "temperature": 1.0}
    for n in (1, 3):
        before = rejections()
        response = await client.post("/v1/completions", json=body | {"n": n})
        assert response.status_code == 503
        assert rejections() == before + 1
    assert app.state.engine_client.output_processor.get_num_unfinished_requests() == 0


async def test_a_refused_request_leaves_no_trace_in_the_log_for_there_may_be_thousands(client):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in (*logging.Logger.manager.loggerDict, "root")]
    vllms = [logger for logger in loggers if logger.name.startswith(("vllm", "root"))]
    body = {"model": "baton-mini", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
    for logger in vllms:
        logger.addHandler(handler)
    try:
        for stream in (False, True):
            for path, more in (
                ("/v1/chat/completions", body),
                ("/v1/completions", {"model": "baton-mini", "prompt": "Hello", "max_tokens": 4}),
                ("/v1/responses", {"model": "baton-mini", "input": "Hello"}),
                ("/v1/messages", body),
            ):
                response = await client.post(path, json=more | {"stream": stream})
                assert (response.status_code, "retry-after" in response.headers) == (503, True), path
    finally:
        for logger in vllms:
            logger.removeHandler(handler)
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("path", sorted(fields.ALLOWED))
def test_every_field_of_vllms_requests_is_allowed_or_refused_and_none_is_both(path):
    known = {name for model in REQUEST_MODELS[path] for name in model.model_fields}
    decided = fields.ALLOWED[path] | set(fields.REFUSED)
    assert not known - decided, f"{path}: new in vLLM, allow or refuse them"
    assert not fields.ALLOWED[path] - known, f"{path}: vLLM has no such fields any more"
    assert not fields.ALLOWED[path] & set(fields.REFUSED)


def test_every_refused_field_exists_in_some_request_of_vllm():
    known = {name for models in REQUEST_MODELS.values() for model in models for name in model.model_fields}
    assert set(fields.REFUSED) <= known
