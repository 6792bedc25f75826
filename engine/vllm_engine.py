"""Owns one real vLLM engine behind the Engine port: its configuration, its requests, its outputs.

It drives vLLM's EngineCore client directly: no detokenizer, no task per request, one batch of outputs per engine
step. Text lives in the gateway (docs/adr/0001).
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil
import zmq
from vllm import __version__ as VLLM_VERSION
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NIXL_CONNECTOR_VERSION
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
)
from vllm.v1.engine import FinishReason as CoreFinishReason
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats

from engine.load import Ledger, Pace
from engine.ports import held_ports
from engine.protocol import (
    BlockChanges,
    EngineGoneError,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineStep,
    EngineTimes,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    PrefillFacts,
    TokenDelta,
)
from engine.vllm_codec import LogprobsPayload, SamplingPayload, decode_sampling, encode_logprobs
from engine.vllm_events import CacheEvents, events_config
from engine.zmq_reader import ZmqReader

NIXL_MODULE = "engine.vllm_nixl"
CPU_WORKER = "engine.vllm_cpu_worker.BatonCPUWorker"
# vLLM's default on CPUs puts the model into a worker process, and both sides spin on shared memory for each other:
# two cores for one engine (docs/adr/0009).
CPU_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
LEASE_END_KEY = "remote_blocks_expiry_time"
"""Where `engine.vllm_nixl.HandoffWorker` finds `KVHandoff.expires_s`; vLLM fills and reads it for its reverse transfer
only."""

LEASE_SHARE = 0.8
"""Of a hand-off's lease, in which decode may be given it: the rest is for its way to the fetch, and for clocks."""
PREFILL_SAMPLING = SamplingPayload(SamplingParams(max_tokens=1, temperature=0.0, detokenize=False))


@dataclass(frozen=True)
class VllmEngineConfig:
    """Everything one engine process group is started with.

    `phase` None starts an engine without a KV connector (aggregated serving). `engine_args` are fields of vLLM's
    AsyncEngineArgs. `host` is this node's address as other nodes reach it: the hand-off's side channel listens there.
    With `reverse` decode gives hand-offs and prefill fetches them (docs/adr/0017).
    """

    replica_id: str
    model: str
    phase: Phase | None
    engine_args: dict[str, Any]
    device: str = "cuda"
    cpu_cores: tuple[int, ...] = ()
    host: str = "127.0.0.1"
    lease_s: int = 30
    progress_thread_delay_us: int = 100
    ucx_tls: str | None = None
    kv_format: str = ""
    reverse: bool = False
    env: dict[str, str] = field(default_factory=dict)


def environment(config: VllmEngineConfig, side_channel_port: int) -> dict[str, str]:
    """The environment an engine's processes need. One process hosts one engine."""
    env = {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": config.host,
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel_port),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if config.device == "cpu" and config.cpu_cores:
        env["OMP_NUM_THREADS"] = str(len(config.cpu_cores))
        if _runs_in_engine_core(config):
            env["GOMP_CPU_AFFINITY"] = " ".join(map(str, config.cpu_cores))
        else:
            share = len(config.cpu_cores) // _num_ranks(config)
            env["OMP_NUM_THREADS"] = str(share)
            shares = (config.cpu_cores[start : start + share] for start in range(0, len(config.cpu_cores), share))
            env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, cores)) for cores in shares)
    if config.device == "cpu" and config.engine_args.get("enforce_eager"):
        # vLLM compiles a helper of logprobs all the same: the first request that asks for them waited 17 s for a C++
        # compiler, which the machine may not even have.
        env["TORCH_COMPILE_DISABLE"] = "1"
    if config.ucx_tls:
        env["UCX_TLS"] = config.ucx_tls
    return env | config.env


