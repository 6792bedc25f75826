"""Owns the composition: settings become the Ray Serve application `baton`. The only module that knows everything."""

import asyncio
import dataclasses
import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from decode.deployment import DecodeReplica
from engine import logs
from engine.deployment import EngineSpec, calm_garbage_collector
from engine.latency import LatencyModel
from engine.protocol import Phase
from engine.simulated import SimulatedEngineConfig, TokenRule
from engine.termination import end_at_sigterm
from gateway import gauges, metrics
from gateway.agents.tenants import Tenant
from gateway.orchestrator import Orchestrator, OrchestratorConfig
from gateway.peers import PoliciesInUse
from gateway.peers_ray import RayPeers
from gateway.planning import ShadowPlanner
from gateway.receipt_log import SUFFIX as RECEIPTS_SUFFIX
from gateway.receipt_log import ReceiptLog
from gateway.routing.admission import AdmissionConfig
from gateway.routing.policies import POLICIES
from gateway.routing.receipts import Receipt, ReceiptStore
from gateway.routing.types import Priority
from gateway.scaling.demand import ServiceLevel
from gateway.scaling.planner import PlannerConfig
from gateway.scaling.sizing import Bounds, PoolSizes, SizingConfig
from gateway.scaling_ray import autoscaling_config, told
from gateway.settings import NO_KEY, ConfigError, PolicySettings, PoolSettings, Settings, load
from gateway.transport_ray import REQUEST_ROUTER, RayTransport
from gateway.wanted_ray import WantedReplicas, controller
from prefill.deployment import PrefillReplica

APP_NAME = "baton"

log = logging.getLogger("baton")

# Gateways bound what they take themselves (gateway.max_in_flight_requests), and Serve must never hold a call back.
MAX_ONGOING_REQUESTS = 100_000
DRAIN_CHECK_S = 0.5

HEALTH_CHECK_PERIOD_S = 2.0
"""How long Serve may take to notice that a replica's process is gone; its default of 10 s is twice our bound."""

SERVE_ENDS_WITHIN_S = 30.0
"""What Serve takes at most to end the process of a replica whose time to drain is over."""

RECEIPTS_CLOSE_S = 5.0

FEWEST_READY = {Phase.DECODE: 1, Phase.PREFILL: 0}
"""What a gateway waits for when it starts, beside every replica that Serve lists then. After the loss of a node a pool
may be incomplete for long, and gateways that wait for the missing part could not be replaced meanwhile."""

# On Serve's other loop each message to a client is handed to another thread, through a queue that nothing bounds
# (docs/adr/0012). Read when a replica's process starts, so that it holds on any cluster.
RUNTIME_ENV = {"env_vars": {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}}
START_RETRIES = 1

ACCELERATOR_SHARE = 0.001
"""Of a node's resource `accelerator_type:...`: what Ray asks of it for an actor with that accelerator type."""

LIVE = set(PolicySettings.model_fields)
"""What of `routing` gateways are told by Serve's `user_config`: a change of it reaches replicas as they run, where one
of their constructor's arguments would replace them (docs/adr/0016)."""

# What vLLM takes by default on a server.
SIMULATED_MAX_NUM_SEQS = 256
SIMULATED_MAX_NUM_BATCHED_TOKENS = 8192


def build(settings: Settings) -> serve.Application:
    """The Serve application: a gateway deployment over one deployment per pool."""
    pools = settings.pools
    decode = _deployment(DecodeReplica, pools.decode, settings).bind(engine_spec(settings, Phase.DECODE))
    prefill = None
    if pools.prefill.replicas:
        prefill = _deployment(PrefillReplica, pools.prefill, settings).bind(engine_spec(settings, Phase.PREFILL))
    gateway = Gateway.options(
        **_number(settings.gateway.replicas, settings.gateway.replicas, settings),
        ray_actor_options=_actor_options(settings.gateway.num_cpus, settings.gateway.label_selector),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.gateway.drain_timeout_s,
        graceful_shutdown_wait_loop_s=DRAIN_CHECK_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        max_constructor_retry_count=START_RETRIES,
        # The gateway has a line of its own for each request, with the id that its client has.
        logging_config=LoggingConfig(encoding=settings.logging.encoding.upper(), enable_access_log=False),
        user_config=settings.routing.model_dump(mode="json", include=LIVE),
    )
    return gateway.bind(settings.model_dump(mode="json", exclude={"routing": LIVE}), decode, prefill)


