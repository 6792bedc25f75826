"""Owns a Serve application of gateways that know each other and need no engine."""

import asyncio
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Metric
from ray import serve

from gateway import scrape
from gateway.peers_ray import RayPeers


@serve.deployment(name="gateway")
@serve.ingress()
class Gateway:
    """Counts the requests it gets, and has one receipt, `of-<its id>`."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self.peers = RayPeers(context.replica_tag, serve.get_deployment_handle(context.deployment, context.app_name))
        self.receipts = {f"of-{self.peers.own_id}": {"gateway": self.peers.own_id}}
        self.registry = CollectorRegistry()
        self.counter = Counter("work", "Requests", registry=self.registry)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI()
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/work", self.work)
        app.add_api_route("/baton/status", self.status)
        app.add_api_route("/metrics", self.metrics)
        app.add_api_route("/receipts/{request_id}", self.receipt)
        return app

    async def models(self) -> dict[str, Any]:
        return {"data": [{"id": "none"}]}

    async def work(self) -> None:
        self.counter.inc()

    async def status(self) -> dict[str, Any]:
        pools = {"decode": [{"id": "none", "ready": True}]}
        return {"gateway": self.peers.own_id, "gateways": self.peers.members(), "pools": pools}

    async def metrics(self) -> PlainTextResponse:
        answers = await self.peers.metrics()
        by_gateway = {**answers.by_gateway, self.peers.own_id: list(self.registry.collect())}
        return PlainTextResponse(scrape.exposition(by_gateway, answers.missing))

    async def receipt(self, request_id: str) -> JSONResponse:
        began_s = asyncio.get_running_loop().time()
        answers = await self.peers.receipt(request_id)
        waited_s = asyncio.get_running_loop().time() - began_s
        return JSONResponse({"found": dict(answers.by_gateway), "missing": answers.missing, "waited_s": waited_s})

    async def peer_metrics(self, asker: str) -> tuple[str, list[Metric]] | None:
        return None if asker == self.peers.own_id else (self.peers.own_id, list(self.registry.collect()))

    async def peer_receipt(self, asker: str, request_id: str) -> tuple[str, dict[str, Any] | None] | None:
        return None if asker == self.peers.own_id else (self.peers.own_id, self.receipts.get(request_id))


def build(settings: Any) -> serve.Application:
    return Gateway.options(num_replicas=settings.gateway.replicas, max_ongoing_requests=100).bind()
