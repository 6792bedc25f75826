"""Owns the HTTP application: vLLM's OpenAI server over the cluster, cut down to Baton's routes."""

import asyncio
import dataclasses
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import Metric
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Mount
from vllm import AsyncEngineArgs, envs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from engine.protocol import Phase
from engine.vllm_codec import SamplingPayload, encode_sampling
from gateway import metrics, scrape
from gateway.agents.tenants import Limiter, Tenant, Tenants
from gateway.api import context, fields
from gateway.api.authentication import Authentication
from gateway.api.engine_client import SplitEngineClient
from gateway.api.middleware import Departure, Intake, ResponseStart, error_body
from gateway.cluster import Replica
from gateway.orchestrator import Orchestrator
from gateway.peers import Peers, PoliciesInUse
from gateway.tracing import Tracer

TASKS = ("generate",)

LOGS_OF_REFUSALS = (
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.anthropic.serving",
    "vllm.entrypoints.openai.chat_completion.serving",
    "vllm.entrypoints.openai.completion.serving",
)
"""Where vLLM logs, with its trace, the error that ends a request."""


class NotRefused(logging.Filter):
    """Drops what is logged of a refused request: there may be thousands, and `gateway.refusals` sums them up."""

    def filter(self, record: logging.LogRecord) -> bool:
        request = context.current.get()
        return request is None or request.rejection is None


@dataclass(frozen=True)
class ServerConfig:
    """What the HTTP application needs of the configuration. Without tenants it asks for no keys."""

    model: str
    served_name: str
    max_model_len: int | None
    dtype: str
    chat_template: str | None
    tool_call_parser: str | None
    reasoning_parser: str | None
    trust_remote_code: bool
    max_body_bytes: int
    max_choices: int
    send_timeout_s: float
    enable_docs: bool
    tenants: tuple[Tenant, ...] = ()


NOT_REFUSED = NotRefused()


def warm_up_sampling() -> bytes:
    """Sampling parameters of the small requests that warm up engines."""
    return encode_sampling(SamplingPayload(SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)))


def command_line(config: ServerConfig) -> list[str]:
    """The arguments vLLM's own server would be started with."""
    arguments = [
        f"--model={config.model}",
        f"--served-model-name={config.served_name}",
        f"--dtype={config.dtype}",
        "--enable-prompt-tokens-details",
    ]
    if config.max_model_len:
        arguments.append(f"--max-model-len={config.max_model_len}")
    if config.chat_template:
        arguments.append(f"--chat-template={config.chat_template}")
    if config.tool_call_parser:
        arguments += ["--enable-auto-tool-choice", f"--tool-call-parser={config.tool_call_parser}"]
    if config.reasoning_parser:
        arguments.append(f"--reasoning-parser={config.reasoning_parser}")
    if config.trust_remote_code:
        arguments.append("--trust-remote-code")
    if not config.enable_docs:
        arguments.append("--disable-fastapi-docs")
    return arguments


class MetricsResponse(Response):
    media_type = scrape.CONTENT_TYPE


