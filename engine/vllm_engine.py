"""Owns one real vLLM engine behind the Engine port: its configuration, its requests, its outputs.

It drives vLLM's EngineCore client directly: no detokenizer, no task per request, one batch of outputs per engine
step. Text lives in the gateway (docs/adr/0001).
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats

from engine.protocol import (
    EngineGoneError,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineStep,
    FinishReason,
    InvalidEngineRequestError,
    KVHandoff,
    Phase,
    PrefillFacts,
    TokenDelta,
)
from engine.vllm_codec import LogprobsPayload, SamplingPayload, decode_sampling, encode_logprobs

NIXL_MODULE = "engine.vllm_nixl"
CPU_WORKER = "engine.vllm_cpu_worker.BatonCPUWorker"
PREFILL_SAMPLING = SamplingPayload(SamplingParams(max_tokens=1, temperature=0.0, detokenize=False))


@dataclass(frozen=True)
class VllmEngineConfig:
    """Everything one engine process group is started with.

    `phase` None starts an engine without a KV connector (aggregated serving). `engine_args` are fields of vLLM's
    AsyncEngineArgs. `host` is this node's address as other nodes reach it: the hand-off's side channel listens there.
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
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, config.cpu_cores))
        env["OMP_NUM_THREADS"] = str(len(config.cpu_cores))
    if config.device == "cpu" and config.engine_args.get("enforce_eager"):
        # vLLM compiles a helper of logprobs all the same: the first request that asks for them waited 17 s for a C++
        # compiler, which the machine may not even have.
        env["TORCH_COMPILE_DISABLE"] = "1"
    if config.ucx_tls:
        env["UCX_TLS"] = config.ucx_tls
    return env | config.env


def engine_arguments(config: VllmEngineConfig) -> AsyncEngineArgs:
    """vLLM's engine arguments for one engine. Raises ValueError for an argument vLLM does not know."""
    arguments: dict[str, Any] = {"model": config.model, "disable_log_stats": False, "enable_prefix_caching": True}
    if config.device == "cpu":
        arguments["worker_cls"] = CPU_WORKER
    if config.phase is not None:
        arguments["kv_transfer_config"] = {
            "kv_connector": "NixlConnector",
            "kv_connector_module_path": NIXL_MODULE,
            "kv_role": "kv_producer" if config.phase is Phase.PREFILL else "kv_consumer",
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


class VllmEngine:
    """A vLLM engine in processes of its own. Make it with `start`."""

    def __init__(self, config: VllmEngineConfig, client: AsyncMPClient, info: EngineInfo):
        self._config = config
        self._client = client
        self._info = info
        self._load = EngineLoad()

    @classmethod
    async def start(cls, config: VllmEngineConfig) -> "VllmEngine":
        """Starts the engine's processes and waits until the model is loaded (vLLM bounds the wait).

        Raises ValueError for arguments that do not fit; RuntimeError when the processes fail to start.
        """
        return await asyncio.to_thread(cls._start, config)

    @classmethod
    def _start(cls, config: VllmEngineConfig) -> "VllmEngine":
        os.environ.update(environment(config, _free_port(config.host)))
        vllm_config = engine_arguments(config).create_engine_config(UsageContext.ENGINE_CONTEXT)
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
        )
        return cls(config, client, info)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def submit(self, request: EngineRequest) -> None:
        core_request = self._core_request(request)
        try:
            await self._client.add_request_async(core_request)
        except EngineDeadError as error:
            raise EngineGoneError(self._gone()) from error

    async def abort(self, request_ids: Sequence[str]) -> None:
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
                raise EngineGoneError(self._gone()) from error
            yield self._step(outputs)

    async def shutdown(self) -> None:
        await asyncio.to_thread(self._client.shutdown, 5.0)

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
        payload = PREFILL_SAMPLING if request.phase is Phase.PREFILL else self._decode_sampling(request)
        params = payload.params.clone()
        # Only Baton writes what the KV-transfer layer reads (invariant I5).
        transfer: dict[str, Any] | None = None
        if request.phase is Phase.PREFILL:
            transfer = {"do_remote_decode": True, "do_remote_prefill": False}
        elif request.handoff is not None:
            transfer = msgspec.msgpack.decode(request.handoff.params)
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
    def _decode_sampling(request: EngineRequest) -> SamplingPayload:
        try:
            payload = decode_sampling(request.sampling)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise InvalidEngineRequestError(f"sampling cannot be read: {error}") from error
        payload.params.max_tokens = request.max_tokens
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
        deltas = [self._delta(output) for output in outputs.outputs]
        computed = sum(delta.prefill.num_computed_tokens for delta in deltas if delta.prefill)
        self._load = _next_load(self._load, outputs.scheduler_stats, computed, self._info.num_kv_blocks)
        return EngineStep(deltas, self._load)

    def _delta(self, output: EngineCoreOutput) -> TokenDelta:
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
            handoff=self._handoff(output.kv_transfer_params),
            error="the engine failed this request" if finish is FinishReason.ERROR else None,
        )

    def _handoff(self, params: dict[str, Any] | None) -> KVHandoff | None:
        if not params or not params.get("do_remote_prefill"):
            return None
        return KVHandoff(
            source_replica=self._config.replica_id,
            source_request_id=params["remote_request_id"],
            num_tokens=params["remote_num_tokens"],
            num_blocks=max(len(group) for group in params["remote_block_ids"]),
            params=msgspec.msgpack.encode(params),
        )


