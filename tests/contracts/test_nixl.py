"""Every internal of NIXL that Baton touches, by name: when an upgrade breaks one, the failing test says which."""

import inspect
import time
import uuid
from queue import Queue
from types import SimpleNamespace

import pytest


def test_the_pinned_version_is_installed():
    from importlib.metadata import version

    assert version("nixl") == "1.5.1"


def test_the_wrapper_sets_the_delay_to_zero_just_before_it_makes_the_agent():
    from nixl_cu12 import _api

    source = inspect.getsource(_api.nixl_agent.__init__)
    assert "agent_config.pthrDelay = 0" in source, "a setting upstream? then engine/vllm_nixl.py may go"
    assert "self.agent = nixlBind.nixlAgent(agent_name, agent_config)" in source


def test_vllm_takes_its_agent_from_the_module_we_patch():
    from nixl._api import nixl_agent
    from nixl_cu12 import _api

    assert nixl_agent is _api.nixl_agent


def test_agents_made_in_our_context_get_the_delay_and_later_ones_do_not(monkeypatch):
    from nixl_cu12 import _api

    from engine.vllm_nixl import progress_thread_delay

    delays = []
    make_agent = _api.nixlBind.nixlAgent

    def record(name, config):
        delays.append(config.pthrDelay)
        return make_agent(name, config)

    monkeypatch.setattr(_api.nixlBind, "nixlAgent", record)
    with progress_thread_delay(100):
        _api.nixl_agent(str(uuid.uuid4()), _api.nixl_agent_config(backends=[]))
    _api.nixl_agent(str(uuid.uuid4()), _api.nixl_agent_config(backends=[]))
    assert delays == [100, 0]


class Wire:
    """The NIXL agent of a fetch that has just succeeded."""

    def check_xfer_state(self, handle):
        return "DONE"

    def get_xfer_telemetry(self, handle):
        return None

    def release_xfer_handle(self, handle):
        pass


def fetching_worker(lease_s):
    """The worker side with one fetch under way, whose lease ends in so many seconds; None: nobody has told when."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata

    from engine.vllm_engine import LEASE_END_KEY
    from engine.vllm_nixl import HandoffWorker

    names = ("remote_block_ids", "remote_engine_id", "remote_request_id", "remote_host", "remote_port")
    told = dict.fromkeys(names) | ({} if lease_s is None else {LEASE_END_KEY: time.time() + lease_s})
    metadata = NixlConnectorMetadata()
    metadata.add_new_req_to_recv("r", ([7],), told, awaiting_kvs=True)
    meta = metadata.reqs_to_recv["r"]
    worker = HandoffWorker.__new__(HandoffWorker)
    vars(worker).update(
        nixl_wrapper=Wire(),
        xfer_stats=SimpleNamespace(record_transfer=lambda told: None, record_kv_expired_req=lambda: None),
        _recving_metadata={"r": meta},
        _recving_transfers={"r": [1]},
        _recv_failures=set(),
        _failed_recv_reqs=Queue(),
    )
    return worker, meta


@pytest.mark.parametrize(("lease_s", "failed"), [(3600.0, set()), (-1.0, {"r"}), (None, {"r"})])
def test_what_has_come_after_its_lease_is_a_failed_fetch(lease_s, failed):
    worker, _ = fetching_worker(lease_s)
    assert worker._pop_done_transfers(worker._recving_transfers) == ({"r"}, failed)


def test_nothing_is_fetched_after_its_lease():
    worker, meta = fetching_worker(-1.0)
    worker._read_blocks_for_req("r", meta)
    assert worker._recv_failures == {"r"}
