"""The command line: bad input is one readable line and a non-zero exit; good input reaches the gateway."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway import cli, doctor, launcher
from gateway.agents.tenants import Tenants
from gateway.app import tenants
from gateway.doctor import Check, Outcome
from gateway.receipt_log import ReceiptLog
from gateway.routing.policies import POLICIES
from gateway.runtime.control import OrderFailed, Switch, Switched
from gateway.runtime.environment import RunPaths
from gateway.settings import Settings, load
from tests.unit.gateway.driver import taking_orders
from tests.unit.gateway.test_replay import receipt

CONFIG = """
model: {path: /no/such/model, served_name: tiny}
pools: {decode: {device: cpu}}
"""
STATUS = {
    "model": "tiny",
    "ready": True,
    "version": "0.1.0",
    "pools": {
        "prefill": [],
        "decode": [
            {
                "id": "decode-1",
                "phase": "decode",
                "attached": True,
                "in_flight_requests": 3,
                "in_flight_tokens": 210,
                "info": {"num_kv_blocks": 200},
                "load": {"num_running_requests": 2, "num_kv_blocks_used": 50, "kv_bytes_received_total": 2048},
            }
        ],
    },
}
RECEIPT = {
    "request_id": "request-1",
    "policy": "least-tokens",
    "reason": "shortest queue",
    "placement": {"prefill": "prefill-1", "decode": "decode-1"},
    "outcome": {
        "ttft_ms": 81.6,
        "prompt_tokens": 40,
        "reused_tokens": 32,
        "output_tokens": 2,
        "kv_blocks_moved": 1,
        "kv_bytes_moved": 1048576,
        "faults": ["prefill-2 broke off"],
    },
}


class Gateway:
    """A stand-in for a running gateway, on a real socket. `bodies` are the chats it was sent, `keys` the keys that
    came with requests; with an `api_key` it asks for that."""

    def __init__(self) -> None:
        self.api_key: str | None = None
        self.keys: list[str | None] = []
        self.bodies: list[dict[str, Any]] = []
        self.chat_status = 200
        self.chat_lines = [
            'data: {"choices": [{"delta": {"role": "assistant"}}]}',
            'data: {"choices": [{"delta": {"content": "forty"}}]}',
            ": a comment",
            'data: {"choices": [{"delta": {"content": "-two"}, "finish_reason": "stop"}]}',
            "data: [DONE]",
        ]
        self.headers = {"x-baton-request-id": "request-1"}
        self.status = STATUS
        self.policies: dict[str, Any] = {}
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self._is_unknown():
                    return
                answers = {
                    "/v1/models": {"data": [{"id": "tiny"}]},
                    "/baton/status": gateway.status,
                    "/baton/policies": gateway.policies,
                    "/baton/receipts/request-1": RECEIPT,
                }
                answer = answers.get(self.path)
                self._send(200 if answer else 404, json.dumps(answer or {"detail": "no such receipt"}))

            def _is_unknown(self) -> bool:
                key = self.headers.get("authorization")
                gateway.keys.append(key)
                is_unknown = gateway.api_key is not None and key != f"Bearer {gateway.api_key}"
                if is_unknown:
                    self._send(401, json.dumps({"error": {"message": "no tenant has this API key"}}))
                return is_unknown

            def do_POST(self) -> None:
                if self._is_unknown():
                    return
                gateway.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                if gateway.chat_status != 200:
                    self._send(gateway.chat_status, json.dumps({"error": {"message": "the queue is full"}}))
                else:
                    self._send(200, "\n\n".join(gateway.chat_lines) + "\n\n")

            def _send(self, status: int, body: str) -> None:
                self.send_response(status)
                for name, value in gateway.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway()
    yield server
    server.close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def baton(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


def complaint(result: Result) -> str:
    """The one line of a refusal."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("baton: ")
    return lines[0]


