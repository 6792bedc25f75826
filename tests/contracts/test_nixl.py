"""Every internal of NIXL that Baton touches, by name: when an upgrade breaks one, the failing test says which."""

import inspect
import os
import time
import uuid
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import pytest
import zmq


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


REMOTE = {
    "remote_block_ids": ([1, 2],),
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "h",
    "remote_port": 1,
    "remote_num_tokens": 50,
}
"""What a hand-off over 50 tokens says."""


class Blocks:
    """What vLLM's scheduler has allocated for a request that has nothing cached."""

    blocks = ((),)

    def get_unhashed_block_ids_all_groups(self):
        return ([7, 8],)


def fetching_scheduler(kind, bidirectional=False):
    scheduler = kind.__new__(kind)
    vars(scheduler).update(
        use_host_buffer=False,
        is_bidirectional_kv_xfer_enabled=bidirectional,
        kv_recompute_threshold=0,
        _reqs_in_batch=set(),
        _reqs_need_recv={},
        _heartbeat_req_engine={},
        _prefill_backoff=lambda: 0,
        get_exchange_clipped_blocks=lambda block_ids: block_ids,
    )
    return scheduler


def prefill_request(**params):
    return SimpleNamespace(
        request_id="p",
        num_prompt_tokens=80,
        prompt_token_ids=list(range(80)),
        status=None,
        kv_transfer_params=REMOTE | {"do_remote_decode": True} | params,
    )


def test_prefill_fetches_what_the_handoff_covers_beyond_its_cache_and_notes_the_fetch():
    from engine.vllm_nixl import HandoffScheduler

    scheduler, request = fetching_scheduler(HandoffScheduler), prefill_request(do_remote_prefill=True)
    assert scheduler.get_num_new_matched_tokens(request, 32) == (18, True)
    assert scheduler.get_num_new_matched_tokens(request, 64) == (0, False)
    scheduler.update_state_after_alloc(request, Blocks(), 50)
    assert scheduler._reqs_need_recv["p"][1:] == (([7, 8],), (0,), True)
    assert scheduler._reqs_in_batch == {"p"}, "the worker must know of it, or its own hand-off is never freed"


def test_a_fetch_that_has_failed_is_not_waited_for_again():
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    from engine.vllm_nixl import HandoffScheduler

    outcomes = {}
    for kind in (HandoffScheduler, NixlPullConnectorScheduler):
        scheduler, request = fetching_scheduler(kind), prefill_request(do_remote_prefill=True)
        scheduler.update_state_after_alloc(request, Blocks(), 50)
        outcomes[kind] = scheduler.get_num_new_matched_tokens(request, 0)
    assert outcomes[HandoffScheduler] == (0, False)
    assert outcomes[NixlPullConnectorScheduler] == (50, True), "mended upstream? then the guard may go"


def test_a_prefill_request_that_is_aborted_before_its_fetch_gives_the_handoff_back():
    from engine.vllm_nixl import HandoffScheduler

    scheduler, request = fetching_scheduler(HandoffScheduler), prefill_request(do_remote_prefill=True)
    assert scheduler.request_finished(request, ([],)) == (False, None)
    assert scheduler._reqs_need_recv["p"][1] == [], "nothing is read: decode is only told"


def test_only_a_consumer_is_kept_from_fetching_into_blocks_that_a_step_may_write():
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.__init__)
    assert "if multiple_inflight_batches and kv_transfer_config.is_kv_consumer:" in source, (
        "why prefill is kv_both with handoff.reverse (engine/vllm_engine.py)"
    )


@pytest.mark.parametrize(("reverse", "role"), [(False, "kv_producer"), (True, "kv_both")])
def test_a_setting_makes_prefill_fetch_too(reverse, role, monkeypatch):
    from engine.protocol import Phase
    from engine.vllm_engine import engine_arguments
    from gateway.app import engine_spec
    from gateway.settings import load

    monkeypatch.setenv("BATON_HANDOFF__REVERSE", str(reverse))
    settings = load(Path(__file__).parents[2] / "configs" / "local.yaml")
    configs = {phase: engine_spec(settings, phase).engine_config("r", [0], "127.0.0.1") for phase in Phase}
    found = {phase: engine_arguments(config).kv_transfer_config["kv_role"] for phase, config in configs.items()}
    assert found == {Phase.PREFILL: role, Phase.DECODE: "kv_consumer"}
    assert {config.reverse for config in configs.values()} == {reverse}


def test_nobody_else_gets_the_port_of_an_engine_that_starts(monkeypatch):
    from engine import ports
    from engine.vllm_engine import VllmEngine, VllmEngineConfig

    class Loaded(Exception):
        pass

    def load(_config):
        port = int(os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"])
        monkeypatch.setattr(ports.random.SystemRandom, "sample", lambda *_: [port])
        with pytest.raises(OSError, match="no 1 free ports"):
            ports.free_ports("127.0.0.1")
        with zmq.Context() as context, context.socket(zmq.ROUTER) as listener:
            listener.bind(f"tcp://127.0.0.1:{port}")
        raise Loaded

    monkeypatch.setattr(VllmEngine, "_start_processes", load)
    with pytest.raises(Loaded):
        VllmEngine._start(VllmEngineConfig(replica_id="one", model="nowhere", phase=None, engine_args={}, device="cpu"))