async def make_app(
    config: ServerConfig,
    orchestrator: Orchestrator,
    peers: Peers,
    policies: Callable[[], PoliciesInUse],
    proposals: Callable[[], dict[str, Any]],
    own_metrics: Callable[[], list[Metric]],
    tracer: Tracer | None = None,
) -> tuple[FastAPI, SplitEngineClient]:
    """vLLM's application over `orchestrator`. `policies` tells what decides in it now, `proposals` what its planner
    would do, `own_metrics` what this gateway has to say in a scrape; `tracer` traces its requests. Raises ValueError
    when the model's files cannot be used."""
    os.environ["VLLM_ENABLE_RESPONSES_API_STORE"] = "0"
    os.environ["VLLM_SERVER_DEV_MODE"] = "0"
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command_line(config))
    assert isinstance(args, Namespace)
    client = SplitEngineClient(_front_end_config(args), orchestrator, tracer)
    app = build_app(args, TASKS, client.vllm_config.model_config)
    await init_app_state(client, app.state, args, TASKS)
    # vLLM's handler of engine errors tells the uvicorn server it expects here to exit; Serve owns ours.
    app.state.server = SimpleNamespace()
    for name in LOGS_OF_REFUSALS:
        logging.getLogger(name).addFilter(NOT_REFUSED)
    _add_baton_routes(app, config, orchestrator, peers, policies, proposals, own_metrics)
    keep_routes(app, config.enable_docs)
    for status in (404, 405):
        app.add_exception_handler(status, _unknown_route)
    # vLLM has built the stack already; the next call builds it again. The layer that is added last is the outermost.
    app.middleware_stack = None
    # No web page of another origin may read an answer: on loopback there may be no keys to tell whose it is.
    app.user_middleware[:] = [layer for layer in app.user_middleware if layer.cls is not CORSMiddleware]
    app.add_middleware(Intake, max_body_bytes=config.max_body_bytes, max_choices=config.max_choices)
    if config.tenants:
        limiter = Limiter(num_gateways=lambda: len(peers.members()))
        app.add_middleware(Authentication, tenants=Tenants(config.tenants), limiter=limiter)
    app.add_middleware(ResponseStart)
    app.add_middleware(Departure, send_timeout_s=config.send_timeout_s)
    envs.enable_envs_cache()  # vLLM asks for its variables with every token
    return app, client


def keep_routes(app: FastAPI, enable_docs: bool) -> None:
    """Drops every route that is not on the allow-list (`fields.ROUTES`)."""
    allowed = fields.ROUTES | ({("GET", "/openapi.json"), ("GET", "/docs")} if enable_docs else set())
    app.router.routes[:] = [route for route in app.router.routes if _is_allowed(route, allowed)]


def _is_allowed(route: BaseRoute, allowed: frozenset[tuple[str, str]] | set[tuple[str, str]]) -> bool:
    # A mount answers whatever lies below it, for every method; vLLM's metrics have a route of their own besides.
    if isinstance(route, Mount):
        return False
    path = getattr(route, "path", None)
    methods = (getattr(route, "methods", None) or set()) - {"HEAD"}
    return bool(methods) and all((method, path) in allowed for method in methods)


async def _unknown_route(request: Request, error: Exception) -> Response:
    message = f"{request.method} {request.url.path} does not exist; Baton serves the routes its README lists"
    return Response(error_body(request.url.path, 404, message), 404, media_type="application/json")


def _front_end_config(args: Any) -> VllmConfig:
    """The part of vLLM's configuration that rendering and detokenizing need; it asks for no device."""
    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    model_config.quantization = None
    return VllmConfig(
        model_config=model_config,
        structured_outputs_config=engine_args.create_structured_outputs_config(),
    )


