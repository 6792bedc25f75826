"""`baton serve configs/simulated.yaml`: it streams an answer, and says everywhere that its engine is simulated."""

from pathlib import Path

from openai import OpenAI
from typer.testing import CliRunner

from gateway import cli, client
from tests.cluster.running import running

CONFIG = Path(__file__).parents[2] / "configs" / "simulated.yaml"


def test_a_simulated_engine_streams_a_chat_and_is_called_simulated_everywhere() -> None:
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
