"""Owns the configuration: one frozen tree, read from YAML, environment (BATON_*) and command line."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from gateway import pool_fit

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and what to do."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ModelSettings(Section):
    """The one model that is served."""

    path: str = Field(
        description="Hugging Face id, absolute path, or a path that starts with ./ (from the config file)"
    )
    served_name: str | None = Field(default=None, description="name clients use; default: the path")
    max_model_len: PositiveInt | None = Field(default=None, description="context limit in tokens")
    dtype: str = "auto"
    chat_template: str | None = Field(default=None, description="path; default: the model's own")
    tool_call_parser: str | None = Field(default=None, description="a vLLM tool parser's name; turns tools on")
    reasoning_parser: str | None = None
    trust_remote_code: bool = False


class EngineSettings(Section):
    """Engine arguments of one pool. `extra_args` takes any other field of vLLM's AsyncEngineArgs."""

    block_size_tokens: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    kv_cache_gib: PositiveFloat | None = Field(default=None, description="KV cache per engine; default: vLLM decides")
    kv_cache_dtype: str = Field(default="auto", description="vLLM's name, e.g. fp8; auto: as the model's values")
    quantization: str | None = Field(
        default=None, description="vLLM's name for how weights are quantised, e.g. fp8; default: as the model says"
    )
    attention_backend: str | None = Field(
        default=None, description="vLLM's name, e.g. FLASH_ATTN; default: vLLM chooses by GPU"
    )
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = Field(default=1, description="more than 1 without a prefill pool only")
    enforce_eager: bool = False
    extra_args: dict[str, JsonValue] = {}


class PoolSettings(Section):
    """One pool of equal engines: how many, where they run, how they are run."""

    replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: PositiveInt | None = Field(
        default=None,
        description="set: between `replicas` and so many, by demand; on a cluster, from a Serve config (docs/adr/0020)",
    )
    device: Literal["cpu", "cuda"] = "cuda"
    cpu_cores: list[list[int]] | None = Field(
        default=None, description="CPU engines only: the cores of each replica, e.g. [[0], [1]]"
    )
    num_cpus: PositiveFloat = Field(default=1.0, description="CPUs Ray sets aside for each replica")
    num_gpus: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="GPUs of each replica; default: tensor x pipeline parallel size on cuda"
    )
    accelerator_type: str | None = Field(default=None, description="a Ray accelerator type, e.g. H100")
    label_selector: dict[str, str] = Field(default={}, description="Ray node labels this pool must run on")
    engine: EngineSettings = EngineSettings()
    env: dict[str, str] = Field(default={}, description="extra environment of the engine's processes")

    @model_validator(mode="after")
    def _can_grow(self) -> Self:
        if self.max_replicas is None:
            return self
        if self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, and replicas, the fewest that there are, is {self.replicas}; "
                "raise the one or lower the other"
            )
        if not self.replicas:
            raise ValueError(
                "a pool that grows begins with one replica or more; set replicas to 1, or drop max_replicas"
            )
        return self

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.replicas

    @property
    def gpus_per_replica(self) -> float:
        if self.device == "cpu":
            return 0
        if self.num_gpus is not None:
            return self.num_gpus
        return self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """Of one engine; all run on one node."""
        return self.engine.tensor_parallel_size * self.engine.pipeline_parallel_size


class PoolsSettings(Section):
    allow_shared_cores: bool = Field(
        default=False, description="let CPU engines share cores: 5-50 times slower, for tests"
    )
    prefill: PoolSettings = PoolSettings(replicas=0)
    decode: PoolSettings


class SimulationSettings(Section):
    """Simulated engines in the place of vLLM's: they compute nothing, write plain tokens of the model's tokenizer, and
    take as long as these numbers say (`engine.latency.LatencyModel`). They read neither sampling parameters nor
    stop tokens: an answer is as long as `max_tokens` allows, and has no logprobs."""

    prefill_fixed_s: NotNegativeFloat = Field(default=0.0, description="of a step that reads prompts")
    prefill_s_per_token: NotNegativeFloat = 0.0
    decode_step_s: PositiveFloat = Field(default=0.001, description="of a step that writes a token for each request")
    decode_s_per_request: NotNegativeFloat = 0.0
    decode_interval_s: NotNegativeFloat = Field(default=0.0, description="least time between two tokens of a request")
    num_kv_blocks: PositiveInt = Field(default=65_536, description="KV blocks of each engine")
    clock_tick_s: PositiveFloat | None = Field(
        default=None, description="tokens tell when they were written, in ticks of the monotonic clock"
    )
    seed: int = Field(default=0, description="stands for the weights: decides what is answered")


