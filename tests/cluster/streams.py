"""Owns streams of a test to a running Baton: each over a connection of its own, read by a thread of its own."""

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx

PATIENCE_S = 60.0


def body(max_tokens: int) -> dict[str, Any]:
    return {
        "model": "baton-mini",
        "messages": [{"role": "user", "content": "What is Baton?"}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Stream:
    """One streamed chat. Times are of the monotonic clock."""

    def __init__(self, url: str, max_tokens: int, headers: Mapping[str, str] | None = None) -> None:
        self.max_tokens = max_tokens
        self.status: int | None = None
        self.request_id = ""
        self.text = ""
        self.num_tokens: int | None = None
        self.error: dict[str, Any] | None = None
        self.broken: httpx.HTTPError | None = None
        self.is_done = False
        self.ended_s: float | None = None
        self._thread = threading.Thread(target=self._read, args=(url, headers), daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return (
            f"Stream({self.request_id}: status {self.status}, {self.num_tokens} tokens, error {self.error}, "
            f"broken {self.broken!r}, done {self.is_done})"
        )

    @property
    def has_begun(self) -> bool:
        return bool(self.text)

    @property
    def has_ended(self) -> bool:
        return self.ended_s is not None

    @property
    def is_complete(self) -> bool:
        """Every token and [DONE], and nothing else."""
        return self.is_done and self.num_tokens == self.max_tokens and self.error is None and self.broken is None

    def join(self) -> None:
        """Waits for its end, which `httpx` bounds: nothing came for `PATIENCE_S`."""
        self._thread.join()

    def _read(self, url: str, headers: Mapping[str, str] | None) -> None:
        path, asked = f"{url}/v1/chat/completions", body(self.max_tokens)
        try:
            with httpx.stream("POST", path, json=asked, headers=headers, timeout=PATIENCE_S) as response:
                self.status = response.status_code
                self.request_id = response.headers.get("x-baton-request-id", "")
                for line in response.iter_lines():
                    self._take(line)
        except httpx.HTTPError as error:
            self.broken = error
        finally:
            self.ended_s = time.monotonic()

    def _take(self, line: str) -> None:
        data = line.removeprefix("data: ")
        if data == line:
            return
        if data == "[DONE]":
            self.is_done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self.error = chunk["error"]
            return
        for choice in chunk["choices"]:
            self.text += choice["delta"].get("content") or ""
        if chunk.get("usage"):
            self.num_tokens = chunk["usage"]["completion_tokens"]
