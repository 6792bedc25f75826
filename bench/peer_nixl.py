"""Owns the connector of vLLM servers behind another router: Baton's, for hand-offs of which nobody tells the lease.

Baton's own engines tell it with each hand-off, and what has none is read anew. A router passes on what vLLM's server
says, which does not; behind it that would be every prompt.
"""

from unittest import mock

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
from vllm.v1.kv_cache_interface import KVCacheConfig

from engine import vllm_nixl


class TrustingWorker(vllm_nixl.HandoffWorker):
    """Takes it, as vLLM's own does, that blocks are kept until they are fetched."""

    @staticmethod
    def _holds(meta: ReqMeta) -> bool:
        return True


class NixlConnector(vllm_nixl.NixlConnector):
    """vLLM compares connector names to choose memory layouts, so it has its name."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        with mock.patch.object(vllm_nixl, "HandoffWorker", TrustingWorker):
            super().__init__(vllm_config, role, kv_cache_config)