def from_config(args: dict[str, str]) -> serve.Application:
    """For an existing cluster: `serve run gateway.app:from_config config=configs/gpu.yaml`. Of `args` only `config` is
    read; another value of any of them makes `serve deploy` call this again. Raises ConfigError."""
    settings = load(args["config"])
    if not settings.tenants:
        raise ConfigError(
            f"{args['config']} has no tenants, and Ray Serve listens on every network of a cluster's nodes, whatever "
            "gateway.host says: make a key with `baton key NAME` and put what it prints under `tenants`"
        )
    return build(settings)


@serve.deployment(name="gateway")
@serve.ingress()
class Gateway:
    """One replica of the front door. Its constructor returns when the replicas that are there are warm, and one can
    write answers; pools may still be incomplete."""

    async def __init__(
        self, settings: dict[str, Any], decode: DeploymentHandle, prefill: DeploymentHandle | None = None
    ) -> None:
        end_at_sigterm()
        # vLLM takes seconds to import, and the process that only builds the application has no use for it.
        from engine.vllm_codec import drop_logprobs
        from gateway.api.server import make_app, warm_up_sampling
        from gateway.tracing import Tracer

        logs.begin()
        self._settings = config = Settings.model_validate(settings)
        self._policies: PoliciesInUse | None = None
        self._expected = expected(config)
        metrics.expect_tenants(self._expected.tenants)
        handles = {Phase.DECODE: decode} | ({Phase.PREFILL: prefill} if prefill else {})
        transport = RayTransport(f"gateway-{uuid.uuid4().hex[:8]}", handles)
        self._orchestrator = Orchestrator(
            transport,
            POLICIES[config.routing.policy],
            ReceiptStore(config.gateway.receipts_kept),
            OrchestratorConfig(
                handoff_timeout_s=config.handoff.timeout_s,
                max_in_flight_requests=config.gateway.max_in_flight_requests,
                warm_up_sampling=warm_up_sampling(),
                has_prefill_pool=config.pools.prefill.replicas > 0,
                can_ask=config.handoff.reverse,
                ask_timeout_s=config.handoff.ask_timeout_s,
                report_timeout_s=config.recovery.worker_timeout_s,
                engine_timeout_s=config.recovery.engine_timeout_s,
                recovery_timeout_s=config.recovery.placement_timeout_s,
                drop_logprobs=drop_logprobs,
                admission=AdmissionConfig(**config.admission.model_dump()),
                slo=ServiceLevel(config.scaling.ttft_s, config.scaling.ttft_per_read, config.scaling.tpot_s),
            ),
            closed=self._close_receipt,
            replica_lost=metrics.count_loss,
        )
        context = serve.get_replica_context()
        self._receipt_log: ReceiptLog | None = None
        if config.routing.receipts_folder is not None:
            file = Path(config.routing.receipts_folder) / f"{context.replica_tag}{RECEIPTS_SUFFIX}"
            max_bytes = config.routing.receipts_file_mb * 1_000_000
            self._receipt_log = ReceiptLog(file, max_bytes, metrics.RECEIPTS_DROPPED.inc)
        self._tracer: Tracer | None = None
        if (tracing := config.tracing) is not None:
            self._tracer = Tracer(
                tracing.otlp_endpoint, tracing.sample_ratio, context.replica_tag, metrics.count_dropped_spans
            )
        self._planner = ShadowPlanner(
            self._orchestrator, _bounds(config), _sizing(config), PlannerConfig(target=config.scaling.target)
        )
        self._wanted: WantedReplicas | None = None
        if config.is_scaled:
            self._wanted = WantedReplicas(controller(), context.app_name, self._expected.replicas)
        self._peers = RayPeers(context.replica_tag, serve.get_deployment_handle(context.deployment, context.app_name))
        # The application is made while the engines load.
        (self._app, self._client), _ = await asyncio.gather(
            make_app(
                server_config(config),
                self._orchestrator,
                self._peers,
                self._policies_in_use,
                self._planner.as_json,
                self._own_metrics,
                self._tracer,
            ),
            _meet(handles, config.runtime.start_timeout_s),
        )
        logs.adopt("vllm")
        await self._orchestrator.start(FEWEST_READY, config.runtime.start_timeout_s)
        self._watching = [asyncio.create_task(self._planner.run())]
        if self._wanted is not None:
            self._watching.append(asyncio.create_task(self._wanted.run()))
        calm_garbage_collector()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's call with the `user_config`, before the replica takes its first request and at each change of it.

        It runs on the loop on which placements are decided, each in one call, so that none is made by two policies.
        """
        wanted = PolicySettings.model_validate(user_config)
        shadow = POLICIES[wanted.shadow_policy] if wanted.shadow_policy else None
        self._orchestrator.use(POLICIES[wanted.policy], shadow)
        before, self._policies = self._policies, PoliciesInUse(wanted.policy, wanted.shadow_policy, time.time())
        if before is not None:
            log.info("policy %s, shadow %s instead of %s", wanted.policy, wanted.shadow_policy, before)
            metrics.count_policy_switch(wanted.policy, wanted.shadow_policy)

    def _policies_in_use(self) -> PoliciesInUse:
        assert self._policies is not None, "Serve calls `reconfigure` before it sends requests"
        return self._policies

    def _own_metrics(self) -> list[Metric]:
        expected = self._expected
        if self._wanted is not None:
            expected = dataclasses.replace(expected, replicas=self._wanted.replicas)
        return [*metrics.collect(), *gauges.families(self._orchestrator, expected)]

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def peer_metrics(self, asker: str) -> tuple[str, list[Metric]] | None:
        """What this replica has to say in a scrape, for another one that is asked for /metrics."""
        return None if asker == self._peers.own_id else (self._peers.own_id, self._own_metrics())

    async def peer_receipt(self, asker: str, request_id: str) -> tuple[str, dict[str, Any] | None] | None:
        """This replica's receipt as JSON, for another one that does not have it."""
        found = self._orchestrator.receipts.get(request_id)
        return None if asker == self._peers.own_id else (self._peers.own_id, found.as_json() if found else None)

    async def peer_policies(self, asker: str) -> tuple[str, PoliciesInUse] | None:
        """What decides in this replica, for another one that is asked for the policies of all."""
        return None if asker == self._peers.own_id else (self._peers.own_id, self._policies_in_use())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's call, every few seconds where pools are scaled."""
        return told(self._orchestrator.demand)

    async def send_spans(self) -> None:
        """The driver's call before a local run ends: its gateways get no other notice."""
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.flush)

    async def check_health(self) -> None:
        if self._client.errored:
            raise RuntimeError("the gateway's output loop has failed; its log says why")

    def _close_receipt(self, receipt: Receipt) -> None:
        metrics.count(receipt)
        if self._receipt_log is not None:
            self._receipt_log.append(receipt)
        if self._tracer is not None:
            self._tracer.closed(receipt)

    async def __del__(self) -> None:
        for watching in getattr(self, "_watching", ()):
            watching.cancel()
        if orchestrator := getattr(self, "_orchestrator", None):
            await orchestrator.close()
        if tracer := getattr(self, "_tracer", None):
            await asyncio.to_thread(tracer.close)
        if log := getattr(self, "_receipt_log", None):
            async with asyncio.timeout(RECEIPTS_CLOSE_S):
                await asyncio.to_thread(log.close)


