"""Owns what `bench load` asks the server about itself: what it serves, what stands behind it, its counters, and, on
this machine, its processes."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from bench import load_metrics
from bench.load_metrics import Counters
from bench.load_plan import ServerFacts, ServerKind
from bench.results import EngineKind
from gateway.client import SIMULATED
from gateway.runtime import processes
from gateway.runtime.processes import ProcessId

_TIMEOUT_S = 10.0
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
_HTTP_PORTS = {"http": 80, "https": 443}


class ServerError(RuntimeError):
    """The server cannot be measured; the message is one line that says why and what to do."""


def facts(url: str, model: str | None, api_key: str | None) -> ServerFacts:
    """What the server at `url` says of itself; `model` None takes the one it serves. Raises ServerError."""
    with _http(url, api_key) as http:
        served = _served(http, url)
        names = [str(one.get("id")) for one in served]
        if not names:
            raise ServerError(f"{url} serves no model")
        if model is None and len(names) > 1:
            raise ServerError(f"{url} serves several models; name one with --model: {', '.join(names)}")
        name = model or names[0]
        if name not in names:
            raise ServerError(f"{url} does not serve {name!r} (--model); it serves {', '.join(names)}")
        max_model_len = served[names.index(name)].get("max_model_len")
        found = ServerFacts(
            url, name, ServerKind.OTHER, None, max_model_len=max_model_len if isinstance(max_model_len, int) else None
        )
        status = _json(http, "/baton/status")
        if "pools" not in status:
            version = _json(http, "/version").get("version")
            return replace(found, version=str(version or ""))
        kinds = {replica["info"]["kind"] for pool in status["pools"].values() for replica in pool if replica["info"]}
        if SIMULATED in kinds and len(kinds) > 1:
            raise ServerError(f"{url} has simulated and real engines; figures of the two cannot be mixed")
        return replace(
            found,
            kind=ServerKind.BATON,
            engine=None if not kinds else EngineKind.SIMULATED if SIMULATED in kinds else EngineKind.VLLM,
            version=str(status.get("version", "")),
            pools={name: len(pool) for name, pool in status["pools"].items()},
            policy=str((status.get("policies") or {}).get("policy", "")),
        )


def _http(url: str, api_key: str | None) -> httpx.Client:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False)


def _served(http: httpx.Client, url: str) -> list[dict[str, Any]]:
    try:
        response = http.get("/v1/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"cannot reach {url}: {error or type(error).__name__}; is a server running there?") from error
    if response.status_code in (401, 403):
        raise ServerError(f"{url} answers {response.status_code}: it wants a key; give --api-key")
    try:
        served = response.json()["data"] if response.status_code == httpx.codes.OK else None
    except (ValueError, LookupError, TypeError):
        served = None
    if not isinstance(served, list) or not all(isinstance(one, dict) for one in served):
        raise ServerError(f"{url}/v1/models answers {response.status_code} and no list of models: no OpenAI API there")
    return served


def _json(http: httpx.Client, path: str) -> dict[str, Any]:
    """Empty where the server has nothing of this kind."""
    try:
        response = http.get(path)
        found = response.json() if response.status_code == httpx.codes.OK else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def counters(pages: Iterable[str], api_key: str | None) -> Counters | None:
    """Of all Prometheus pages of a server together; None where one cannot be had or tells nothing of the kind."""
    found: list[Counters] = []
    for page in pages:
        try:
            with _http(page, api_key) as http:
                response = http.get(page, follow_redirects=True)
        except httpx.HTTPError:
            return None
        own = load_metrics.counters(response.text) if response.status_code == httpx.codes.OK else None
        if own is None:
            return None
        found.append(own)
    return Counters(sum(one.kv_moved_bytes for one in found), sum(one.kv_asked_bytes for one in found))


def local_processes(url: str) -> list[ProcessId]:
    """Those of the server, if it listens on this machine: of a run of Baton all that carry its mark, of another server
    the one that listens and what it has started. Empty where it is elsewhere or may not be looked at."""
    parts = urlsplit(url)
    if parts.hostname not in _LOCAL_HOSTS:
        return []
    port = parts.port or _HTTP_PORTS.get(parts.scheme)
    found = {one.id.pid: one for one in processes.gather_processes()}
    try:
        connections = psutil.net_connections("tcp")
    except psutil.Error:
        return []
    listening = {
        one.pid
        for one in connections
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid in found
    }
    owners = {found[pid].owner for pid in listening if pid is not None}
    if marks := owners - {None, processes.this_process()}:
        return sorted(
            (one.id for one in found.values() if one.owner in marks or one.id in marks), key=lambda id: id.pid
        )
    own = {id.pid: id for pid in listening if pid is not None for id in (found[pid].id, *processes.descendants(pid))}
    return [own[pid] for pid in sorted(own)]


def memory_mib(of: Iterable[ProcessId]) -> dict[ProcessId, float]:
    """Resident memory of each process that lives."""
    memory: dict[ProcessId, float] = {}
    for id in of:
        try:
            memory[id] = psutil.Process(id.pid).memory_info().rss / 2**20
        except psutil.Error:
            continue
    return memory
