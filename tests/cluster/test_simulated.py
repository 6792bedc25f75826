"""`baton serve configs/simulated.yaml`: it streams an answer, and says everywhere that its engine is simulated."""

from pathlib import Path

from openai import OpenAI
from typer.testing import CliRunner

from engine.ports import free_ports
from gateway import cli, client
from tests.cluster.running import Run

CONFIG = Path(__file__).parents[2] / "configs" / "simulated.yaml"


def test_a_simulated_engine_streams_a_chat_and_is_called_simulated_everywhere() -> None:
    (port,) = free_ports("127.0.0.1")
    run = Run(CONFIG, port, "gateway.app:build")
    try:
        run.wait_for("Ctrl-C stops it")
        url = f"http://127.0.0.1:{port}"
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

        run.process.terminate()
        assert run.exit_code() == 0
        assert run.output.count("simulated engines, no model") == 2
        assert "(simulated)" in run.output
        run.assert_nothing_left()
    finally:
        run.sweep()