async def _meet(handles: Mapping[Phase, DeploymentHandle], timeout_s: float) -> None:
    """Makes Ray's routers learn their pools, and waits for the first decode replica. Raises TimeoutError."""
    # A router learns its pool from the first call on. A pool without replicas answers none, for as long as it has none.
    hellos = {phase: handle.hello.remote() for phase, handle in handles.items()}
    async with asyncio.timeout(timeout_s):
        await hellos[Phase.DECODE]


def _number(least: int, most: int, settings: Settings) -> dict[str, Any]:
    """The options that say how many replicas a deployment has."""
    if not settings.is_scaled:
        return {"num_replicas": least}
    # All of them, also those that keep their number: Serve tells its policy only of what may be scaled.
    return {"autoscaling_config": autoscaling_config(least, most, _sizing(settings))}


def _sizing(settings: Settings) -> SizingConfig:
    return SizingConfig(target=settings.scaling.target, hold_s=settings.scaling.hold_s)


FIXED_POOLS_TIMES = 8
"""How much larger than they are the planner may propose pools that have no `max_replicas`."""


def _bounds(settings: Settings) -> Bounds:
    """What the planner may propose."""

    def of(pool: PoolSettings) -> tuple[int, int]:
        if pool.max_replicas is not None:
            return pool.replicas, pool.max_replicas
        return min(pool.replicas, 1), pool.replicas * FIXED_POOLS_TIMES

    (least_prefill, most_prefill), (least_decode, most_decode) = of(settings.pools.prefill), of(settings.pools.decode)
    return Bounds(PoolSizes(least_prefill, least_decode), PoolSizes(most_prefill, most_decode))


