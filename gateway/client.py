"""Owns the command line's conversation with a running gateway: chat over SSE, receipts, status."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

REQUEST_ID_HEADER = "x-baton-request-id"
API_KEY_VARIABLE = "BATON_API_KEY"
"""Where the command line looks for the key it asks with: an argument would show in the list of processes."""
SIMULATED = "simulated"
"""The kind of an engine without a model (`EngineInfo.kind`)."""

_CONNECT_S = 5.0
_READ_S = 120.0


class GatewayError(RuntimeError):
    """The gateway could not be reached or refused; the message is one readable line."""


@dataclass(frozen=True)
class Finished:
    """The end of an answer; `request_id` names its receipt, if the gateway gave one."""

    request_id: str | None
    finish_reason: str | None


def chat(
    url: str,
    prompt: str,
    *,
    model: str | None = None,
    max_tokens: int | None = None,
    system: str | None = None,
    api_key: str | None = None,
) -> Iterator[str | Finished]:
    """Streams the answer's text, then `Finished`. `model` None takes the one that is served. Raises GatewayError."""
    messages = [{"role": "system", "content": system}] if system else []
    body: dict[str, Any] = {
        "model": model or served_model(url, api_key),
        "messages": [*messages, {"role": "user", "content": prompt}],
        "stream": True,
    }
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    finish_reason: str | None = None
    done = False
    try:
        with (
            _client(url, api_key) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise GatewayError(_refusal(response))
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or not data:
                    continue
                if data == "[DONE]":
                    done = True
                    break
                chunk = _decoded(data)
                if "error" in chunk:
                    raise GatewayError(f"the answer broke off: {_error_text(chunk)}")
                for choice in chunk.get("choices") or []:
                    delta = choice.get("delta") or {}
                    text = delta.get("reasoning_content") or delta.get("reasoning") or delta.get("content")
                    if text:
                        yield text
                    finish_reason = choice.get("finish_reason") or finish_reason
            request_id = response.headers.get(REQUEST_ID_HEADER)
    except httpx.HTTPError as error:
        raise GatewayError(_unreachable(url, error)) from error
    if not done:
        raise GatewayError("the answer broke off: the connection closed before the end")
    yield Finished(request_id, finish_reason)


def served_model(url: str, api_key: str | None = None) -> str:
    """The id of the model that is served. Raises GatewayError."""
    models = _get(url, "/v1/models", api_key).get("data") or []
    if not models:
        raise GatewayError(f"{url} serves no model")
    return str(models[0]["id"])


def receipt(url: str, request_id: str, api_key: str | None = None) -> dict[str, Any]:
    """The record of one placement. Raises GatewayError."""
    return _get(url, f"/baton/receipts/{request_id}", api_key)


def status(url: str, timeout_s: float = _READ_S, api_key: str | None = None) -> dict[str, Any]:
    """Pools, replicas and, for an operator's key, their load, as one gateway sees them. Raises GatewayError."""
    return _get(url, "/baton/status", api_key, timeout_s)


def policies(url: str, api_key: str | None = None) -> dict[str, Any]:
    """What decides in each gateway and since when, and which gateways did not tell. Raises GatewayError."""
    return _get(url, "/baton/policies", api_key)


def follow(policies: dict[str, Any], policy: str, shadow_policy: str | None, num_gateways: int) -> bool:
    """Whether so many gateways or more are there, by what `policies` returned, and all of them decide by these."""
    in_use = [(one.get("policy"), one.get("shadow_policy")) for one in policies["gateways"].values()]
    return not policies["missing"] and len(in_use) >= num_gateways and set(in_use) == {(policy, shadow_policy)}


def missing_replicas(status: dict[str, Any], expected: Mapping[str, int]) -> str:
    """What a gateway, by its `status`, lacks of pools with so many replicas each; empty if they are complete."""
    lacking: list[str] = []
    for pool, num_expected in expected.items():
        num_ready = sum(bool(replica.get("ready")) for replica in (status.get("pools") or {}).get(pool, ()))
        if num_ready < num_expected:
            lacking.append(f"{num_ready} of {num_expected} {pool} replicas")
    return f"{' and '.join(lacking)} are ready" if lacking else ""


def simulated_replicas(status: dict[str, Any]) -> set[str]:
    """The ids of the replicas whose engines are simulated, of what `status` returned."""
    replicas = [replica for pool in (status.get("pools") or {}).values() for replica in pool]
    return {str(replica.get("id")) for replica in replicas if (replica.get("info") or {}).get("kind") == SIMULATED}


def describe_receipt(receipt: dict[str, Any], simulated: Collection[str] = ()) -> str:
    """One placement in a few short lines. `simulated` names the replicas whose engines are."""
    placement = receipt.get("placement") or {}
    outcome = receipt.get("outcome") or {}
    replicas = [(phase, placement.get(phase)) for phase in ("prefill", "decode")]
    route = " -> ".join(
        f"{phase} {replica}{' (simulated)' if replica in simulated else ''}"
        for phase, replica in replicas
        if replica or phase == "decode"
    )
    lines = [f"receipt {receipt.get('request_id')}: {route} (policy {receipt.get('policy')}: {receipt.get('reason')})"]
    ttft_ms = outcome.get("ttft_ms")
    facts = [
        f"TTFT {ttft_ms:.0f} ms" if isinstance(ttft_ms, int | float) else None,
        _fact(outcome, "prompt_tokens", "prompt tokens"),
        _fact(outcome, "reused_tokens", "reused"),
        _fact(outcome, "output_tokens", "output tokens"),
        _moved(outcome),
    ]
    lines.append("  " + ", ".join(fact for fact in facts if fact))
    times = {name: value for name, value in (outcome.get("times_ms") or {}).items() if value is not None}
    if times:
        lines.append("  ms: " + ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in times.items()))
    if outcome.get("faults"):
        lines.append(f"  faults: {', '.join(str(fault) for fault in outcome['faults'])}")
    return "\n".join(lines)


