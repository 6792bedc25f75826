"""Real faults on real engines, a few of those of `make faults`: processes are killed and stopped under clients."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from bench.fault_cases import Blow, Case, Kind, Moment, Victim
from bench.fault_site import Site
from bench.faults import run_case
from gateway.settings import load

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

CONFIG = Path(__file__).parents[2] / "configs" / "faults.yaml"
CASES = [
    Case(None, Blow.LEAVE, Moment.BEFORE_PULL),
    Case(Victim.DECODE_ACTOR, Blow.STOP, Moment.REPLAYED, Kind.PENALTIES),
    Case(Victim.PREFILL_ACTOR, Blow.KILL, Moment.PREFILLING),
    Case(Victim.DECODE_CORE, Blow.KILL, Moment.RESUMABLE),
]


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["path"] = str(CONFIG.parent / "models" / "mini")
    config["gateway"]["replicas"] = 1
    path = tmp_path_factory.mktemp("faults") / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    site = Site(path, load(path))
    try:
        await site.start()
        yield site
    finally:
        await site.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_no_client_sees_it_and_nothing_is_left(site: Site, case: Case, tmp_path: Path) -> None:
    result = await run_case(site, case, logs=tmp_path)
    assert result.problems == (), f"{result}\nlogs: {tmp_path}"
    assert result.observed.struck or not case.is_signal