def _actor_options(num_cpus: float, label_selector: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": num_cpus, "runtime_env": RUNTIME_ENV}
    if label_selector:
        options["label_selector"] = label_selector
    return options


def placement(pool: PoolSettings) -> dict[str, Any]:
    """Where Serve puts a replica of a pool: options of its deployment.

    An engine of several ranks gets a placement group of one bundle: its GPUs are set aside together or not at all, on
    one node, and its replica sees all of them. vLLM starts a process for each there (`engine.vllm_engine`).
    """
    is_one_rank = pool.ranks_per_replica == 1
    options = _actor_options(pool.num_cpus, pool.label_selector if is_one_rank else {})
    options["num_gpus"] = pool.gpus_per_replica
    if pool.accelerator_type:
        options["accelerator_type"] = pool.accelerator_type
    if is_one_rank:
        return {"ray_actor_options": options}
    bundle = {"CPU": pool.num_cpus, "GPU": pool.gpus_per_replica}
    if pool.accelerator_type:
        bundle[f"accelerator_type:{pool.accelerator_type}"] = ACCELERATOR_SHARE
    return {
        "ray_actor_options": options,
        "placement_group_bundles": [{resource: amount for resource, amount in bundle.items() if amount}],
        "placement_group_strategy": "STRICT_PACK",
        "placement_group_bundle_label_selector": [pool.label_selector],
    }


def _deployment(deployment: Any, pool: PoolSettings, settings: Settings) -> Any:
    make_router_config: Any = RequestRouterConfig  # its signature says that every argument is a dict
    return deployment.options(
        **_number(pool.replicas, pool.most_replicas, settings),
        **placement(pool),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.gateway.drain_timeout_s,
        graceful_shutdown_wait_loop_s=DRAIN_CHECK_S,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        max_constructor_retry_count=START_RETRIES,
        logging_config=LoggingConfig(encoding=settings.logging.encoding.upper()),
        request_router_config=make_router_config(request_router_class=REQUEST_ROUTER),
    )


def engine_spec(settings: Settings, phase: Phase) -> EngineSpec:
    """What the replicas of one pool are started with."""
    split = settings.pools.prefill.replicas > 0
    pool = settings.pools.prefill if phase is Phase.PREFILL else settings.pools.decode
    engine = pool.engine
    arguments: dict[str, Any] = {
        "dtype": settings.model.dtype,
        "trust_remote_code": settings.model.trust_remote_code,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "enforce_eager": engine.enforce_eager,
        "kv_cache_dtype": engine.kv_cache_dtype,
        # By `gateway.routing.order`.
        "scheduling_policy": "priority",
    }
    optional = {
        "max_model_len": settings.model.max_model_len,
        "block_size": engine.block_size_tokens,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "max_num_seqs": engine.max_num_seqs,
        "kv_cache_memory_bytes": int(engine.kv_cache_gib * 2**30) if engine.kv_cache_gib else None,
        "reasoning_parser": settings.model.reasoning_parser,
        "quantization": engine.quantization,
        "attention_backend": engine.attention_backend,
    }
    arguments |= {name: value for name, value in optional.items() if value is not None}
    return EngineSpec(
        model=settings.model.path,
        phase=phase if split else None,
        engine_args=arguments | engine.extra_args,
        device=pool.device,
        cpu_cores=pool.cpu_cores or [],
        leaves_within_s=settings.gateway.drain_timeout_s + SERVE_ENDS_WITHIN_S,
        lease_s=settings.handoff.lease_s,
        progress_thread_delay_us=settings.handoff.progress_thread_delay_us,
        ucx_tls=settings.handoff.ucx_tls,
        kv_format=settings.handoff.kv_format,
        reverse=settings.handoff.reverse,
        env=pool.env,
        simulation=_simulation(settings, pool),
        replace_after_s=settings.runtime.replace_hung_engine_after_s,
    )


def _simulation(settings: Settings, pool: PoolSettings) -> SimulatedEngineConfig | None:
    """Without the vocabulary, which each replica reads from the model's tokenizer."""
    simulation, engine = settings.simulation, pool.engine
    if simulation is None:
        return None
    # `Settings` has checked both.
    assert settings.model.max_model_len is not None
    assert engine.block_size_tokens is not None
    return SimulatedEngineConfig(
        model=settings.model.path,
        max_model_len=settings.model.max_model_len,
        block_size_tokens=engine.block_size_tokens,
        num_kv_blocks=simulation.num_kv_blocks,
        max_num_seqs=engine.max_num_seqs or SIMULATED_MAX_NUM_SEQS,
        max_num_batched_tokens=engine.max_num_batched_tokens or SIMULATED_MAX_NUM_BATCHED_TOKENS,
        seed=simulation.seed,
        latency=LatencyModel(
            prefill_s_per_token=simulation.prefill_s_per_token,
            prefill_fixed_s=simulation.prefill_fixed_s,
            decode_step_s=simulation.decode_step_s,
            decode_s_per_request=simulation.decode_s_per_request,
            handoff_fixed_s=0.0,
            handoff_s_per_block=0.0,
            decode_interval_s=simulation.decode_interval_s,
        ),
        token_rule=TokenRule(clock_tick_s=simulation.clock_tick_s),
        lease_s=settings.handoff.lease_s,
    )


def server_config(settings: Settings) -> Any:
    """The `ServerConfig` of a gateway."""
    from gateway.api.server import ServerConfig

    model, gateway = settings.model, settings.gateway
    return ServerConfig(
        model=model.path,
        served_name=settings.model_name,
        max_model_len=model.max_model_len,
        dtype=model.dtype,
        chat_template=model.chat_template,
        tool_call_parser=model.tool_call_parser,
        reasoning_parser=model.reasoning_parser,
        trust_remote_code=model.trust_remote_code,
        max_body_bytes=gateway.max_body_bytes,
        max_choices=gateway.max_choices,
        send_timeout_s=gateway.send_timeout_s,
        enable_docs=gateway.enable_docs,
        tenants=tenants(settings),
    )


def expected(settings: Settings) -> gauges.Expected:
    """What the gauges hold against what is there."""
    pools = settings.pools
    return gauges.Expected(
        replicas={Phase.PREFILL: pools.prefill.replicas, Phase.DECODE: pools.decode.replicas},
        gateways=settings.gateway.replicas,
        ttft_deadline_s=settings.admission.ttft_deadline_s,
        tenants=tuple(tenant.name for tenant in settings.tenants),
    )


def tenants(settings: Settings) -> tuple[Tenant, ...]:
    return tuple(
        Tenant(
            name=tenant.name,
            key_digests=tuple(bytes.fromhex(digest) for digest in tenant.api_key_sha256 if digest != NO_KEY),
            operator=tenant.operator,
            max_priority=Priority(tenant.max_priority),
            min_ttft_deadline_s=tenant.min_ttft_deadline_s,
            max_ttft_deadline_s=settings.max_ttft_deadline_s(tenant),
            max_concurrent_requests=tenant.max_concurrent_requests,
            requests_per_minute=tenant.requests_per_minute,
        )
        for tenant in settings.tenants
    )