@pytest.mark.parametrize("command", [(), ("serve",), ("ask",), ("status",), ("doctor",)])
def test_every_command_and_option_explains_itself(command: tuple[str, ...]) -> None:
    result = baton(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output


@pytest.mark.parametrize(
    "arguments",
    [("serve",), ("ask",), ("serve", "x.yaml", "--port", "0"), ("serve", "x.yaml", "--port", "http"), ("fly",)],
)
def test_wrong_usage_is_refused_without_a_traceback(arguments: tuple[str, ...]) -> None:
    result = baton(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# ask


def test_ask_prints_the_answer_and_on_demand_its_receipt(gateway: Gateway) -> None:
    assert baton("ask", "what?", "--url", gateway.url).stdout == "forty-two\n"
    result = baton("ask", "what?", "--url", gateway.url, "--receipt")
    assert result.exit_code == 0
    for expected in (
        "receipt request-1: prefill prefill-1 -> decode decode-1 (policy least-tokens: shortest queue)",
        "TTFT 82 ms, 40 prompt tokens, 32 reused, 2 output tokens, 1 KV blocks moved (1.0 MiB)",
        "faults: prefill-2 broke off",
    ):
        assert expected in result.stdout


def test_ask_sends_what_it_was_told(gateway: Gateway) -> None:
    options = ("--model", "other", "--max-tokens", "7", "--system", "be brief")
    baton("ask", "-", "--url", gateway.url, *options, stdin="from a pipe")
    assert gateway.bodies == [
        {
            "model": "other",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "from a pipe"}],
            "stream": True,
            "max_tokens": 7,
        }
    ]


def test_ask_takes_the_model_that_is_served(gateway: Gateway) -> None:
    baton("ask", "what?", "--url", gateway.url)
    assert gateway.bodies[0]["model"] == "tiny"


def test_ask_refuses_an_empty_prompt(gateway: Gateway) -> None:
    assert "the prompt is empty" in complaint(baton("ask", "  ", "--url", gateway.url))
    assert gateway.bodies == []


def test_ask_tells_why_the_gateway_refused(gateway: Gateway) -> None:
    gateway.chat_status = 503
    assert "/v1/chat/completions answered 503: the queue is full" in complaint(baton("ask", "x", "--url", gateway.url))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['data: {"choices": [{"delta": {"content": "for"}}]}'], "the connection closed before the end"),
        (['data: {"error": {"message": "the engine died"}}', "data: [DONE]"], "the engine died"),
        (["data: <html>", "data: [DONE]"], "not a Baton gateway"),
    ],
    ids=["cut", "error", "garbage"],
)
def test_ask_never_takes_a_broken_answer_for_a_whole_one(gateway: Gateway, lines: list[str], says: str) -> None:
    gateway.chat_lines = lines
    assert says in complaint(baton("ask", "x", "--model", "tiny", "--url", gateway.url))


def test_a_receipt_needs_a_baton_gateway(gateway: Gateway) -> None:
    gateway.headers = {}
    assert "it is not a Baton gateway" in complaint(baton("ask", "x", "--receipt", "--url", gateway.url))


@pytest.mark.parametrize("command", [("ask", "x"), ("status",)])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1", "no gateway at http://127.0.0.1:1; start one with"),
        ("127.0.0.1", "is not a URL; write it like"),
        ("ftp://127.0.0.1", "is not a URL; write it like"),
    ],
)
def test_an_unreachable_gateway_is_named(command: tuple[str, ...], url: str, says: str) -> None:
    assert says in complaint(baton(*command, "--url", url))


# status