def _add_baton_routes(
    app: FastAPI,
    config: ServerConfig,
    orchestrator: Orchestrator,
    peers: Peers,
    policies: Callable[[], PoliciesInUse],
    proposals: Callable[[], dict[str, Any]],
    own_metrics: Callable[[], list[Metric]],
) -> None:
    def add(path: str, handler: Callable[..., Any], response_class: type[Response] = JSONResponse) -> None:
        # Baton's route takes the place of vLLM's, if it has one there.
        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != path]
        app.add_api_route(path, handler, methods=["GET"], include_in_schema=True, response_class=response_class)

    gateways = peers.members()

    async def all_metrics() -> Response:
        nonlocal gateways
        if not _request().is_operators:
            return _error(403, "metrics are of all tenants; the key of one with `operator: true` reads them")
        before, gateways = gateways, peers.members()
        metrics.count_gateways_gone(before, gateways)
        answers = await peers.metrics()
        by_gateway = {**answers.by_gateway, peers.own_id: own_metrics()}
        return MetricsResponse(await asyncio.to_thread(scrape.exposition, by_gateway, answers.missing))

    async def status() -> Response:
        sees_all = _request().is_operators
        describe = _replica if sees_all else _replica_without_load
        pools = {phase.value: [describe(r) for r in orchestrator.cluster.pool(phase)] for phase in Phase}
        return JSONResponse(
            {
                "model": config.served_name,
                "ready": bool(orchestrator.cluster.pool(Phase.DECODE, ready_only=True)),
                "version": version("baton-gateway"),
                "gateway": peers.own_id,
                "gateways": peers.members(),
                "policies": dataclasses.asdict(policies()),
                "pools": pools,
                **({"learnt": msgspec.to_builtins(orchestrator.learnt), "proposals": proposals()} if sees_all else {}),
            }
        )

    async def all_policies() -> Response:
        answers = await peers.policies()
        by_gateway = {**answers.by_gateway, peers.own_id: policies()}
        gateways = {gateway: dataclasses.asdict(by_gateway[gateway]) for gateway in sorted(by_gateway)}
        return JSONResponse({"gateways": gateways, "missing": answers.missing})

    async def receipt(request_id: str) -> Response:
        request = _request()
        found = orchestrator.receipts.get(request_id)
        if found and request.may_see(found.request.hints.tenant):
            return JSONResponse(_seen_by(request, found.as_json()))
        # Another tenant's is looked for on, so that not even the time tells that it is there.
        answers = await peers.receipt(request_id)
        for elsewhere in answers.by_gateway.values():
            if elsewhere is not None and (request.is_operators or request.may_see(_tenant_of(elsewhere))):
                return JSONResponse(_seen_by(request, elsewhere))
        if answers.missing:
            message = f"no receipt {request_id} found, but {', '.join(answers.missing)} did not answer: try again"
            return _error(503, message, {"retry-after": "1"})
        return _error(404, f"no receipt {request_id}: it is unknown, or older than the receipts kept in memory")

    add("/metrics", all_metrics, MetricsResponse)
    add("/baton/status", status)
    add("/baton/policies", all_policies)
    add("/baton/receipts/{request_id}", receipt)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return Response(error_body("/baton", status, message), status, headers, media_type="application/json")


def _request() -> context.RequestContext:
    request = context.current.get()
    assert request is not None, "ResponseStart is around every route"
    return request


OTHERS_LOAD = ("snapshot", "later", "scores")
"""What a receipt says of the cluster: load and caches are all tenants'."""


def _seen_by(request: context.RequestContext, receipt: dict[str, Any]) -> dict[str, Any]:
    """A tenant's own receipt, without what it says of others."""
    if request.is_operators:
        return receipt
    return {name: value for name, value in receipt.items() if name not in OTHERS_LOAD}


def _tenant_of(receipt: dict[str, Any]) -> str | None:
    """A gateway that is being replaced may not know of tenants yet."""
    return receipt["request"]["hints"].get("tenant")


def _replica_without_load(replica: Replica) -> dict[str, Any]:
    return {
        "id": replica.replica_id,
        "phase": replica.phase.value,
        "attached": replica.attached,
        "ready": replica.ready,
        "info": msgspec.structs.asdict(replica.info) if replica.info else None,
    }


def _replica(replica: Replica) -> dict[str, Any]:
    return _replica_without_load(replica) | {
        "in_flight_requests": replica.all_in_flight.num_requests,
        "in_flight_tokens": replica.all_in_flight.num_tokens,
        "own_in_flight_requests": len(replica.in_flight),
        "own_in_flight_tokens": replica.in_flight_tokens,
        "others_in_flight_requests": replica.others_in_flight.num_requests,
        "others_in_flight_tokens": replica.others_in_flight.num_tokens,
        "cached_kv_blocks": len(replica.blocks),
        "cached_kv_blocks_overflows": replica.blocks.num_overflows,
        "load": msgspec.structs.asdict(replica.load),
    }
