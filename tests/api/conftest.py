"""Owns the one server that all tests of this folder share: `baton serve` over real engines, started as a user would."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.api.live import MAX_BODY_BYTES, ROOT, Live, local_config, served

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
    with served(_config(), tmp_path_factory.mktemp("baton")) as url:
        server = Live(url)
        yield server
        server.close()


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
    config = local_config()
    config["gateway"] = {"enable_docs": True, "max_body_bytes": MAX_BODY_BYTES, **config.get("gateway", {})}
    return config