class HandoffSettings(Section):
    """How KV blocks travel from prefill to decode."""

    connector: Literal["nixl"] = "nixl"
    lease_s: int = Field(
        default=30, ge=6, description="prefill keeps blocks this long after decode's last sign, one each sixth of it"
    )
    progress_thread_delay_us: Annotated[int, Field(ge=0)] = Field(
        default=100, description="pause between NIXL's progress polls; 0 spins a core per engine process"
    )
    ucx_tls: str | None = Field(default=None, description="UCX transports; default: UCX decides")
    kv_format: str = Field(
        default="",
        description="another one: engines of before and after this change never hand KV to each other, whatever else "
        "they are (model, dtypes, block size and versions are told apart without it)",
    )
    reverse: bool = Field(default=False, description="prefill may fetch from decode what a session has cached there")
    ask_timeout_s: PositiveFloat = Field(
        default=2.0, description="longest wait for decode to hand over what it has cached; then prefill reads it"
    )
    timeout_s: PositiveFloat = Field(
        default=60.0, description="longest prefill before it is given up: another replica, then decode"
    )


class GatewaySettings(Section):
    """The front door."""

    replicas: PositiveInt = 1
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    num_cpus: PositiveFloat = 1.0
    label_selector: dict[str, str] = Field(default={}, description="Ray node labels gateways must run on")
    max_body_bytes: PositiveInt = 8 * 1024 * 1024
    max_choices: PositiveInt = Field(default=16, description="largest n of a request")
    max_in_flight_requests: PositiveInt = Field(default=4096, description="sequences one replica holds; more get 503")
    receipts_kept: PositiveInt = 1000
    send_timeout_s: PositiveFloat = Field(default=120.0, description="longest wait for a client that does not read")
    drain_timeout_s: PositiveFloat = Field(
        default=600.0, description="longest a replica that leaves, gateway or engine, may finish its requests"
    )
    enable_docs: bool = False


class RecoverySettings(Section):
    """When a gateway takes a replica for lost, and for how long it looks for another."""

    worker_timeout_s: PositiveFloat = Field(
        default=5.0, description="a worker that reports nothing for so long is lost; it reports every second"
    )
    engine_timeout_s: PositiveFloat = Field(
        default=20.0, description="so is one whose engine holds requests and tells nothing for so long"
    )
    placement_timeout_s: PositiveFloat = Field(
        default=120.0, description="longest a request that lost its replica waits for another; then it fails"
    )


class AdmissionSettings(Section):
    """Which requests are taken while there is more work than capacity (docs/adr/0014)."""

    ttft_deadline_s: PositiveFloat = Field(
        default=30.0, description="time to the first token after which an answer is late, if the client names none"
    )
    low_share: Share = Field(default=0.5, description="of the deadline, that priority low may be predicted to use")
    normal_share: Share = 0.75
    high_share: Share = Field(default=0.9, description="what is left of 1 is for predictions that are too short")
    max_queued_requests_per_replica: PositiveInt = Field(
        default=1024, description="requests that may wait for one engine, whatever is predicted"
    )
    max_retry_after_s: PositiveInt = Field(default=60, description="longest Retry-After of a refusal")

    @model_validator(mode="after")
    def _shares_grow(self) -> Self:
        if not self.low_share <= self.normal_share <= self.high_share:
            raise ValueError(
                "low_share, normal_share and high_share must grow in this order: the lowest is refused first"
            )
        return self


TENANT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NO_KEY = "0" * 64
"""Stands in shipped configurations for the SHA-256 of a key. Nobody has a key of this digest."""


