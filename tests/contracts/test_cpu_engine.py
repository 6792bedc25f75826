"""A CPU engine is one process and stays on its cores; by name, so that an upgrade that breaks it says which."""

import inspect
from types import SimpleNamespace

from engine.protocol import Phase
from engine.vllm_engine import CPU_EXECUTOR, VllmEngineConfig, engine_arguments, environment
from engine.vllm_nixl import HandoffScheduler, cores_kept

CONFIG = VllmEngineConfig("a", "model", Phase.DECODE, {}, device="cpu", cpu_cores=(2, 3))
TWO_RANKS = VllmEngineConfig("a", "model", Phase.DECODE, {"tensor_parallel_size": 2}, device="cpu", cpu_cores=(2, 3))


def test_the_executor_is_vllms_own_and_vllm_takes_it_by_its_path():
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.executor import Executor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    assert engine_arguments(CONFIG).distributed_executor_backend == CPU_EXECUTOR
    assert resolve_obj_by_qualname(CPU_EXECUTOR) is UniProcExecutor
    parallel = SimpleNamespace(distributed_executor_backend=CPU_EXECUTOR)
    assert Executor.get_class(SimpleNamespace(parallel_config=parallel)) is UniProcExecutor


def test_vllm_still_replaces_the_short_name_on_cpus():
    from vllm.platforms.cpu import CpuPlatform

    source = inspect.getsource(CpuPlatform.check_and_update_config)
    assert 'distributed_executor_backend == "uni"' in source, "settled upstream? then docs/adr/0009 may go"


def test_engines_of_one_rank_are_bound_through_openmp_and_others_by_vllm():
    one, two = environment(CONFIG, 1), environment(TWO_RANKS, 1)
    assert (one["GOMP_CPU_AFFINITY"], one["OMP_NUM_THREADS"]) == ("2 3", "2")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in one
    assert (two["VLLM_CPU_OMP_THREADS_BIND"], two["OMP_NUM_THREADS"]) == ("2|3", "1")
    assert "GOMP_CPU_AFFINITY" not in two


def test_ranks_are_processes_of_vllms_own_although_the_replica_is_in_a_placement_group():
    from vllm.config.parallel import ParallelConfig

    assert engine_arguments(TWO_RANKS).distributed_executor_backend == "mp"
    source = inspect.getsource(ParallelConfig.__post_init__)
    assert "get_current_placement_group()" in source, "vLLM takes no notice of it any more? then `mp` need not be named"


def test_vllm_wants_as_many_sets_of_cores_as_ranks():
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    source = inspect.getsource(OMPProcessManager)
    assert 'omp_cpuids_list = vllm_mask.split("|")' in source
    assert "len(omp_cpuids_list) == self.local_world_size" in source


def test_vllm_preloads_the_openmp_library_that_reads_our_variable():
    from vllm.platforms.cpu import CpuPlatform

    assert "libgomp" in inspect.getsource(CpuPlatform.check_and_update_config)


def test_the_connector_pins_only_to_what_the_call_that_we_silence_tells_it():
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
    from vllm.platforms import current_platform

    source = inspect.getsource(NixlBaseConnectorWorker.__init__)
    assert "numa_core_list = current_platform.discover_numa_topology()" in source
    assert "os.sched_setaffinity(0, rsv_cores_for_kv)" in source, "gone upstream? then cores_kept may go"
    before = current_platform.discover_numa_topology()
    with cores_kept():
        assert current_platform.discover_numa_topology() == []
    assert current_platform.discover_numa_topology() == before


class _Request(SimpleNamespace):
    request_id = "r"


def _matched(num_prompt: int, num_remote: int, num_local: int) -> tuple[int, bool]:
    scheduler = object.__new__(HandoffScheduler)
    scheduler._prefill_backoff = lambda: 0
    scheduler.kv_recompute_threshold = 0
    params = {"do_remote_prefill": True, "remote_num_tokens": num_remote}
    request = _Request(prompt_token_ids=[1] * num_prompt, num_prompt_tokens=num_prompt, kv_transfer_params=params)
    return scheduler.get_num_new_matched_tokens(request, num_local)


def test_the_scheduler_fetches_what_the_hand_off_covers():
    assert _matched(100, 100, 0) == (100, True)
    assert _matched(101, 100, 0) == (100, True)
    assert _matched(101, 100, 64) == (36, True)
    assert _matched(97, 96, 96) == (0, False)
    assert _matched(130, 100, 128) == (0, False)


def test_a_request_without_a_hand_off_fetches_nothing():
    scheduler = object.__new__(HandoffScheduler)
    request = _Request(prompt_token_ids=[1] * 9, num_prompt_tokens=9, kv_transfer_params=None)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