def test_status_shows_replicas_load_and_kv_use_in_80_columns(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = baton("status", "--url", gateway.url)
    assert result.exit_code == 0
    for expected in ("tiny", "ready", "decode-1", "attached", "210", "2/0", "50/200 (25%)", "2.0 KiB"):
        assert expected in result.stdout


def test_status_gives_the_gateways_json(gateway: Gateway) -> None:
    assert json.loads(baton("status", "--json", "--url", gateway.url).stdout) == STATUS


def test_simulated_engines_are_called_so_in_status_and_receipt(gateway: Gateway) -> None:
    says = "simulated engines, no model"
    for arguments in (("status",), ("ask", "what?", "--receipt")):
        assert "simulated" not in baton(*arguments, "--url", gateway.url).stdout
    (replica,) = STATUS["pools"]["decode"]
    gateway.status = STATUS | {"pools": {"decode": [replica | {"info": replica["info"] | {"kind": "simulated"}}]}}
    assert f"{says}: what they answer means nothing" in baton("status", "--url", gateway.url).stdout
    shown = baton("ask", "what?", "--receipt", "--url", gateway.url).stdout
    assert "decode decode-1 (simulated) (policy" in shown
    assert "prefill-1 (simulated)" not in shown


def test_status_names_the_policies_in_use(gateway: Gateway) -> None:
    gateway.status = STATUS | {"policies": {"policy": "dynamo", "shadow_policy": None, "since_s": 0.0}}
    assert "policy dynamo, shadow none" in baton("status", "--url", gateway.url).stdout


# policy


def run_dir(folder: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """Of a local run that listens where `gateway` does."""
    monkeypatch.setattr(cli, "base_dir", lambda: folder)
    paths = RunPaths(folder / gateway.url.rpartition(":")[2])
    paths.root.mkdir()
    settings = {"model": {"path": "m"}, "pools": {"decode": {"device": "cpu"}}, "gateway": {"host": "127.0.0.9"}}
    paths.settings.write_text(Settings.model_validate(settings).model_dump_json())
    return paths


def in_use(policy: str, shadow: str | None = None) -> dict[str, Any]:
    return {"policy": policy, "shadow_policy": shadow, "since_s": 1_700_000_000.0}


def test_policy_shows_what_every_gateway_uses_since_when_and_who_did_not_answer(gateway: Gateway) -> None:
    gateway.policies = {"gateways": {"g1": in_use("dynamo"), "g2": in_use("llm-d", "dynamo")}, "missing": ["g3"]}
    result = baton("policy", "--url", gateway.url)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:3] for line in lines[2:5]] == [
        ["g1", "dynamo", "none"],
        ["g2", "llm-d", "dynamo"],
        ["g3", "did", "not"],
    ]
    assert lines[2][3].startswith("2023-11-1")


def test_policy_switches_and_waits_until_every_gateway_has_followed(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = run_dir(tmp_path, gateway, monkeypatch)
    looks: list[dict[str, Any]] = []
    old, new = in_use("dynamo", "llm-d"), in_use("round-robin", "llm-d")
    both_old, half, silent, unseen = {"g1": old, "g2": old}, {"g1": old, "g2": new}, {"g1": new}, {"g1": new}
    told = [(both_old, []), (both_old, []), (half, []), (silent, ["g2"]), (unseen, []), ({"g1": new, "g2": new}, [])]

    def look(url: str, api_key: str | None) -> dict[str, Any]:
        gateways, missing = told[len(looks)]
        looks.append({"gateways": gateways, "missing": missing})
        return looks[-1]

    monkeypatch.setattr(cli.client, "policies", look)
    monkeypatch.setattr(cli, "FOLLOW_POLL_S", 0.0)
    with taking_orders(paths.control, lambda _: Switched("round-robin", "llm-d")) as driver:
        result = baton("policy", "round-robin", "--url", gateway.url)
    assert (result.exit_code, driver.taken) == (0, [Switch("round-robin")])
    assert len(looks) == len(told)
    assert result.stdout.count("round-robin") == 2


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        (("llm-d", "--shadow", "dynamo"), Switch("llm-d", "dynamo")),
        (("--shadow", "dynamo"), Switch(shadow_policy="dynamo")),
        (("--shadow", "none"), Switch(shadow_policy=None)),
    ],
)
def test_policy_orders_what_is_named_and_no_more(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], order: Switch
) -> None:
    paths = run_dir(tmp_path, gateway, monkeypatch)
    gateway.policies = {"gateways": {"g1": in_use("llm-d")}, "missing": []}
    with taking_orders(paths.control, lambda _: Switched("llm-d", None)) as driver:
        assert baton("policy", *arguments, "--url", gateway.url).exit_code == 0
    assert driver.taken == [order]


@pytest.mark.parametrize("arguments", [("best",), ("--shadow", "best"), ("none",)])
def test_policy_refuses_unknown_names_with_the_list(gateway: Gateway, arguments: tuple[str, ...]) -> None:
    said = complaint(baton("policy", *arguments, "--url", gateway.url))
    assert "there is no policy" in said
    assert all(name in said for name in POLICIES)


