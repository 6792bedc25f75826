"""The log files of a run with `logging.encoding: json`: each line an object, with the id that the client has of its
request, and nothing that clients keep to themselves."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest
import yaml

from gateway.agents.tenants import key_sha256, new_key
from gateway.runtime.local import base_dir
from tests.api.live import KNOWN, ROOT, served
from tests.cluster.running import wait_until

pytestmark = pytest.mark.timeout(240)

DEADLINE_S = 60.0
PROMPT, SESSION, WRONG_KEY, WORD = "thirteenpurpleotters", "session-of-otters", "baton-otterskey", "otters-elsewhere"
CHAT = "/v1/chat/completions"


@dataclass
class Site:
    """A running Baton, the folder of its logs, and a tenant's key."""

    url: str
    logs: Path
    key: str

    def ask(self, path: str = CHAT, **changes: Any) -> httpx.Response:
        headers = {
            "authorization": f"Bearer {self.key}", "x-baton-session": SESSION, "x-baton-tool": WORD, "user-agent": WORD,
        } | changes.pop("headers", {})  # fmt: skip
        body = KNOWN | {"messages": [{"role": "user", "content": PROMPT}]} | changes
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=DEADLINE_S)

    def gateway_lines(self) -> list[dict[str, Any]]:
        (file,) = self.logs.glob("serve/replica_baton_gateway_*.log")
        whole, _, _ = file.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def lines_of(self, response: httpx.Response) -> list[dict[str, Any]]:
        """Those that concern a request, once it has left its own."""
        request_id = response.headers["x-baton-request-id"]

        def found() -> list[dict[str, Any]]:
            return [line for line in self.gateway_lines() if line.get("baton_request_id") == request_id]

        wait_until(lambda: any("http_status" in line for line in found()), f"the line of {request_id}", DEADLINE_S)
        return found()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    key = new_key()
    config = yaml.safe_load((ROOT / "configs/simulated.yaml").read_text())
    config["model"]["path"] = str(ROOT / "configs/models/mini")
    config["logging"] = {"encoding": "json"}
    config["tenants"] = [{"name": "alice", "api_key_sha256": [key_sha256(key.encode()).hex()]}]
    with served(config, tmp_path_factory.mktemp("logs")) as url:
        yield Site(url, base_dir() / str(urlparse(url).port) / "logs" / "ray", key)


def test_a_request_leaves_a_line_with_the_id_that_its_client_has(site: Site) -> None:
    (line,) = site.lines_of(response := site.ask())
    assert response.status_code == 200
    told = {"http_method": "POST", "http_route": CHAT, "http_status": 200, "prompts": 1, "tenant": "alice"}
    assert line.items() >= told.items()
    assert line["levelname"] == "INFO"
    assert line["deployment"] == "baton_gateway"


def test_engines_call_a_request_by_serves_id_which_its_line_has_too(site: Site) -> None:
    response = site.ask()
    (line,) = site.lines_of(response)
    assert response.json()["id"] == f"chatcmpl-{line['request_id']}"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"messages": 3}, 400),
        ({"model": "no-such-model"}, 404),
        ({"priority": 7}, 400),
        ({"headers": {"x-baton-priority": WORD}}, 400),
    ],
)
def test_one_that_is_refused_leaves_a_line_too(site: Site, changes: dict[str, Any], status: int) -> None:
    response = site.ask(**changes)
    assert response.status_code == status
    assert [line["http_status"] for line in site.lines_of(response) if "http_status" in line] == [status]


def test_neither_prompts_nor_keys_nor_names_of_sessions_are_in_any_log(site: Site) -> None:
    site.ask()
    site.ask(stream=True)
    site.ask(messages=[{"role": PROMPT, "content": [PROMPT]}])
    site.ask(messages=[{"role": "user", "content": [{"type": PROMPT}]}], tools=[{"type": PROMPT}])
    site.ask(messages=[{"role": "user", "content": PROMPT * 5000}])
    site.ask(response_format={"type": "json_schema", "json_schema": {"name": PROMPT, "schema": {"type": PROMPT}}})
    site.ask(path="/v1/messages", messages=[{"role": PROMPT, "content": {}}])
    site.ask(path=f"/v1/{WORD}")
    site.ask(headers={"authorization": f"Bearer {WRONG_KEY}"})
    last = site.ask(path=f"{CHAT}?{WORD}")
    site.lines_of(last)
    files = [file for file in site.logs.rglob("*") if file.is_file() and file.suffix in (".log", ".out", ".err")]
    assert any("gateway" in file.name for file in files)
    assert any("decode" in file.name for file in files)
    for file in files:
        text = file.read_text(errors="replace")
        for secret in (PROMPT, SESSION, WRONG_KEY, WORD, site.key):
            assert secret not in text, f"{file.name}: {next(line for line in text.splitlines() if secret in line)}"


def test_an_engines_lines_are_objects_too(site: Site) -> None:
    (file,) = site.logs.glob("serve/replica_baton_decode_*.log")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (simulated,) = (line for line in lines if "is simulated" in line["message"])
    assert (simulated["levelname"], simulated["deployment"]) == ("WARNING", "baton_decode")