def _fact(outcome: dict[str, Any], key: str, label: str) -> str | None:
    value = outcome.get(key)
    return None if value is None else f"{value} {label}"


def _moved(outcome: dict[str, Any]) -> str | None:
    blocks, size = outcome.get("kv_blocks_moved"), outcome.get("kv_bytes_moved")
    if not blocks:
        return None
    return f"{blocks} KV blocks moved ({human_bytes(size or 0)})"


def human_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _client(url: str, api_key: str | None, timeout_s: float = _READ_S) -> httpx.Client:
    timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
    return httpx.Client(base_url=url, timeout=timeout, headers=_authorization(api_key), trust_env=False)


def _authorization(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        # httpx would say so with the key in its message.
        raise GatewayError(f"{API_KEY_VARIABLE} holds characters that no key has; set it to the key and nothing else")
    return {"authorization": f"Bearer {api_key}"}


def _get(url: str, path: str, api_key: str | None, timeout_s: float = _READ_S) -> dict[str, Any]:
    try:
        with _client(url, api_key, timeout_s) as http:
            response = http.get(path)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise GatewayError(_unreachable(url, error)) from error
    if response.status_code != 200:
        raise GatewayError(_refusal(response))
    return _decoded(response.text)


def _decoded(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise GatewayError(f"not a Baton gateway: it answered {text[:80]!r}") from error
    if not isinstance(value, dict):
        raise GatewayError(f"not a Baton gateway: it answered {text[:80]!r}")
    return value


def _refusal(response: httpx.Response) -> str:
    try:
        text = _error_text(response.json())
    except json.JSONDecodeError:
        text = response.text.strip().splitlines()[0][:200] if response.text.strip() else response.reason_phrase
    what_to_do = f"; set {API_KEY_VARIABLE} to a key of it" if response.status_code == 401 else ""
    return f"{response.request.url.path} answered {response.status_code}: {text}{what_to_do}"


def _error_text(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else None
    return " ".join(str(message or error).split())


def _unreachable(url: str, error: Exception) -> str:
    if isinstance(error, httpx.ConnectError):
        return f"no gateway at {url}; start one with `baton serve configs/local.yaml` or pass --url"
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return f"{url!r} is not a URL; write it like http://127.0.0.1:8000"
    if isinstance(error, httpx.TimeoutException):
        return f"{url} did not answer in time"
    return f"{url}: {error or type(error).__name__}"
