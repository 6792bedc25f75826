"""`bench compare` over HTTP against a real server that runs already: figures, what its pools held, the page."""

import subprocess
import sys
from pathlib import Path

import msgspec

from bench.compare_report import CompareReport
from bench.results import EngineKind
from tests.api.live import ROOT, Live

PATIENT_MS = 1e5
"""A machine that is busy with something else makes the generator late; that is not what is tested."""


def test_a_running_server_is_compared_with_itself(live: Live, tmp_path: Path) -> None:
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    words = [
        f"one={live.url}", f"other={live.url}", "--rates", "1", "--rounds", "1", "--duration-s", "4", "--drain-s", "1",
        "--max-lateness-ms", f"{PATIENT_MS:g}", "--html", str(page), "--json", str(figures), "--check",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "bench", "compare", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = msgspec.json.decode(figures.read_bytes(), type=CompareReport)
    assert report.complete
    assert report.engines == {EngineKind.VLLM}, "Baton tells"
    assert [run.system for run in report.runs] == ["one", "other"]
    for run in report.runs:
        assert run.load.figures is not None
        assert run.load.figures.num_failed == 0
        assert run.load.figures.cached_share is not None
        assert {sample.pool for sample in run.load.pools} == {"prefill", "decode"}
        assert run.load.use.kv_moved_bytes is not None
        assert run.load.use.processes, "it runs on this machine"
    assert "other against one in one round, which may be chance" in done.stdout
    assert "other against one in one round, which may be chance" in page.read_text()