def engine_arguments(config: VllmEngineConfig) -> AsyncEngineArgs:
    """vLLM's engine arguments for one engine. Raises ValueError for an argument vLLM does not know."""
    arguments: dict[str, Any] = {
        "model": config.model,
        "disable_log_stats": False,
        # Despite its name it only makes the scheduler say how many tokens of prompts each step computes.
        "enable_logging_iteration_details": True,
        "enable_prefix_caching": True,
        "kv_events_config": events_config(),
    }
    if _num_ranks(config) > 1:
        # By itself vLLM would take the replica's placement group for one of bundles with a GPU each, and start an actor
        # in each of them.
        arguments["distributed_executor_backend"] = "mp"
    if config.device == "cpu":
        arguments["worker_cls"] = CPU_WORKER
        if _runs_in_engine_core(config):
            arguments["distributed_executor_backend"] = CPU_EXECUTOR
    if config.phase is not None:
        arguments["kv_transfer_config"] = {
            "kv_connector": "NixlConnector",
            "kv_connector_module_path": NIXL_MODULE,
            "kv_role": _kv_role(config),
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "kv_lease_duration": config.lease_s,
                "progress_thread_delay_us": config.progress_thread_delay_us,
            },
        }
    arguments |= config.engine_args
    unknown = sorted(set(arguments) - set(AsyncEngineArgs.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"vLLM has no engine argument {', '.join(unknown)}; see `python -m vllm.entrypoints.openai.api_server "
            "--help` for the names (with underscores)"
        )
    return AsyncEngineArgs(**arguments)


@contextlib.contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that start in this context; other children must not inherit an engine's."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _kv_role(config: VllmEngineConfig) -> str:
    """vLLM's scheduler keeps freed blocks from a fetch while a step may still write to them, but of a mere producer it
    takes it that it never fetches. To give hand-offs an engine need not be called a producer."""
    if config.phase is Phase.DECODE:
        return "kv_consumer"
    return "kv_both" if config.reverse else "kv_producer"


def _runs_in_engine_core(config: VllmEngineConfig) -> bool:
    """Whether a CPU engine's model runs in its EngineCore process; several ranks need a process each."""
    return _num_ranks(config) == 1


def _num_ranks(config: VllmEngineConfig) -> int:
    arguments = config.engine_args
    return arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)


