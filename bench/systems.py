"""Owns the systems that are compared: how each is started, found in the process table, and stopped.

All serve the same model with the same engine arguments on the same cores, both taken from one Baton configuration; or,
if that says so, all stand before simulated engines of the same pace.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from bench import packages
from engine.ports import free_ports
from engine.protocol import Phase
from gateway.runtime import processes
from gateway.runtime.environment import LOOPBACK, RUN_MARKER, RunPaths, environment, variables
from gateway.runtime.processes import ProcessId
from gateway.settings import Settings

ROUTER = packages.Package("vllm-router", "0.1.17")

REPOSITORY = Path(__file__).resolve().parents[1]

IS_DEPLOYED = "is deployed on the cluster"
"""What `bench.on_cluster` prints."""
PEER_CONNECTOR = "bench.peer_nixl"
_STOP_TIMEOUT_S = 60.0
_READY_POLL_S = 0.5
_PROBE_TIMEOUT_S = 2.0
_LOG_TAIL_LINES = 30

_PEER_VARIABLES = frozenset(
    {
        RUN_MARKER,
        "SPT_NOENV",
        "TORCHINDUCTOR_CACHE_DIR",
        "VLLM_HOST_IP",
        "GLOO_SOCKET_IFNAME",
        "UCX_NET_DEVICES",
        "VLLM_NO_USAGE_STATS",
        "DO_NOT_TRACK",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_OFFLINE",
        "TOKENIZERS_PARALLELISM",
    }
)
"""What `baton serve` sets for its engines and the other systems' engines get as well."""


_REPORTING = frozenset({"enable_logging_iteration_details", "kv_events_config"})
"""Engine arguments that tell Baton's workers something; of a bare server they would only cost."""


class StartFailed(RuntimeError):
    """A system that could not be started; `log_tail` is the end of what it wrote."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class System(Protocol):
    """A server of the OpenAI API under test."""

    @property
    def name(self) -> str: ...

    @property
    def url(self) -> str:
        """Where it listens, without a path; known once it is started."""
        ...

    def start(self) -> None:
        """Returns when it answers. Raises StartFailed."""
        ...

    def stop(self) -> None:
        """Ends everything that `start` started; harmless when nothing was."""
        ...

    def processes(self) -> list[ProcessId]:
        """Every process of it that lives now."""
        ...

    @property
    def engine_is_inside(self) -> bool:
        """Whether a simulated engine shares a process with a server, whose CPU time then holds the engine's."""
        ...

    @property
    def pages(self) -> Mapping[str, str]:
        """Prometheus pages that tell of its engines, by the pool they are of; empty where it is its own `/metrics`."""
        ...


@dataclass(frozen=True)
class Command:
    """One process to start. It is ready when `ready_url` answers 200 and it has printed `ready_text`."""

    name: str
    argv: list[str]
    env: dict[str, str]
    ready_url: str
    ready_text: str = ""


@dataclass(frozen=True)
class Recipe:
    """A system's commands: those of a stage start together, each stage when the one before is ready. `pages` are as a
    `System` has them."""

    url: str
    stages: tuple[tuple[Command, ...], ...]
    pages: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Place:
    """What one engine has of this machine: cores, or GPUs by their numbers."""

    phase: Phase
    cores: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()


def places(settings: Settings) -> list[Place]:
    """Of all engines, prefill first. GPUs are counted through; engines that take parts of one share it."""
    found: list[Place] = []
    gpus_taken = 0.0
    for phase, pool in ((Phase.PREFILL, settings.pools.prefill), (Phase.DECODE, settings.pools.decode)):
        for number in range(pool.replicas):
            if pool.device == "cpu":
                found.append(Place(phase, cores=tuple(pool.cpu_cores[number]) if pool.cpu_cores else ()))
                continue
            first = int(gpus_taken)
            found.append(Place(phase, gpus=tuple(range(first, first + pool.ranks_per_replica))))
            gpus_taken += pool.gpus_per_replica
    return found


