"""Owns the one server that all tests of this folder share: `baton serve` over real engines, started as a user would."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import yaml

from engine.ports import free_ports
from tests.api.live import MAX_BODY_BYTES, Live

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 60.0
TEST_TIMEOUT_S = 480


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that uses the server also pays for its start."""
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))
            if "live" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.engines)


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """BATON_TEST_URL names a server that runs already; without it one is started, and must end well."""
    if url := os.environ.get("BATON_TEST_URL"):
        server = Live(url)
        yield server
        server.close()
        return
    folder = tmp_path_factory.mktemp("baton")
    port = free_ports("127.0.0.1")[0]
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config()))
    log_path = folder / "serve.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.cli", "serve", str(config), "--port", str(port), "--no-demo"],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log_path)
        server = Live(url)
        yield server
        server.close()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_DEADLINE_S)
    assert code == 0, f"baton serve exited with {code}:\n{log_path.read_text()}"


@pytest.fixture(scope="session")
def dialogues() -> ModuleType:
    """What the shipped model has learnt by heart; it lies with the model, not in a package."""
    path = ROOT / "configs/models/mini/training/dialogues.py"
    spec = importlib.util.spec_from_file_location("mini_dialogues", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _config() -> dict:
    config = yaml.safe_load((ROOT / "configs/local.yaml").read_text())
    config["model"]["path"] = str(ROOT / "configs/models/mini")
    config["gateway"] = {"enable_docs": True, "max_body_bytes": MAX_BODY_BYTES, **config.get("gateway", {})}
    return config


def _wait_until_ready(process: subprocess.Popen, url: str, log_path: Path) -> None:
    end_s = time.monotonic() + START_DEADLINE_S
    while True:
        assert process.poll() is None, f"baton serve exited with {process.returncode}:\n{log_path.read_text()}"
        assert time.monotonic() < end_s, f"not ready within {START_DEADLINE_S:.0f} s:\n{log_path.read_text()}"
        try:
            if httpx.get(f"{url}/baton/status", timeout=5).json().get("ready"):
                return
        except (httpx.HTTPError, ValueError):
            pass
        time.sleep(0.25)