class VllmEngine:
    """A vLLM engine in processes of its own. Make it with `start`."""

    def __init__(self, config: VllmEngineConfig, client: AsyncMPClient, info: EngineInfo):
        self._config = config
        self._client = client
        self._info = info
        (source,) = client.get_kv_event_sources().values()
        self._events = CacheEvents(source, info.block_size_tokens)
        self._outputs = _read_outputs(client)
        self._load = EngineLoad(num_kv_blocks_free=info.num_kv_blocks)
        self._ledger = Ledger()
        self._steps = _StepClock()

    @classmethod
    async def start(cls, config: VllmEngineConfig) -> "VllmEngine":
        """Starts the engine's processes and waits until the model is loaded (vLLM bounds the wait).

        Raises ValueError for arguments that do not fit; RuntimeError when the processes fail to start.
        """
        return cls(config, *await asyncio.to_thread(cls._start, config))

    @classmethod
    def _start(cls, config: VllmEngineConfig) -> tuple[AsyncMPClient, EngineInfo]:
        # NIXL listens when the model is loaded; if it could not, vLLM would wait for it until the start's time-out.
        with held_ports(config.host) as (port,), _variables(environment(config, port)):
            return cls._start_processes(config)

    @staticmethod
    def _start_processes(config: VllmEngineConfig) -> tuple[AsyncMPClient, EngineInfo]:
        vllm_config = engine_arguments(config).create_engine_config(UsageContext.ENGINE_CONTEXT)
        if vllm_config.kv_events_config is None or not vllm_config.kv_events_config.enable_kv_cache_events:
            raise ValueError("Baton needs the engine's KV-cache events; take kv_events_config out of engine.extra_args")
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        client = EngineCoreClient.make_async_mp_client(
            vllm_config=vllm_config, executor_class=Executor.get_class(vllm_config), log_stats=True
        )
        pids = [p.pid for p in psutil.Process().children(recursive=True) if p.pid not in before]
        model, cache = vllm_config.model_config, vllm_config.cache_config
        parallel = vllm_config.parallel_config
        info = EngineInfo(
            kind="vllm",
            model=model.model,
            max_model_len=model.max_model_len,
            block_size_tokens=cache.block_size,
            num_kv_blocks=cache.num_gpu_blocks or 0,
            kv_block_bytes=_kv_block_bytes(model, parallel, cache),
            pids=pids,
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            kv_format=kv_format(vllm_config, config.kv_format),
        )
        return client, info

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def submit(self, request: EngineRequest) -> None:
        core_request = self._core_request(request)
        self._ledger.began(request.request_id, len(request.prompt_token_ids))
        self._steps.submitted(time.monotonic())
        try:
            await self._client.add_request_async(core_request)
        except BaseException as error:
            self._ledger.ended(request.request_id)
            if isinstance(error, EngineDeadError):
                raise EngineGoneError(self._gone()) from error
            raise

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._ledger.ended(request_id)
        await self._client.abort_requests_async(list(request_ids))

    async def release(self, request_id: str, handoff: KVHandoff) -> None:
        params = SamplingParams(
            max_tokens=1, extra_args={"kv_transfer_params": msgspec.msgpack.decode(handoff.params)}, watermarking=False
        )
        request = self._make_core_request(request_id, [0], params, None, 0, abort_immediately=True)
        try:
            await self._client.add_request_async(request)
        except EngineDeadError as error:
            raise EngineGoneError(self._gone()) from error

    async def steps(self) -> AsyncIterator[EngineStep]:
        while True:
            try:
                outputs = await self._client.get_output_async()
            except EngineDeadError as error:
                self._outputs.close()
                raise EngineGoneError(self._gone()) from error
            if self._gives_up(outputs):
                self._outputs.close()
                raise EngineGoneError(
                    f"the vLLM engine of replica {self._config.replica_id} ends itself and has given up its requests"
                )
            yield self._step(outputs)

    def block_changes(self) -> AsyncIterator[BlockChanges]:
        return self._events.changes()

    async def shutdown(self) -> None:
        self._events.close()
        self._outputs.close()
        await asyncio.to_thread(self._client.shutdown, 5.0)

    def _gives_up(self, outputs: EngineCoreOutputs) -> bool:
        """Whether requests end that nobody has aborted: an EngineCore that gets SIGTERM tells so of all it holds, as if
        their clients had gone, before it exits."""
        return any(
            output.finish_reason is CoreFinishReason.ABORT and output.request_id in self._ledger
            for output in outputs.outputs
        )

    def _gone(self) -> str:
        return f"the vLLM engine of replica {self._config.replica_id} is dead; its log says why"

    def _core_request(self, request: EngineRequest) -> EngineCoreRequest:
        limit = self._info.max_model_len
        if not 0 < len(request.prompt_token_ids) < limit:
            raise InvalidEngineRequestError(
                f"prompt_token_ids holds {len(request.prompt_token_ids)} tokens; 1 to {limit - 1} fit"
            )
        if request.max_tokens < 1:
            raise InvalidEngineRequestError(f"max_tokens is {request.max_tokens}; at least 1 is needed")
        is_reverse = request.handoff is not None or self._config.phase is Phase.DECODE
        if request.phase is Phase.PREFILL and is_reverse and not self._config.reverse:
            raise InvalidEngineRequestError("decode hands nothing over to prefill; set handoff.reverse to allow it")
        only_read = request.phase is Phase.PREFILL and not request.sampling
        payload = PREFILL_SAMPLING if only_read else self._sampling(request)
        params = payload.params.clone()
        # Only Baton writes what the KV-transfer layer reads (invariant I5).
        transfer: dict[str, Any] | None = None
        if request.handoff is not None:
            transfer = msgspec.msgpack.decode(request.handoff.params) | {LEASE_END_KEY: request.handoff.expires_s}
        if request.phase is Phase.PREFILL:
            transfer = {"do_remote_prefill": False} | (transfer or {}) | {"do_remote_decode": True}
        params.extra_args = {"kv_transfer_params": transfer} if transfer else None
        return self._make_core_request(
            request.request_id,
            request.prompt_token_ids,
            params,
            request.cache_salt,
            request.priority,
            trace_headers=request.trace_headers,
            reasoning_ended=payload.reasoning_ended,
            reasoning_parser_kwargs=payload.reasoning_parser_kwargs,
        )

    @staticmethod
    def _sampling(request: EngineRequest) -> SamplingPayload:
        try:
            payload = decode_sampling(request.sampling)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise InvalidEngineRequestError(f"sampling cannot be read: {error}") from error
        params = payload.params
        params.max_tokens = request.max_tokens
        params.min_tokens = min(max(params.min_tokens - request.num_written_tokens, 0), request.max_tokens)
        return payload

    @staticmethod
    def _make_core_request(
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        cache_salt: str | None,
        priority: int,
        **optional: Any,
    ) -> EngineCoreRequest:
        return EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=cache_salt,
            data_parallel_rank=None,
            priority=priority,
            **optional,
        )

    def _step(self, outputs: EngineCoreOutputs) -> EngineStep:
        deltas = [self._delta(output, outputs.timestamp) for output in outputs.outputs]
        for delta in deltas:
            self._ledger.wrote(delta.request_id, len(delta.token_ids))
            if delta.finish_reason is not None:
                self._ledger.ended(delta.request_id)
        computed = sum(delta.prefill.num_computed_tokens for delta in deltas if delta.prefill)
        if (stats := outputs.scheduler_stats) is not None:
            self._steps.stepped(outputs.timestamp, stats)
            self._load = _after_step(self._load, stats, self._info.num_kv_blocks)
        self._load = msgspec.structs.replace(
            self._load,
            num_queued_tokens=self._ledger.num_queued_tokens,
            num_running_tokens=self._ledger.num_running_tokens,
            step_duration_s=self._steps.pace.step_duration_s,
            prefill_tokens_per_s=self._steps.pace.prefill_tokens_per_s,
            step_prefill_tokens=self._steps.pace.step_prefill_tokens,
            kv_event_gaps_total=self._events.num_gaps,
            prompt_tokens_computed_total=self._load.prompt_tokens_computed_total + computed,
        )
        return EngineStep(deltas, self._load)

    def _delta(self, output: EngineCoreOutput, now_s: float) -> TokenDelta:
        finish = None if output.finish_reason is None else FinishReason(str(output.finish_reason))
        logprobs = None
        if output.new_logprobs is not None or output.new_prompt_logprobs_tensors is not None:
            logprobs = encode_logprobs(LogprobsPayload(output.new_logprobs, output.new_prompt_logprobs_tensors))
        facts = None if output.prefill_stats is None else _prefill_facts(output.prefill_stats)
        return TokenDelta(
            request_id=output.request_id,
            token_ids=list(output.new_token_ids),
            finish_reason=finish,
            stop_reason=output.stop_reason,
            logprobs=logprobs,
            prefill=facts,
            handoff=self._handoff(output.kv_transfer_params, now_s),
            error="the engine failed this request" if finish is FinishReason.ERROR else None,
            times=None if facts is None else _times(output.events or (), now_s),
        )

    def _handoff(self, params: dict[str, Any] | None, told_s: float) -> KVHandoff | None:
        """`told_s` is when the engine told of it, in monotonic time: its lease runs from then on, also while nobody
        reads what it tells."""
        if not params or not params.get("do_remote_prefill"):
            return None
        return KVHandoff(
            source_replica=self._config.replica_id,
            source_request_id=params["remote_request_id"],
            num_tokens=params["remote_num_tokens"],
            num_blocks=max(len(group) for group in params["remote_block_ids"]),
            params=msgspec.msgpack.encode(params),
            expires_s=time.time() - (time.monotonic() - told_s) + LEASE_SHARE * self._config.lease_s,
        )