@dataclass
class LocalSystem:
    """A system of processes on this machine. Each start gets new ports and a folder of its own for logs and sockets."""

    name: str
    make_recipe: Callable[[Path], Recipe]
    start_timeout_s: float
    engine_is_inside: bool = False
    url: str = ""
    pages: Mapping[str, str] = field(default_factory=dict[str, str])
    _roots: list[tuple[ProcessId, subprocess.Popen[bytes]]] = field(default_factory=list)
    _folder: Path | None = None

    def start(self) -> None:
        self._folder = folder = Path(tempfile.mkdtemp(prefix="baton-bench-"))
        recipe = self.make_recipe(folder)
        self.url, self.pages = recipe.url, recipe.pages
        deadline = time.monotonic() + self.start_timeout_s
        for stage in recipe.stages:
            started = [(command, self._spawn(command, folder)) for command in stage]
            for command, process in started:
                self._wait_until_ready(command, process, deadline)

    def stop(self) -> None:
        for _, process in reversed(self._roots):
            process.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for _, process in self._roots:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        processes.end_processes(self.processes)
        for _, process in self._roots:
            process.poll()
        self._roots.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def processes(self) -> list[ProcessId]:
        roots = [root for root, _ in self._roots]
        found = {root for root in roots if processes.is_alive(root)}
        # What a root starts carries a marker wherever it hangs: ours, or the root's own in the case of `baton serve`.
        for owner in (processes.this_process(), *roots):
            found.update(processes.marked(owner))
        return sorted(found, key=lambda process: process.pid)

    def _spawn(self, command: Command, folder: Path) -> subprocess.Popen[bytes]:
        with (folder / f"{command.name}.log").open("wb") as log:
            process = subprocess.Popen(
                command.argv,
                env=command.env,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._roots.append((processes.process_of(process.pid), process))
        return process

    def _wait_until_ready(self, command: Command, process: subprocess.Popen[bytes], deadline: float) -> None:
        with httpx.Client(trust_env=False, timeout=_PROBE_TIMEOUT_S) as http:
            while time.monotonic() < deadline:
                code = process.poll()
                if code is not None:
                    raise StartFailed(f"{self.name}: {command.name} ended with code {code}", self._tail(command))
                try:
                    answers = http.get(command.ready_url).status_code == httpx.codes.OK
                    if answers and command.ready_text in self._log(command):
                        return
                except httpx.TransportError:
                    pass
                time.sleep(_READY_POLL_S)
        raise StartFailed(
            f"{self.name}: {command.name} did not answer within {self.start_timeout_s:g} s; a slow machine needs a "
            "larger runtime.start_timeout_s in the configuration",
            self._tail(command),
        )

    def _tail(self, command: Command) -> str:
        return "\n".join(self._log(command).splitlines()[-_LOG_TAIL_LINES:])

    def _log(self, command: Command) -> str:
        assert self._folder is not None
        return (self._folder / f"{command.name}.log").read_text(errors="replace")


def bare(settings: Settings, folder: Path, is_equal: bool) -> Recipe:
    """One vLLM server, no hand-off, in the place of the first decode engine."""
    (port,) = free_ports(LOOPBACK)
    place = next(place for place in places(settings) if place.phase is Phase.DECODE)
    return Recipe(_url(port), ((_vllm_server(settings, folder, None, [place], port, 0, is_equal),),))


def bare_parallel(settings: Settings, folder: Path) -> Recipe:
    """One vLLM server with vLLM's own settings, no hand-off, with a data-parallel engine in each place."""
    (port,) = free_ports(LOOPBACK)
    return Recipe(_url(port), ((_vllm_server(settings, folder, None, places(settings), port, 0, is_equal=False),),))


def router(settings: Settings, folder: Path, is_equal: bool) -> Recipe:
    """vllm-router over a server in each place. Raises StartFailed if the router cannot be installed."""
    own_places = places(settings)
    router_port, metrics_port, *ports = free_ports(LOOPBACK, 2 + 2 * len(own_places))
    side_channel_ports = ports[len(own_places) :]
    engines = tuple(
        _vllm_server(settings, folder, place.phase, [place], port, side_channel_port, is_equal)
        for place, port, side_channel_port in zip(own_places, ports, side_channel_ports, strict=False)
    )
    urls = [(place.phase, _url(port)) for place, port in zip(own_places, ports, strict=False)]
    return _routed(settings, folder, engines, urls, router_port, metrics_port)


def simulated_bare(settings: Settings, config: Path, folder: Path) -> Recipe:
    """vLLM's front end in one process with a simulated engine."""
    (port,) = free_ports(LOOPBACK)
    argv = [sys.executable, "-m", "bench.front_end", str(config.resolve()), str(port)]
    env = _simulated_environment(settings, folder)
    return Recipe(_url(port), ((Command("front-end", argv, env, f"{_url(port)}/v1/models"),),))


def simulated_router(settings: Settings, config: Path, folder: Path) -> Recipe:
    """vllm-router over two servers that simulate vLLM's. Raises StartFailed if the router cannot be installed."""
    router_port, metrics_port, *engine_ports = free_ports(LOOPBACK, 4)
    ports = dict(zip((Phase.PREFILL, Phase.DECODE), engine_ports, strict=True))
    env = _simulated_environment(settings, folder)
    engines = tuple(mock_engine(config, f"mock-{phase}", port, env) for phase, port in ports.items())
    urls = [(phase, _url(port)) for phase, port in ports.items()]
    return _routed(settings, folder, engines, urls, router_port, metrics_port)


def mock_engine(config: Path, name: str, port: int, env: dict[str, str]) -> Command:
    """A server that simulates vLLM's API and nothing else."""
    argv = [sys.executable, "-m", "bench.mock_engine", str(config.resolve()), str(port)]
    return Command(name, argv, env, f"{_url(port)}/health")


def mock_system(settings: Settings, config: Path) -> System:
    """One such server alone: no system to be compared, but something that answers fast."""

    def recipe(folder: Path) -> Recipe:
        (port,) = free_ports(LOOPBACK)
        return Recipe(_url(port), ((mock_engine(config, "mock", port, _simulated_environment(settings, folder)),),))

    return LocalSystem("mock", recipe, settings.runtime.start_timeout_s)


def _routed(
    settings: Settings,
    folder: Path,
    engines: tuple[Command, ...],
    urls: Sequence[tuple[Phase, str]],
    port: int,
    metrics_port: int,
) -> Recipe:
    """`urls` are the engines' servers'; the ports are the router's, chosen together with theirs."""
    executable = _router_executable()
    env = _peer_environment(settings, folder)
    del env["PYTHONPATH"]  # it has packages of its own
    argv = [str(executable), "--vllm-pd-disaggregation"]
    for phase, url in urls:
        argv += [f"--{phase.value}", url]
    argv += ["--kv-connector", "nixl", "--policy", "round_robin", "--host", LOOPBACK, "--port", str(port)]
    argv += ["--prometheus-port", str(metrics_port)]
    stages = (engines, (Command("vllm-router", argv, env, f"{_url(port)}/v1/models"),))
    return Recipe(_url(port), stages, {phase.value: f"{url}/metrics" for phase, url in urls})


def baton(config: Path) -> Recipe:
    """`baton serve` with the configuration as it is. It answers before all its pools are complete."""
    (port,) = free_ports(LOOPBACK)
    argv = [sys.executable, "-m", "gateway.cli", "serve", str(config.resolve()), "--no-demo", "--port", str(port)]
    command = Command("baton-serve", argv, dict(os.environ), f"{_url(port)}/v1/models", "Ctrl-C stops it")
    return Recipe(_url(port), ((command,),))


def baton_on_cluster(settings: Settings, config: Path) -> Recipe:
    """The same on the Ray cluster that this machine is in; HAProxy listens on every node of it."""
    url = _url(settings.gateway.port)
    argv = [sys.executable, "-m", "bench.on_cluster", str(config.resolve())]
    return Recipe(url, ((Command("on-cluster", argv, dict(os.environ), f"{url}/health", IS_DEPLOYED),),))


SYSTEM_NAMES = ("bare", "router-stock", "router-equal", "baton", "bare-equal")
SIMULATED_SYSTEM_NAMES = ("bare", "router", "baton")


def make_system(name: str, settings: Settings, config: Path) -> LocalSystem:
    """The system called `name`, not started. `settings` is what `config` holds. Raises ValueError."""
    recipes: dict[str, Callable[[Path], Recipe]] = {
        "bare": lambda folder: bare(settings, folder, is_equal=False),
        "bare-equal": lambda folder: bare(settings, folder, is_equal=True),
        "router-stock": lambda folder: router(settings, folder, is_equal=False),
        "router-equal": lambda folder: router(settings, folder, is_equal=True),
        "baton": lambda _folder: baton(config),
    }
    if settings.runtime.ray_address is not None:
        recipes["baton"] = lambda _folder: baton_on_cluster(settings, config)
    if settings.simulation is not None:
        recipes = {
            "bare": lambda folder: simulated_bare(settings, config, folder),
            "router": lambda folder: simulated_router(settings, config, folder),
            "baton": lambda _folder: baton(config),
        }
    if name not in recipes:
        names = SYSTEM_NAMES if settings.simulation is None else SIMULATED_SYSTEM_NAMES
        raise ValueError(f"there is no system {name}; choose from {', '.join(names)}")
    engine_is_inside = settings.simulation is not None and name != "router"
    return LocalSystem(name, recipes[name], settings.runtime.start_timeout_s, engine_is_inside)


def check_simulated(settings: Settings) -> None:
    """Raises ValueError unless the configuration is one simulated engine."""
    if settings.simulation is None or settings.pools.decode.replicas != 1:
        raise ValueError("the systems stand before one simulated engine each; use configs/simulated.yaml")


def check_comparable(settings: Settings) -> None:
    """Raises ValueError unless the configuration is one prefill and one decode engine on cores of their own."""
    if settings.simulation is not None:
        raise ValueError("this configuration simulates its engines; pass --engine simulated, or configs/local.yaml")
    for name, pool in (("prefill", settings.pools.prefill), ("decode", settings.pools.decode)):
        if pool.replicas != 1 or pool.device != "cpu" or not pool.cpu_cores:
            raise ValueError(
                f"pools.{name} must be one CPU engine with cpu_cores, or the systems would not get the same machine; "
                "use configs/local.yaml"
            )


def _vllm_server(
    settings: Settings,
    folder: Path,
    phase: Phase | None,
    on: Sequence[Place],
    port: int,
    side_channel_port: int,
    is_equal: bool,
) -> Command:
    """A vLLM server with an engine in each of these places, with Baton's engine settings (`is_equal`, one place), or
    with vLLM's own and the cores bound vLLM's way."""
    # vLLM and Ray take seconds to import, and options are checked before.
    from engine.vllm_engine import engine_arguments
    from engine.vllm_engine import environment as engine_environment
    from gateway.app import engine_spec

    spec = engine_spec(settings, phase or Phase.DECODE)
    if is_equal:
        (place,) = on
        config = dataclasses.replace(spec, phase=phase).engine_config("bench", place.cores, LOOPBACK)
        arguments = {name: value for name, value in _given(engine_arguments(config)).items() if name not in _REPORTING}
        if (handoff := arguments.get("kv_transfer_config")) is not None:
            plain = handoff if isinstance(handoff, dict) else dataclasses.asdict(handoff)
            arguments["kv_transfer_config"] = plain | {"kv_connector_module_path": PEER_CONNECTOR}
        engine_env = engine_environment(config, side_channel_port)
    else:
        arguments = {"model": spec.model} | spec.engine_args
        engine_env = {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel_port),
        } | spec.env
        if on[0].cores:
            engine_env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, place.cores)) for place in on)
            engine_env["OMP_NUM_THREADS"] = str(len(on[0].cores))
        if len(on) > 1:
            arguments["data_parallel_size"] = len(on)
        if phase is not None:
            role = "kv_producer" if phase is Phase.PREFILL else "kv_consumer"
            arguments["kv_transfer_config"] = {"kv_connector": "NixlConnector", "kv_role": role}
    if gpus := [gpu for place in on for gpu in place.gpus]:
        engine_env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", LOOPBACK, "--port", str(port)]
    argv += ["--served-model-name", settings.model_name, "--disable-uvicorn-access-log"]
    # Without it a server says nothing of its cache, and costs as much.
    argv += ["--enable-prompt-tokens-details", *flags(arguments)]
    name = f"vllm-{phase.value if phase else 'server'}-{port}"
    return Command(name, argv, _peer_environment(settings, folder) | engine_env, f"{_url(port)}/health")


