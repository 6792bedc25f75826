"""Owns Baton's subclass of vLLM's NIXL connector: its progress thread does not spin a core, a CPU engine stays on the
cores it was given, a prompt may be longer on decode than on prefill, and what was fetched after its lease is not used.

vLLM loads this module by name (`kv_connector_module_path`) inside the engine's processes. Why: docs/adr/0003, 0009,
0010, 0015.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector, connector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

logger = init_logger("vllm.baton.nixl")

PROGRESS_THREAD_DELAY_KEY = "progress_thread_delay_us"


class NixlConnector(NixlPullConnector):
    """NixlPullConnector whose NIXL agent sleeps `progress_thread_delay_us` between progress polls, whose scheduler
    side fetches what a hand-off covers, and whose worker side uses only what came while its lease held.

    The name is vLLM's own because vLLM compares connector names to choose memory layouts.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        assert vllm_config.kv_transfer_config is not None
        delay_us = int(vllm_config.kv_transfer_config.get_from_extra_config(PROGRESS_THREAD_DELAY_KEY, 0))
        make_worker = mock.patch.object(connector, "NixlPullConnectorWorker", HandoffWorker)
        with progress_thread_delay(delay_us), cores_kept(), make_worker:
            super().__init__(vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self.connector_scheduler = HandoffScheduler(vllm_config, self.engine_id, kv_cache_config)


class HandoffScheduler(NixlPullConnectorScheduler):
    """Fetches the tokens that the hand-off covers, once; vLLM's own takes it that this is the whole prompt.

    A prompt that ends with tokens of the answer is longer than what prefill has read (docs/adr/0010), and prefill
    fetches the beginning of a prompt (docs/adr/0017). For a prefill request whose fetch has failed, or that was
    preempted after it, vLLM's own waits for a second fetch that never starts.
    """

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        params = request.kv_transfer_params
        if params and params.get("_remote_blocks_processed"):
            return 0, False
        count, asynchronous = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not asynchronous or not params or not params.get("do_remote_prefill"):
            return count, asynchronous
        count -= max(request.num_prompt_tokens - params["remote_num_tokens"], 0)
        return (count, True) if count > 0 else (0, False)


class HandoffWorker(NixlPullConnectorWorker):
    """Has the prompt read anew when its blocks may not have been its own any more while they were fetched.

    vLLM trusts that the blocks are kept until they are fetched. An engine that does not run for long (its process was
    stopped, its machine swaps) or whose heartbeats do not arrive finds them given to another prompt, and the fetch
    succeeds all the same. The answer would be wrong, and all that later hit these blocks in the prefix cache.
    """

    def _read_blocks_for_req(self, req_id: str, meta: ReqMeta) -> None:
        if meta.awaiting_kvs and not self._holds(meta):
            self._note_expiry(req_id)
            self._handle_failed_transfer(req_id, None, self._recv_failures, record_failed_transfer=False)
            return
        super()._read_blocks_for_req(req_id, meta)

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        """What has come while the lease still holds was read while it held."""
        done, failed = super()._pop_done_transfers(transfers)
        for req_id in done - failed:
            if not self._holds(self._recving_metadata[req_id]):
                self._note_expiry(req_id)
                failed.add(req_id)
        return done, failed

    @staticmethod
    def _holds(meta: ReqMeta) -> bool:
        """The heartbeats of a request that waits are not counted on: nobody confirms them, and a producer that did not
        hear one in time has given the blocks away."""
        end_s = meta.remote.blocks_expiry_time if meta.remote is not None else None
        return end_s is not None and time.time() < end_s

    def _note_expiry(self, req_id: str) -> None:
        logger.warning("the lease of the hand-off of %s has ended: its prompt is read here", req_id)
        self.xfer_stats.record_kv_expired_req()


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
