"""The picture: one file that needs nothing else, with every system and cell."""

import re
from dataclasses import replace
from pathlib import Path

from bench.plot import draw
from bench.results import EngineKind, Ledger
from tests.unit.bench.test_results import CELL, PLAN, SETTING, some_round


def test_a_picture_shows_every_system_and_loads_nothing(tmp_path: Path) -> None:
    book = Ledger(PLAN, SETTING)
    book.add("bare", CELL, some_round(1, 20.0))
    book.add("baton", CELL, some_round(1, 30.0))
    draw(book.report(complete=True), tmp_path / "picture.html")
    page = (tmp_path / "picture.html").read_text()
    assert '"name":"bare"' in page
    assert '"name":"baton"' in page
    assert str(CELL).replace(">", "\\u003e") in page
    assert not re.search(r"<(script|link)\b[^>]*\b(src|href)=", page)


def test_a_picture_of_simulated_engines_says_so(tmp_path: Path) -> None:
    book = Ledger(replace(PLAN, engine=EngineKind.SIMULATED, decode_step_ms=1.0), SETTING)
    draw(book.report(complete=True), tmp_path / "picture.html")
    assert "SIMULATED engines" in (tmp_path / "picture.html").read_text()