def flags(arguments: dict[str, Any]) -> list[str]:
    """vLLM's command-line flags for fields of its AsyncEngineArgs."""
    result: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{flag}" if value else f"--no-{flag}")
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            result += [f"--{flag}", json.dumps(dataclasses.asdict(value))]
        elif isinstance(value, dict):
            result += [f"--{flag}", json.dumps(value)]
        else:
            result += [f"--{flag}", str(value)]
    return result


def _given(arguments: Any) -> dict[str, Any]:
    """The fields of AsyncEngineArgs that differ from vLLM's defaults."""
    plain = type(arguments)(model=arguments.model)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    return {name: value for name, value in given.items() if name == "model" or value != getattr(plain, name)}


def _peer_environment(settings: Settings, folder: Path) -> dict[str, str]:
    """This process's environment with what `baton serve` would set for engines, marked as ours: should this process
    be killed, the next `baton serve` or benchmark ends what it left behind."""
    table = variables(settings, RunPaths(folder), str(processes.this_process()), fallback_port=0, cores=1, open_files=0)
    return environment([variable for variable in table if variable.name in _PEER_VARIABLES], os.environ) | {
        "TMPDIR": str(folder)
    }


def _simulated_environment(settings: Settings, folder: Path) -> dict[str, str]:
    """A peer's, with the BATON_* settings: these processes read the configuration, and must read it as we did."""
    own = {name: value for name, value in os.environ.items() if name.startswith("BATON_") and name != RUN_MARKER}
    return _peer_environment(settings, folder) | own


def _router_executable() -> Path:
    """vllm-router in a virtual environment of its own. Raises StartFailed."""
    try:
        return packages.executable(ROUTER)
    except packages.InstallFailed as error:
        raise StartFailed(str(error), error.log_tail) from error


def _url(port: int) -> str:
    return f"http://{LOOPBACK}:{port}"
