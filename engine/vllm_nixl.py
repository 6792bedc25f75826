"""Owns Baton's subclass of vLLM's NIXL connector: its progress thread does not spin a core, a CPU engine stays on the
cores it was given, and a prompt may be longer on decode than on prefill.

vLLM loads this module by name (`kv_connector_module_path`) inside the engine's processes. Why: docs/adr/0003, 0009,
0010.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

PROGRESS_THREAD_DELAY_KEY = "progress_thread_delay_us"


class NixlConnector(NixlPullConnector):
    """NixlPullConnector whose NIXL agent sleeps `progress_thread_delay_us` between progress polls, and whose scheduler
    side fetches what a hand-off covers.

    The name is vLLM's own because vLLM compares connector names to choose memory layouts.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        assert vllm_config.kv_transfer_config is not None
        delay_us = int(vllm_config.kv_transfer_config.get_from_extra_config(PROGRESS_THREAD_DELAY_KEY, 0))
        with progress_thread_delay(delay_us), cores_kept():
            super().__init__(vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self.connector_scheduler = HandoffScheduler(vllm_config, self.engine_id, kv_cache_config)


class HandoffScheduler(NixlPullConnectorScheduler):
    """Fetches the tokens that the hand-off covers; vLLM's own takes it that this is the whole prompt.

    A prompt that ends with tokens of the answer is longer than what prefill has read (docs/adr/0010).
    """

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        count, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
        params = request.kv_transfer_params
        if not asynchronous or not params or not params.get("do_remote_prefill"):
            return count, asynchronous
        count -= max(request.num_prompt_tokens - params["remote_num_tokens"], 0)
        return (count, True) if count > 0 else (0, False)


@contextlib.contextmanager
def cores_kept() -> Iterator[None]:
    """The connector made in this context leaves the calling thread on its cores.

    vLLM's moves the thread that computes the model to the last core of the machine, so that all CPU engines of a
    machine share that one core (docs/adr/0009).
    """
    with mock.patch.object(current_platform, "discover_numa_topology", return_value=[], create=True):
        yield


@contextlib.contextmanager
def progress_thread_delay(delay_us: int) -> Iterator[None]:
    """NIXL agents created in this context poll for progress every `delay_us` microseconds, not without a pause.

    NIXL's Python wrapper sets `nixlAgentConfig.pthrDelay = 0` just before it makes the agent and offers no setting.
    """
    from nixl_cu12 import _api

    make_agent = _api.nixlBind.nixlAgent

    def make_calm_agent(name: str, config: Any) -> Any:
        config.pthrDelay = delay_us
        return make_agent(name, config)

    with mock.patch.object(_api.nixlBind, "nixlAgent", make_calm_agent):
        yield
