"""Owns Baton's subclass of vLLM's NIXL connector: it keeps NIXL's progress thread from spinning a core.

vLLM loads this module by name (`kv_connector_module_path`) inside the engine's processes. Why: docs/adr/0003.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector
from vllm.v1.kv_cache_interface import KVCacheConfig

PROGRESS_THREAD_DELAY_KEY = "progress_thread_delay_us"


class NixlConnector(NixlPullConnector):
    """NixlPullConnector whose NIXL agent sleeps `progress_thread_delay_us` between progress polls.

    The name is vLLM's own because vLLM compares connector names to choose memory layouts.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        assert vllm_config.kv_transfer_config is not None
        delay_us = int(vllm_config.kv_transfer_config.get_from_extra_config(PROGRESS_THREAD_DELAY_KEY, 0))
        with progress_thread_delay(delay_us):
            super().__init__(vllm_config, role, kv_cache_config)


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
