"""`baton serve configs/simulated.yaml`: it streams an answer, takes a load, and says everywhere that it simulates."""

import subprocess
import sys
from pathlib import Path

import msgspec
from openai import OpenAI
from typer.testing import CliRunner

from bench.load_plan import ServerKind
from bench.load_report import LoadReport
from bench.results import EngineKind
from gateway import cli, client
from tests.cluster.running import running

CONFIG = Path(__file__).parents[2] / "configs" / "simulated.yaml"


def test_a_simulated_engine_streams_a_chat_takes_a_load_and_is_called_simulated_everywhere(tmp_path: Path) -> None:
    with running(CONFIG, "gateway.app:build") as run:
        url = f"http://127.0.0.1:{run.port}"
        chunks = list(
            OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions.create(
                model="baton-mini",
                messages=[{"role": "user", "content": "What is Baton?"}],
                max_tokens=20,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
        usage = chunks[-1].usage
        assert usage is not None
        assert usage.completion_tokens == 20

        status = client.status(url)
        (replica,) = status["pools"]["decode"]
        assert replica["info"]["kind"] == "simulated"
        assert client.simulated_replicas(status) == {replica["id"]}
        for arguments in (["status"], ["ask", "hello", "--max-tokens", "5", "--receipt"]):
            shown = CliRunner().invoke(cli.app, [*arguments, "--url", url]).stdout
            assert "simulated" in shown, shown

        load = "bench load agents --rate 10 --scale 0.02 --duration-s 3 --warm-up-s 0 --max-pause-s 0.2 --drain-s 0"
        report_file = tmp_path / "load.json"
        subprocess.run(
            [
                sys.executable,
                "-m",
                *load.split(),
                "--max-lateness-ms",
                "1000",
                "--url",
                url,
                "--json",
                str(report_file),
            ],
            cwd=CONFIG.parents[1],
            check=True,
            timeout=120,
        )
        report = msgspec.json.decode(report_file.read_bytes(), type=LoadReport)
        assert report.complete
        assert report.errors == ()
        assert (report.server.kind, report.server.engine) == (ServerKind.BATON, EngineKind.SIMULATED)
        figures, use = report.figures, report.use
        assert figures is not None
        assert figures.num_answered == figures.num_turns > 0
        assert figures.cached_share is not None
        assert figures.cached_share > 0.5, "agents share tools and system prompt, and go on with their sessions"
        assert use.kv_moved_bytes == 0, "there is no prefill pool"
        assert {"server", "router", "ray"} <= {process.role for process in use.processes}