def test_policy_says_why_a_run_refuses(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(switch: Switch) -> Switched:
        raise OrderFailed("no application baton")

    gateway.policies = {"gateways": {"g1": in_use("dynamo")}, "missing": []}
    with taking_orders(run_dir(tmp_path, gateway, monkeypatch).control, refuse):
        assert complaint(baton("policy", "llm-d", "--url", gateway.url)) == "baton: no application baton"


def test_policy_fails_when_a_gateway_does_not_follow(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "FOLLOW_S", 0.0)
    gateway.policies = {"gateways": {"g1": in_use("dynamo")}, "missing": []}
    with taking_orders(run_dir(tmp_path, gateway, monkeypatch).control, lambda _: Switched("llm-d", None)):
        result = baton("policy", "llm-d", "--url", gateway.url)
    assert "told llm-d, shadow none, and not all of them do so" in complaint(result)
    assert "dynamo" in result.stdout


def test_policy_touches_no_run_that_does_not_listen_at_the_url(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.policies = {"gateways": {"g1": in_use("llm-d")}, "missing": []}
    monkeypatch.setattr(cli.client, "policies", lambda url, api_key: gateway.policies)
    assert "no `baton serve` of yours" in complaint(baton("policy", "llm-d", "--url", gateway.url))
    paths = run_dir(tmp_path, gateway, monkeypatch)
    elsewhere = gateway.url.replace("127.0.0.1", "192.0.2.7")
    with taking_orders(paths.control, lambda _: Switched("llm-d", None)) as driver:
        assert "no `baton serve` of yours" in complaint(baton("policy", "llm-d", "--url", elsewhere))
        assert baton("policy", "llm-d", "--url", gateway.url.replace("127.0.0.1", "127.0.0.9")).exit_code == 0
    assert driver.taken == [Switch("llm-d")]


# serve and doctor


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_a_missing_config_is_refused(command: str, tmp_path: Path) -> None:
    assert "cannot read the config" in complaint(baton(command, str(tmp_path / "none.yaml")))


def test_serve_refuses_what_the_doctor_fails_and_starts_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "serve", lambda *_, **__: pytest.fail("it started"))
    result = baton("serve", str(config))
    assert result.exit_code == 1
    assert "model: /no/such/model does not exist; correct model.path" in result.stderr


def test_serve_hands_its_options_to_the_launcher(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Settings, bool]] = []

    def fake_serve(settings: Settings, *, demo: bool, **_: Any) -> int:
        seen.append((settings, demo))
        return 7

    monkeypatch.setattr(launcher, "serve", fake_serve)
    monkeypatch.setattr(doctor, "failures", lambda _: [])
    result = baton("serve", str(config), "--port", "9001", "--host", "127.0.0.2", "--no-demo")
    assert result.exit_code == 7
    [(settings, demo)] = seen
    assert (settings.gateway.port, settings.gateway.host, demo) == (9001, "127.0.0.2", False)


def test_doctor_reports_every_check_and_fails_on_a_failure(config: Path) -> None:
    result = baton("doctor", str(config))
    assert result.exit_code == 1
    assert "ok   python: 3.11" in result.stdout
    assert "fail model: /no/such/model does not exist; correct model.path" in result.stdout


def test_doctor_passes_with_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "check_installation", lambda _: [Check("x", Outcome.WARN, "odd", "do this")])
    monkeypatch.setattr(doctor, "check_situation", lambda _: [])
    result = baton("doctor")
    assert result.exit_code == 0
    assert result.stdout == "warn x: odd; do this\n"


def test_doctor_prints_the_configurations_schema() -> None:
    schema = json.loads(baton("doctor", "--schema").stdout)
    assert {"model", "pools", "gateway"} <= schema["properties"].keys()


# -- replay


def receipts_in(folder: Path) -> Path:
    log = ReceiptLog(folder / "gateway.jsonl", 1_000_000, lambda: None)
    log.append(receipt())
    log.close()
    return folder


def test_replay_says_that_decisions_come_out_the_same(tmp_path: Path) -> None:
    result = baton("replay", str(receipts_in(tmp_path)))
    assert (result.exit_code, result.output) == (0, "1 of 1 decisions are the same by their own policy\n")


def test_replay_says_what_another_policy_would_have_done(tmp_path: Path) -> None:
    result = baton("replay", str(receipts_in(tmp_path)), "--policy", "session-affinity")
    assert result.exit_code == 0
    assert "0 of 1 decisions are the same by session-affinity" in result.output
    assert "elsewhere: prefill 1, decode" in result.output
    found = json.loads(baton("replay", str(tmp_path), "--policy", "session-affinity", "--json").output)
    assert (found["recorded"]["read_tokens"], found["replayed"]["read_tokens"]) == (100, 4)