def _prefill_facts(stats: PrefillStats) -> PrefillFacts:
    """vLLM counts a fetched prompt's last token as fetched, though the engine computes it again for its logits."""
    again = int(stats.num_external_cached_tokens > 0 and stats.num_computed_tokens == 0)
    return PrefillFacts(
        stats.num_prompt_tokens,
        stats.num_computed_tokens + again,
        stats.num_local_cached_tokens,
        stats.num_external_cached_tokens - again,
    )


def _next_load(load: EngineLoad, stats: SchedulerStats | None, computed_tokens: int, num_blocks: int) -> EngineLoad:
    if stats is None:
        return msgspec.structs.replace(
            load, prompt_tokens_computed_total=load.prompt_tokens_computed_total + computed_tokens
        )
    kv: dict[str, list[float]] = stats.kv_connector_stats or {}
    failures = len(kv.get("num_failed_transfers", ())) + len(kv.get("num_failed_handshakes", ()))
    return EngineLoad(
        num_running_requests=stats.num_running_reqs,
        num_waiting_requests=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs,
        # One block is vLLM's null block, never used; usage is a share of the others.
        num_kv_blocks_used=round(stats.kv_cache_usage * max(num_blocks - 1, 0)),
        kv_bytes_received_total=load.kv_bytes_received_total + int(sum(kv.get("bytes_transferred", ()))),
        kv_transfers_total=load.kv_transfers_total + len(kv.get("bytes_transferred", ())),
        kv_transfer_failures_total=load.kv_transfer_failures_total + failures,
        kv_leases_expired_total=load.kv_leases_expired_total + len(kv.get("num_kv_expired_reqs", ())),
        prompt_tokens_computed_total=load.prompt_tokens_computed_total + computed_tokens,
    )


def _kv_block_bytes(model: Any, parallel: Any, cache: Any) -> int:
    """Bytes of one KV block over all layers: 2 (K and V) x layers x heads x head size x bytes x tokens."""
    dtype = model.dtype if cache.cache_dtype == "auto" else None
    bytes_per_value = dtype.itemsize if dtype is not None else 1
    heads = model.get_total_num_kv_heads()
    return 2 * model.get_total_num_hidden_layers() * heads * model.get_head_size() * bytes_per_value * cache.block_size


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
