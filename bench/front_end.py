"""Owns the system `bare` over a simulated engine: vLLM's front end in one process with the engine, and no Baton but for
the seam between the two. Usage: python -m bench.front_end CONFIG PORT"""

import sys
from types import SimpleNamespace
from typing import Any

import uvicorn
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from bench.one_engine import OneEngine
from engine.protocol import Phase
from gateway.api.engine_client import SplitEngineClient
from gateway.api.server import TASKS, command_line
from gateway.app import engine_spec, server_config
from gateway.runtime.environment import LOOPBACK
from gateway.settings import load


async def serve(config: str, port: int) -> None:
    """vLLM's application, as its own server builds it, until a signal."""
    settings = load(config)
    engine = engine_spec(settings, Phase.DECODE).simulated_engine("bench")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command_line(server_config(settings)))
    assert args is not None
    model_config = AsyncEngineArgs.from_cli_args(args).create_model_config()
    orchestrator: Any = OneEngine(engine)
    client = SplitEngineClient(VllmConfig(model_config=model_config), orchestrator)
    app = build_app(args, TASKS, model_config)
    await init_app_state(client, app.state, args, TASKS)
    # vLLM's handler of engine errors expects its own server here.
    app.state.server = SimpleNamespace()
    try:
        await uvicorn.Server(
            uvicorn.Config(app, host=LOOPBACK, port=port, log_level="warning", access_log=False)
        ).serve()
    finally:
        await engine.shutdown()


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve(sys.argv[1], int(sys.argv[2])))