def _key_digest(value: str) -> str:
    # The message must not repeat the value: it may be a key that was pasted in the place of its digest.
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(
            "must be the SHA-256 of a key, 64 lower-case hex digits, as `baton key NAME` prints it, never a key itself"
        )
    return value


KeyDigest = Annotated[str, AfterValidator(_key_digest)]


class TenantSettings(Section):
    """Who may ask, and what their hints may claim at most (docs/adr/0018). With several gateways each enforces its
    part of the limits."""

    name: Annotated[str, Field(pattern=f"^{TENANT_NAME}$")] = Field(
        description="seeds the tenant's part of the cache: under another name its cache is cold"
    )
    api_key_sha256: Annotated[list[KeyDigest], Field(min_length=1)] = Field(
        description="of each of its keys, as `baton key NAME` prints them; several while one replaces another"
    )
    operator: bool = Field(default=False, description="reads /metrics, all of /baton/status, and everybody's receipts")
    max_priority: Literal["low", "normal", "high"] = "normal"
    min_ttft_deadline_s: PositiveFloat | None = Field(
        default=None, description="shortest deadline it may name; a shorter one is made this long"
    )
    max_ttft_deadline_s: PositiveFloat | None = Field(
        default=None, description="longest deadline it may name; default: admission.ttft_deadline_s"
    )
    max_concurrent_requests: PositiveInt | None = Field(
        default=None, description="at once; a request counts once for each choice of each of its prompts"
    )
    requests_per_minute: PositiveFloat | None = Field(
        default=None, description="on average, counted likewise; those of ten seconds may come at once"
    )


PolicyName = Literal["baton", "least-tokens", "round-robin", "session-affinity", "dynamo", "llm-d"]


class PolicySettings(Section):
    """What decides placements: the part of the configuration that a running application can be told anew."""

    policy: PolicyName = Field(
        default="least-tokens", description="what chooses the replicas of a request (gateway/routing/policies.py)"
    )
    shadow_policy: PolicyName | None = Field(
        default=None, description="decides beside it on the same inputs and changes nothing: receipts and metrics tell"
    )


class RoutingSettings(PolicySettings):
    """How requests are placed."""

    receipts_folder: str | None = Field(
        default=None,
        description="where each gateway keeps a file of receipts: absolute, or from the config if it begins ./",
    )
    receipts_file_mb: PositiveInt = Field(default=64, description="of one gateway; as much again of older ones is kept")


class ScalingSettings(Section):
    """What pools with `max_replicas` are sized to keep: most turns in time (docs/adr/0020)."""

    ttft_s: PositiveFloat = Field(default=2.0, description="a first token within so long, and")
    ttft_per_read: NotNegativeFloat = Field(
        default=1.5, description="so many times what an idle engine takes to read the whole prompt, is in time"
    )
    tpot_s: PositiveFloat = Field(default=0.05, description="so long a token on average is in time")
    target: Share = Field(default=0.95, description="the share of turns that is to be in time")
    hold_s: PositiveFloat = Field(default=600.0, description="a pool shrinks to what was needed in so long")


class TracingSettings(Section):
    """Traces of requests, to an OpenTelemetry collector (docs/adr/0021)."""

    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^/]")] = Field(
        description="a collector's OTLP/HTTP address, e.g. http://localhost:4318; traces go to its /v1/traces"
    )
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="of the requests whose clients have no trace of their own; those with one decide"
    )


class RuntimeSettings(Section):
    """How a run starts and stays whole. `ray_address`, `num_cpus`, `object_store_mb` and `demo_prompt` are for the
    local Ray that `baton serve` starts, and unused on an existing cluster."""

    ray_address: str | None = Field(
        default=None, description="existing Ray cluster; default: start one on this machine"
    )
    num_cpus: PositiveInt | None = Field(
        default=None, description="CPUs the local Ray claims; default: what the pools need"
    )
    object_store_mb: PositiveInt = 128
    start_timeout_s: PositiveFloat = 300.0
    replace_hung_engine_after_s: PositiveFloat = Field(
        default=120.0, description="an engine that holds requests and tells nothing for so long is replaced"
    )
    demo_prompt: str | None = "What is Baton?"