def _read_outputs(client: AsyncMPClient) -> ZmqReader:
    """Starts vLLM's task that takes outputs off the engine's socket, with a cheaper way to receive.

    The task keeps the socket that it finds when it starts; vLLM closes its own at the end.
    """
    resources = client.resources
    socket: Any = resources.output_socket
    assert resources.output_queue_task is None, "vLLM has begun to read outputs before Baton could"
    reader = ZmqReader(zmq.Socket.shadow(socket.underlying))
    resources.output_socket = reader  # pyright: ignore[reportAttributeAccessIssue]
    try:
        client._ensure_output_queue_task()
    finally:
        resources.output_socket = socket
    return reader


def _times(events: Iterable[EngineCoreEvent], now_s: float) -> EngineTimes | None:
    """`events` and `now_s` are of EngineCore's monotonic clock."""
    first = {event.type: event.timestamp for event in reversed(list(events))}
    queued_s, scheduled_s = first.get(EngineCoreEventType.QUEUED), first.get(EngineCoreEventType.SCHEDULED)
    if queued_s is None or scheduled_s is None:
        return None
    return EngineTimes(scheduled_s - queued_s, now_s - scheduled_s)


def _prefill_facts(stats: PrefillStats) -> PrefillFacts:
    """vLLM counts a fetched prompt's last token as fetched, though the engine computes it again for its logits."""
    again = int(stats.num_external_cached_tokens > 0 and stats.num_computed_tokens == 0)
    return PrefillFacts(
        stats.num_prompt_tokens,
        stats.num_computed_tokens + again,
        stats.num_local_cached_tokens,
        stats.num_external_cached_tokens - again,
    )


