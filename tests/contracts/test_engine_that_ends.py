"""An EngineCore that is told to end aborts what it holds; Baton takes that for the loss of the engine."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.engine.core import EngineCoreProc

from engine.load import Ledger
from engine.protocol import EngineGoneError
from engine.vllm_engine import VllmEngine


def engine_with(request_ids: tuple[str, ...], outputs: EngineCoreOutputs) -> Any:
    """An engine without processes that holds these requests and is told these outputs."""

    async def get_output_async() -> EngineCoreOutputs:
        return outputs

    engine: Any = VllmEngine.__new__(VllmEngine)
    engine._config = SimpleNamespace(replica_id="decode-0")
    engine._client = SimpleNamespace(get_output_async=get_output_async)
    engine._outputs = SimpleNamespace(close=lambda: None)
    engine._ledger = Ledger()
    for request_id in request_ids:
        engine._ledger.began(request_id, 10)
    engine._step = lambda _outputs: "a step"
    return engine


def aborted(request_id: str) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[EngineCoreOutput(request_id, [], finish_reason=FinishReason.ABORT)])


def test_an_engine_core_that_gets_sigterm_tells_of_an_abort_of_each_request() -> None:
    source = inspect.getsource(EngineCoreProc._handle_shutdown)
    assert "self._send_abort_outputs(aborted_reqs)" in source
    assert "FinishReason.ABORT" in inspect.getsource(EngineCoreProc._send_abort_outputs_to_client)


def test_an_engine_core_sets_its_handler_before_it_makes_its_worker() -> None:
    """Or the worker's way with SIGTERM would not last (`engine.vllm_cpu_worker`)."""
    source = inspect.getsource(EngineCoreProc.run_engine_core)
    assert source.count("signal.signal(signal.SIGTERM, signal_handler)") == 1
    assert source.index("signal.signal(signal.SIGTERM, signal_handler)") < source.index("engine_core = EngineCoreProc(")


async def test_an_abort_that_nobody_asked_for_is_the_end_of_the_engine() -> None:
    with pytest.raises(EngineGoneError, match="decode-0 ends itself"):
        await anext(engine_with(("mine",), aborted("mine")).steps())


async def test_the_abort_of_a_request_that_is_not_held_is_a_step_like_any_other() -> None:
    assert await anext(engine_with(("mine",), aborted("given-back")).steps()) == "a step"
