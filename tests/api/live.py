"""Owns a running Baton as a test sees it: its URL, the state of its engines, and conditions worth waiting for."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from engine.ports import free_ports

ROOT = Path(__file__).parents[2]
READY = "Ctrl-C stops it"
START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 60.0
MODEL = "baton-mini"
BLOCK_TOKENS = 32
MAX_BODY_BYTES = 256 * 1024
DEADLINE_S = 60.0
POLL_S = 0.02

KNOWN = {"model": MODEL, "temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
KNOWN_CHAT = KNOWN | {"messages": [{"role": "user", "content": "What is Baton?"}]}


def local_config() -> dict[str, Any]:
    """configs/local.yaml, to be changed and written elsewhere."""
    config = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    config["model"]["path"] = str(ROOT / "configs/models/mini")
    return config


@contextmanager
def served(config: dict[str, Any], folder: Path) -> Iterator[str]:
    """The URL of a `baton serve` that is started in `folder` as a user would, and must end well."""
    port = free_ports("127.0.0.1")[0]
    config_path, log_path = folder / "config.yaml", folder / "serve.log"
    config_path.write_text(yaml.safe_dump(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "serve", str(config_path), "--port", str(port), "--no-demo"],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, log_path)
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_DEADLINE_S)
    assert code == 0, f"baton serve exited with {code}:\n{log_path.read_text()}"


def _wait_until_ready(process: subprocess.Popen, log_path: Path) -> None:
    """Until it says so: then every pool is complete."""
    end_s = time.monotonic() + START_DEADLINE_S
    while READY not in log_path.read_text():
        assert process.poll() is None, f"baton serve exited with {process.returncode}:\n{log_path.read_text()}"
        assert time.monotonic() < end_s, f"not ready within {START_DEADLINE_S:.0f} s:\n{log_path.read_text()}"
        time.sleep(0.25)


class Live:
    """A server under test. `baseline` is each replica's count of used KV blocks when nothing was going on. `api_key`:
    an operator's, where keys are asked for."""

    def __init__(self, url: str, api_key: str | None = None):
        self.url = url
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx.Client(base_url=url, timeout=DEADLINE_S, headers=headers)
        self.baseline = self.used_blocks()
        self.known_answer = self.ask_known()

    def close(self) -> None:
        self.http.close()

    def status(self) -> dict[str, Any]:
        response = self.http.get("/baton/status")
        assert response.status_code == 200, response.text
        return response.json()

    def replicas(self, pool: str | None = None) -> list[dict[str, Any]]:
        pools = self.status()["pools"]
        return pools[pool] if pool else [replica for members in pools.values() for replica in members]

    def load(self, pool: str) -> dict[str, int]:
        """The load of a pool's only replica."""
        (replica,) = self.replicas(pool)
        return replica["load"]

    def used_blocks(self) -> dict[str, int]:
        return {replica["id"]: replica["load"]["num_kv_blocks_used"] for replica in self.replicas()}

    def receipt(self, response_or_id: Any) -> dict[str, Any]:
        """The receipt of an HTTP response (anything with headers), or of an id."""
        headers = getattr(response_or_id, "headers", None)
        request_id = headers["x-baton-request-id"] if headers is not None else response_or_id
        response = self.http.get(f"/baton/receipts/{request_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def faults(self, response: httpx.Response) -> str:
        """What the receipt of a response says went wrong, for a failing test's message."""
        request_id = response.headers.get("x-baton-request-id")
        found = self.http.get(f"/baton/receipts/{request_id}") if request_id else None
        return str(found.json().get("outcome")) if found is not None and found.status_code == 200 else "no receipt"

    def wait(self, condition: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Polls until a condition holds; fails when it does not within the deadline."""
        end_s = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end_s, f"not within {deadline_s:.0f} s: {what}; status {self.status()}"
            time.sleep(POLL_S)

    def is_quiet(self) -> bool:
        replicas = self.replicas()
        busy = any(
            replica["in_flight_requests"]
            or replica["load"]["num_running_requests"]
            or replica["load"]["num_waiting_requests"]
            for replica in replicas
        )
        used = {replica["id"]: replica["load"]["num_kv_blocks_used"] for replica in replicas}
        return not busy and used == self.baseline

    def quiet(self, deadline_s: float = 20.0) -> None:
        """Waits until nothing is in flight and used KV blocks are back at the baseline. The deadline is shorter than
        a hand-off's lease, so that blocks which only the lease gives back are found."""
        self.wait(self.is_quiet, f"nothing in flight and used KV blocks at {self.baseline}", deadline_s)

    def ask_known(self) -> str:
        response = self.http.post("/v1/chat/completions", json=KNOWN_CHAT)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def is_unharmed(self) -> None:
        """Asserts that both engines are attached and a known question gets the answer it got at the start."""
        assert all(replica["attached"] and replica["ready"] for replica in self.replicas())
        assert self.ask_known() == self.known_answer
        self.quiet()


def unique_tokens(count: int) -> list[int]:
    """A prompt that no cache has seen, as token ids."""
    return [random.randrange(20, 1500) for _ in range(count)]


def unique_text(words: int) -> str:
    """A prompt that no cache has seen, as text."""
    return " ".join(f"{random.choice('abcdefghijklm')}{random.randrange(1000)}" for _ in range(words))


def is_openai_error(status: int, body: Any) -> bool:
    """Whether `body` is an error in OpenAI's shape with the code of its HTTP status."""
    error = body.get("error") if isinstance(body, Mapping) else None
    return (
        isinstance(error, Mapping)
        and set(error) == {"message", "type", "param", "code"}
        and isinstance(error["message"], str)
        and bool(error["message"])
        and isinstance(error["type"], str)
        and error["code"] == status
    )


def is_anthropic_error(body: Any) -> bool:
    kinds = {
        "invalid_request_error", "not_found_error", "request_too_large", "api_error", "overloaded_error",
        "rate_limit_error", "authentication_error", "permission_error",
    }  # fmt: skip
    return (
        isinstance(body, Mapping)
        and body.get("type") == "error"
        and set(body["error"]) == {"type", "message"}
        and body["error"]["type"] in kinds
        and bool(body["error"]["message"])
    )