def _after_step(load: EngineLoad, stats: SchedulerStats, num_blocks: int) -> EngineLoad:
    """The part of the load that vLLM's scheduler tells."""
    kv: dict[str, list[float]] = stats.kv_connector_stats or {}
    failures = len(kv.get("num_failed_transfers", ())) + len(kv.get("num_failed_handshakes", ()))
    # One block is vLLM's null block, never used; usage is a share of the others.
    num_usable_blocks = max(num_blocks - 1, 0)
    num_used_blocks = round(stats.kv_cache_usage * num_usable_blocks)
    return msgspec.structs.replace(
        load,
        num_running_requests=stats.num_running_reqs,
        num_waiting_requests=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
        num_kv_blocks_used=num_used_blocks,
        num_kv_blocks_free=num_usable_blocks - num_used_blocks,
        kv_bytes_received_total=load.kv_bytes_received_total + int(sum(kv.get("bytes_transferred", ()))),
        kv_transfers_total=load.kv_transfers_total + len(kv.get("bytes_transferred", ())),
        kv_transfer_failures_total=load.kv_transfer_failures_total + failures,
        kv_leases_expired_total=load.kv_leases_expired_total + len(kv.get("num_kv_expired_reqs", ())),
    )


class _StepClock:
    """Measures an engine's steps from outside, on the monotonic clock that all processes of a machine share.

    A step takes from the outputs before it to its own, or from the submission that woke an idle engine. vLLM's own
    figure leaves out what its executor does before it returns, which may be all of it.
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self._start_s: float | None = None

    def submitted(self, now_s: float) -> None:
        if self._start_s is None:
            self._start_s = now_s

    def stepped(self, end_s: float, stats: SchedulerStats) -> None:
        details = stats.iteration_details
        if details is not None and self._start_s is not None:
            # A prompt whose blocks were fetched or cached computes one token: that is no reading of prompts.
            reads_prompts = details.num_ctx_tokens > details.num_ctx_requests
            self.pace.stepped(max(end_s - self._start_s, 0.0), details.num_ctx_tokens if reads_prompts else 0)
        is_busy = stats.num_running_reqs or stats.num_waiting_reqs or stats.num_skipped_waiting_reqs
        self._start_s = end_s if is_busy else None


def kv_format(config: VllmConfig, more: str) -> str:
    """What must be the same for engines that hand KV to each other, and can be told before one has tried
    (`compute_nixl_compatibility_hash` of vLLM knows more, but only the engine's own process can compute it)."""
    model, cache = config.model_config, config.cache_config
    parts = [
        f"vLLM {VLLM_VERSION}",
        f"NIXL connector {NIXL_CONNECTOR_VERSION}",
        model.model,
        str(model.dtype),
        f"KV {cache.cache_dtype}",
        f"blocks of {cache.block_size}",
    ]
    return ", ".join([*parts, more] if more else parts)


def _kv_block_bytes(model: Any, parallel: Any, cache: Any) -> int:
    """Bytes of one KV block over all layers: 2 (K and V) x layers x heads x head size x bytes x tokens."""
    dtype = model.dtype if cache.cache_dtype == "auto" else None
    bytes_per_value = dtype.itemsize if dtype is not None else 1
    heads = model.get_total_num_kv_heads()
    return 2 * model.get_total_num_hidden_layers() * heads * model.get_head_size() * bytes_per_value * cache.block_size