class LoggingSettings(Section):
    """What replicas write into Ray Serve's log files."""

    encoding: Literal["text", "json"] = Field(
        default="text", description="json: an object a line, with the baton_request_id of the request it concerns"
    )


class Settings(BaseSettings):
    """The whole configuration. Precedence: command line, environment (BATON_GATEWAY__PORT=...), YAML, default."""

    # Without the input in errors: a key may have been pasted where its digest belongs.
    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, env_prefix="BATON_", env_nested_delimiter="__"
    )

    model: ModelSettings
    pools: PoolsSettings
    simulation: SimulationSettings | None = Field(default=None, description="set: the engines of all pools simulate")
    handoff: HandoffSettings = HandoffSettings()
    gateway: GatewaySettings = GatewaySettings()
    recovery: RecoverySettings = RecoverySettings()
    routing: RoutingSettings = RoutingSettings()
    admission: AdmissionSettings = AdmissionSettings()
    scaling: ScalingSettings = ScalingSettings()
    tracing: TracingSettings | None = Field(default=None, description="set: requests are traced")
    tenants: list[TenantSettings] = Field(default=[], description="without any, everybody on this machine may ask")
    logging: LoggingSettings = LoggingSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `load` merges YAML, environment and command line itself: a source here would override the command line.
        return (init_settings,)

    @model_validator(mode="after")
    def _pools_fit_together(self) -> Self:
        prefill, decode = self.pools.prefill, self.pools.decode
        if decode.replicas < 1:
            raise ValueError("pools.decode.replicas must be at least 1: decode engines write the answers")
        taken: dict[int, str] = {}
        for name, pool in (("prefill", prefill), ("decode", decode)):
            if pool.cpu_cores is None:
                continue
            if pool.device != "cpu":
                raise ValueError(f"pools.{name}.cpu_cores is for device: cpu; remove it or set device: cpu")
            if len(pool.cpu_cores) < pool.most_replicas or not all(pool.cpu_cores):
                raise ValueError(
                    f"pools.{name}.cpu_cores lists {len(pool.cpu_cores)} core sets for {pool.most_replicas} replicas; "
                    "give each replica its own, e.g. [[0], [1]]"
                )
            for index, cores in enumerate(pool.cpu_cores):
                for core in cores:
                    owner = f"pools.{name}.cpu_cores[{index}]"
                    if core in taken and not self.pools.allow_shared_cores:
                        raise ValueError(
                            f"core {core} is bound to two engines ({taken[core]} and {owner}); CPU engines that share "
                            "a core are 5-50 times slower: give each its own, or set pools.allow_shared_cores"
                        )
                    taken[core] = owner
        problems: list[str] = []
        for name, pool in (("prefill", prefill), ("decode", decode)):
            problems += pool_fit.argument_problems(name, pool.engine)
            problems += pool_fit.parallel_problems(name, pool)
        if prefill.replicas:
            problems += pool_fit.handoff_problems(prefill, decode, self.model, self.handoff.reverse)
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    @model_validator(mode="after")
    def _simulation_fits(self) -> Self:
        if self.simulation is None:
            return self
        decode, block_size_tokens = self.pools.decode, self.pools.decode.engine.block_size_tokens
        if self.pools.prefill.replicas:
            raise ValueError(
                "simulated engines hand KV blocks over within one process only, and a prefill pool has processes of "
                "its own; remove pools.prefill, or remove simulation to run real engines"
            )
        if decode.device != "cpu" or decode.cpu_cores is not None:
            raise ValueError(
                "simulated engines run on no accelerator and are bound to no cores; set pools.decode.device to cpu and "
                "remove pools.decode.cpu_cores"
            )
        if self.model.max_model_len is None or block_size_tokens is None:
            raise ValueError(
                "simulated engines read no model's config; set model.max_model_len and "
                "pools.decode.engine.block_size_tokens"
            )
        if self.simulation.num_kv_blocks * block_size_tokens < self.model.max_model_len:
            raise ValueError(
                f"simulation.num_kv_blocks is {self.simulation.num_kv_blocks}: with {block_size_tokens} tokens each "
                f"they cannot hold one request of model.max_model_len, {self.model.max_model_len}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _tenants_can_be_told_apart(self) -> Self:
        names: set[str] = set()
        owners: dict[str, str] = {}
        for tenant in self.tenants:
            if tenant.name in names:
                raise ValueError(f"tenants holds {tenant.name!r} twice; give each tenant a name of its own")
            names.add(tenant.name)
            for digest in tenant.api_key_sha256:
                if digest == NO_KEY:
                    continue
                owner = owners.setdefault(digest, tenant.name)
                if owner != tenant.name:
                    raise ValueError(
                        f"tenants {owner!r} and {tenant.name!r} have the same key (its SHA-256 begins {digest[:8]}); a "
                        "key says who asks: make another with `baton key NAME`"
                    )
            shortest_s, longest_s = tenant.min_ttft_deadline_s, self.max_ttft_deadline_s(tenant)
            if shortest_s is not None and shortest_s > longest_s:
                raise ValueError(
                    f"tenant {tenant.name!r} may name no deadline: min_ttft_deadline_s is {shortest_s:g}, the longest "
                    f"is {longest_s:g}; lower the one or set max_ttft_deadline_s"
                )
        return self

    @model_validator(mode="after")
    def _is_open_to_nobody_unknown(self) -> Self:
        if self.tenants:
            return self
        if not _is_loopback(self.gateway.host):
            raise ValueError(
                f"gateway.host is {self.gateway.host!r}, which others can reach, and there are no tenants: anybody "
                "could ask. Make a key with `baton key NAME` and put what it prints under `tenants`, or set "
                "gateway.host to 127.0.0.1"
            )
        if self.runtime.ray_address is not None:
            raise ValueError(
                "runtime.ray_address is set, and there are no tenants: Ray Serve listens on every network of a "
                "cluster's nodes, whatever gateway.host says. Make a key with `baton key NAME` and put what it prints "
                "under `tenants`"
            )
        return self

    def max_ttft_deadline_s(self, tenant: TenantSettings) -> float:
        """The longest deadline that a tenant's requests may name."""
        return tenant.max_ttft_deadline_s or self.admission.ttft_deadline_s

    @property
    def is_scaled(self) -> bool:
        """Whether any pool is sized by demand."""
        return any(pool.max_replicas is not None for pool in (self.pools.prefill, self.pools.decode))

    @property
    def model_name(self) -> str:
        return self.model.served_name or self.model.path


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> Settings:
    """Reads a YAML config. `overrides` are dotted keys from the command line, e.g. {"gateway.port": 9000}.

    Relative paths that start with `./` are resolved from the config file's folder. Raises ConfigError.
    """
    file = Path(path)
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the config {file}: {error.strerror}; pass the path of a YAML file") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold a mapping with at least `model` and `pools`; see configs/local.yaml")

    environment = EnvSettingsSource(Settings)()
    data = _merged(data, environment)
    for key, value in (overrides or {}).items():
        *parents, last = key.split(".")
        node = data
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    _resolve_paths(data, file.parent)
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_readable(file, error)) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    for section, key in (("model", "path"), ("model", "chat_template"), ("routing", "receipts_folder")):
        values = data.get(section)
        if not isinstance(values, dict):
            continue
        value = values.get(key)
        if isinstance(value, str) and value.startswith("./"):
            values[key] = str((folder / value).resolve())


def _readable(file: Path, error: ValidationError) -> str:
    lines = [f"{file} has {error.error_count()} problem(s):"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "config"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key; check the spelling against configs/local.yaml or `baton doctor --schema`"
        lines.append(f"  {where}: {message}")
    return "\n".join(lines)


__all__ = [
    "NO_KEY",
    "TENANT_NAME",
    "AdmissionSettings",
    "ConfigError",
    "EngineSettings",
    "GatewaySettings",
    "HandoffSettings",
    "LoggingSettings",
    "ModelSettings",
    "PoolSettings",
    "RecoverySettings",
    "RoutingSettings",
    "RuntimeSettings",
    "ScalingSettings",
    "Settings",
    "SimulationSettings",
    "TenantSettings",
    "TracingSettings",
    "load",
]
