"""Owns a Serve application that looks like Baton's gateway from outside and needs no engine."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve

api = FastAPI()

IGNORES_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"

TAKES_PORT = (
    "import socket, sys, time; server = socket.create_server(('127.0.0.1', int(sys.argv[1]))); "
    "print('listening', flush=True); time.sleep(3600)"
)


@api.get("/v1/models")
async def models() -> dict[str, Any]:
    return {"data": [{"id": "trivial"}]}


@api.get("/baton/receipts/{request_id}")
async def receipt(request_id: str) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "policy": "trivial",
        "reason": "there is only one",
        "placement": {"prefill": None, "decode": "decode-1"},
        "outcome": {"ttft_ms": 12.3, "prompt_tokens": 5, "output_tokens": 2, "faults": []},
    }


@api.get("/baton/status")
async def status() -> dict[str, Any]:
    return {"gateway": "gateway-1", "pools": {"prefill": [], "decode": [{"id": "decode-1", "ready": True}]}}


@api.get("/environment")
async def environment() -> dict[str, str]:
    return dict(os.environ)


@api.post("/v1/chat/completions")
async def chat() -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        for text in ("forty", "-two"):
            yield f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"x-baton-request-id": "request-1"})


@serve.deployment(name="decode")
class Engine:
    """Leaves a grandchild behind that has another parent, another session, and ignores SIGTERM."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-c", IGNORES_SIGTERM]
        subprocess.run(["/bin/sh", "-c", 'setsid "$0" "$@" & exit 0', *command], check=True)


@serve.deployment(name="decode")
class BrokenEngine:
    def __init__(self) -> None:
        try:
            raise OSError("the disk is on fire")
        except OSError as error:
            raise RuntimeError("the model cannot be read; check model.path") from error


@serve.deployment(name="gateway")
@serve.ingress(api)
class Gateway:
    def __init__(self, engine: Any) -> None:
        self.engine = engine


def build(settings: Any) -> serve.Application:
    return Gateway.bind(Engine.bind())


def build_broken(settings: Any) -> serve.Application:
    return Gateway.bind(BrokenEngine.bind())


def build_loses_port(settings: Any) -> serve.Application:
    """Another process takes the port after the launcher found it free, before HAProxy does."""
    command = [sys.executable, "-S", "-c", TAKES_PORT, str(settings.gateway.port)]
    thief = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert thief.stdout is not None
    thief.stdout.readline()
    return build(settings)


def build_raises(settings: Any) -> serve.Application:
    raise ValueError("there is no such model")