def test_replay_of_a_decision_that_differs_fails(tmp_path: Path) -> None:
    file = receipts_in(tmp_path) / "gateway.jsonl"
    file.write_text(file.read_text().replace("fewest tokens", "most tokens"))
    result = baton("replay", str(file))
    assert result.exit_code == 1
    assert "0 of 1" in result.output


def test_replay_says_what_receipts_of_an_earlier_version_do_not_tell(tmp_path: Path) -> None:
    file = receipts_in(tmp_path) / "gateway.jsonl"
    line = json.loads(file.read_text())
    del line["request"]["hints"]["is_retry"]
    file.write_text(json.dumps(line) + "\n")
    assert "say nothing of Hints.is_retry (1)" in baton("replay", str(file)).output
    assert json.loads(baton("replay", str(file), "--json").output)["absent"] == {"Hints.is_retry": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/file"], "/no/such/file"),
        (["."], "no receipts in ."),
        ([".", "--policy", "best"], "there is no policy 'best'; there are least-tokens, round-robin"),
    ],
)
def test_replay_says_what_it_cannot_read(arguments: list[str], message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = baton("replay", *arguments)
    assert result.exit_code == 1
    assert message in result.output


# -- keys


def test_ask_and_status_come_with_the_key_of_the_environment(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.api_key = "baton-secret"
    monkeypatch.setenv("BATON_API_KEY", gateway.api_key)
    assert baton("ask", "six times seven?", "--url", gateway.url, "--receipt").exit_code == 0
    assert baton("status", "--url", gateway.url).exit_code == 0
    # The model's name, the chat, two for its receipt, the status.
    assert gateway.keys == [f"Bearer {gateway.api_key}"] * 5


def test_without_a_key_none_is_sent(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_API_KEY", raising=False)
    assert baton("status", "--url", gateway.url).exit_code == 0
    assert gateway.keys == [None]


@pytest.mark.parametrize("command", [["status"], ["ask", "hello"]])
def test_a_gateway_that_asks_for_a_key_is_one_line_that_says_where_to_put_it(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    gateway.api_key = "baton-secret"
    monkeypatch.setenv("BATON_API_KEY", "baton-wrong")
    said = complaint(baton(*command, "--url", gateway.url))
    assert "answered 401: no tenant has this API key; set BATON_API_KEY to a key of it" in said
    assert "baton-wrong" not in said


@pytest.mark.parametrize("key", ["baton-secret\n", "baton secret", "baton-s\u00e4cret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("BATON_API_KEY", key)
    result = baton("status", "--url", gateway.url)
    assert "BATON_API_KEY holds characters that no key has" in complaint(result)
    assert key.strip() not in result.output + repr(result.exception)
    assert gateway.keys == []


def test_no_command_takes_a_key_as_an_argument() -> None:
    for command in ("ask", "status", "serve", "doctor"):
        assert not re.search(r"--\S*key", baton(command, "--help").output)


def test_status_of_a_tenant_shows_what_it_was_told_and_no_zeros(gateway: Gateway) -> None:
    told = {"id": "decode-1", "phase": "decode", "attached": True, "ready": True, "info": {"num_kv_blocks": 200}}
    gateway.status = STATUS | {"pools": {"prefill": [], "decode": [told]}}
    (row,) = [line for line in baton("status", "--url", gateway.url).output.splitlines() if "decode-1" in line]
    assert row.split() == ["decode", "decode-1", "attached", "-", "-", "-", "-", "-"]


def test_a_new_key_is_shown_once_with_what_to_put_into_the_configuration(tmp_path: Path) -> None:
    shown = [baton("key", "alice").stdout for _ in range(2)]
    keys = [re.findall(r"\bbaton-[\w-]{40,}", text) for text in shown]
    assert [len(found) for found in keys] == [1, 1]
    assert keys[0] != keys[1]
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG + shown[0][shown[0].index("tenants:") :])
    (tenant,) = tenants(load(path))
    assert tenant.name == "alice"
    assert Tenants([tenant]).of(keys[0][0].encode()) == tenant


@pytest.mark.parametrize("name", ["", "a b", "-alice", "a" * 65, "alice\n", "älice"])
def test_a_name_that_no_tenant_can_have_gets_no_key(name: str) -> None:
    said = complaint(baton("key", "--", name))
    assert "cannot name a tenant" in said
    assert "baton-" not in said
