"""Owns tiny traces in the published formats, for tests."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BLOCK = 64
TOOLS, SYSTEM = 128, 64


def request(t: float, blocks: Sequence[int], out: int, think_s: float = 0.0, extra_tokens: int = 0) -> dict[str, Any]:
    """`extra_tokens` stand behind the last full block."""
    return {
        "t": t,
        "type": "n",
        "in": len(blocks) * BLOCK + extra_tokens,
        "out": out,
        "hash_ids": list(blocks),
        "stop": "tool_use",
        "api_time": 2.0,
        "think_time": think_s,
    }


def agent(t: float, duration_s: float, requests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "t": t,
        "type": "subagent",
        "duration_ms": duration_s * 1000,
        "requests": list(requests),
        "tool_tokens": TOOLS,
        "system_tokens": 0,
    }


def write_session(path: Path, requests: Sequence[dict[str, Any]], **fields: Any) -> Path:
    content = {"block_size": BLOCK, "tool_tokens": TOOLS, "system_tokens": SYSTEM, "requests": list(requests), **fields}
    path.write_text(json.dumps(content))
    return path


def write_sessions(folder: Path, number: int) -> Path:
    """Sessions of three turns, each with a child that the last turn waits for."""
    folder.mkdir(exist_ok=True)
    for index in range(number):
        blocks = list(range(1, 40 + index))
        requests = [
            request(0.0, blocks, 20, extra_tokens=5),
            request(7.0, [*blocks, 900, 901], 30, 5.0),
            agent(19.0, 9.0, [request(0.0, [1, 2, 500, 501], 10), request(4.0, [1, 2, 500, 501, 502], 10, 2.0)]),
            request(21.0, [*blocks, 900, 901, 902], 25, 12.0),
        ]
        write_session(folder / f"trace_{index}.json", requests)
    return folder


def write_mooncake(path: Path, rows: Sequence[tuple[float, int, int, Sequence[int]]]) -> Path:
    """Rows of timestamp in ms, input and output tokens, block ids."""
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path
