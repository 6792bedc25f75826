"""Owns the environment of the local runtime: every variable that `baton serve` sets or removes, and why."""

import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path

from engine.ports import free_ports
from gateway.settings import Settings

RUN_MARKER = "BATON_RUN"
"""Every process of a run carries `BATON_RUN=<owner pid>:<owner start time in clock ticks>`."""

HTTP_HOST = "BATON_HTTP_HOST"
"""The address HAProxy's front door binds, read by `gateway.runtime.confine`."""

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class RunPaths:
    """Where one run keeps its files; everything below `root`."""

    root: Path

    @property
    def ray(self) -> Path:
        return self.root / "ray"

    @property
    def haproxy(self) -> Path:
        """Names are short here: HAProxy's socket paths, with a 56-character node id, must stay below 97."""
        return self.root / "h"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def state(self) -> Path:
        return self.root / "run.json"

    @property
    def settings(self) -> Path:
        return self.root / "settings.json"

    @property
    def token(self) -> Path:
        return self.root / "ray-token"

    @property
    def control(self) -> Path:
        """The socket on which the driver takes orders."""
        return self.root / "control"

    @property
    def driver_log(self) -> Path:
        return self.logs / "driver.log"


@dataclass(frozen=True)
class Variable:
    """One environment variable; `value` None removes it."""

    name: str
    value: str | None
    reason: str


def cpus_needed(settings: Settings) -> int:
    """CPUs the local Ray must offer so that every replica of the configuration can be placed."""
    pools = settings.pools
    needed = (
        settings.gateway.replicas * settings.gateway.num_cpus
        + pools.prefill.replicas * pools.prefill.num_cpus
        + pools.decode.replicas * pools.decode.num_cpus
    )
    return settings.runtime.num_cpus or math.ceil(needed)


def connections_needed(settings: Settings) -> int:
    """Client connections HAProxy must hold: what the gateway admits, as much again to be refused, and probes."""
    return 2 * settings.gateway.replicas * settings.gateway.max_in_flight_requests + 1024


def open_files_needed(settings: Settings) -> int:
    """Open files of HAProxy: two sockets for each connection, a splice pipe for every fourth, and its own."""
    return 5 * connections_needed(settings) // 2 + 1024


def free_fallback_port(gateway_port: int) -> int:
    """A free port for Serve's fallback proxy: not the gateway's, which is as free until HAProxy listens there."""
    return next(port for port in free_ports(LOOPBACK, 2) if port != gateway_port)


def variables(
    settings: Settings, paths: RunPaths, run: str, fallback_port: int, cores: int, open_files: int
) -> list[Variable]:
    """The table. `run` is the marker's value, `fallback_port` that of Serve's fallback proxy, `cores` the machine's,
    `open_files` the limit a process may raise itself to."""
    haproxy = paths.haproxy
    connections = min(connections_needed(settings), max(64, (open_files - 1024) * 2 // 5))
    table = [
        Variable(RUN_MARKER, run, "tells whose process this is, so that a crash can be healed"),
        Variable("SPT_NOENV", "1", "setproctitle must not overwrite the environment: the marker lives there"),
        Variable(HTTP_HOST, settings.gateway.host, "the one address that is offered to clients"),
        Variable("TMPDIR", str(paths.tmp), "sockets and scratch files of engines go with the run"),
        Variable(
            "TORCHINDUCTOR_CACHE_DIR",
            os.path.join(tempfile.gettempdir(), f"torchinductor_{getuser()}"),
            "torch's default place although TMPDIR moved: compiled kernels are shared by runs",
        ),
        # Ray
        Variable("RAY_ADDRESS", None, "a user's other cluster must not be joined by accident"),
        Variable("RAY_AUTH_TOKEN", None, "the run has its own token"),
        Variable("RAY_AUTH_MODE", "token", "other users of this machine must not reach our Ray"),
        Variable("RAY_AUTH_TOKEN_PATH", str(paths.token), "the token lives and dies with the run, not in ~/.ray"),
        Variable("RAY_USAGE_STATS_ENABLED", "0", "nothing is reported to anybody"),
        Variable("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0", "makes Ray take 127.0.0.1 as node address and bind it only"),
        Variable("RAY_worker_niceness", "0", "default 15: anything else on the machine would starve the engines"),
        Variable("RAY_prestart_worker_first_driver", "0", "prestarted workers lack our worker hook: never used"),
        Variable("RAY_raylet_report_resources_period_milliseconds", "1000", "default 100: one node has nobody to tell"),
        Variable("RAY_task_events_report_interval_ms", "0", "a log of tasks for the dashboard, which is not started"),
        Variable("RAY_metrics_report_interval_ms", "60000", "nobody scrapes Ray's own metrics here"),
        Variable("REPORTER_UPDATE_INTERVAL_MS", "60000", "node statistics for the dashboard, which is not started"),
        Variable("RAY_DISABLE_DOCKER_CPU_WARNING", "1", "keeps logs readable"),
        Variable("RAY_ROTATION_MAX_BYTES", str(64 * 1024 * 1024), "bounds each log file"),
        Variable("RAY_ROTATION_BACKUP_COUNT", "1", "bounds the number of log files"),
        # Ray Serve
        Variable("RAY_SERVE_ENABLE_HA_PROXY", "1", "HAProxy carries the streams: a third of the TTFT of Serve's proxy"),
        Variable("RAY_SERVE_USE_GRPC_BY_DEFAULT", "0", "handles only introduce gateways to workers (ADR 0012)"),
        Variable("RAY_SERVE_THROUGHPUT_OPTIMIZED", "0", "a user's setting must not change what was measured"),
        Variable("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5", "default 0.1: 4% of a core; links notice a loss at once"),
        Variable("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "10000", "default 100: replicas wake ten times a second"),
        Variable("RAY_SERVE_EVENT_LOOP_MONITORING_INTERVAL_S", "60", "default 5; its figures go to Ray's own metrics"),
        Variable("RAY_SERVE_LOG_TO_STDERR", "0", "Serve logs to files only"),
        Variable("RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT", "1", "a failed constructor is reported, not tried again"),
        Variable("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "2", "default 10: the third that fails replaces HAProxy"),
        Variable("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", str(fallback_port), "fixed by default: two runs would collide"),
        # HAProxy
        Variable("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", str(haproxy / "haproxy.cfg"), "files go with the run"),
        Variable("RAY_SERVE_HAPROXY_SOCKET_PATH", str(haproxy / "a.sock"), "files go with the run"),
        Variable("RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH", str(haproxy / "m.sock"), "files go with the run"),
        Variable("RAY_SERVE_HAPROXY_SERVER_STATE_BASE", str(haproxy), "files go with the run"),
        Variable("RAY_SERVE_HAPROXY_SERVER_STATE_FILE", str(haproxy / "state"), "files go with the run"),
        Variable("RAY_SERVE_HAPROXY_LOG_TARGET", str(haproxy / "l.sock"), "no UDP socket for a syslog nobody reads"),
        Variable(
            "RAY_SERVE_HAPROXY_METRICS_ENABLED", "0", "the gateway counts requests itself; saves one log parse each"
        ),
        Variable("RAY_SERVE_HAPROXY_MAXCONN", str(connections), "default 4096 is below what we admit"),
        Variable("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "3600", "default 120 s: a reload would cut longer answers"),
        Variable(
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S",
            str(math.ceil(settings.gateway.send_timeout_s)),
            "default 3600: a client that reads no more would keep its connection, cut off by the gateway, for an hour",
        ),
        Variable(
            "RAY_SERVE_HAPROXY_NBTHREAD", str(max(1, min(4, cores // 4))), "default 4 threads take the engines' cores"
        ),
        # engines
        Variable("VLLM_HOST_IP", LOOPBACK, "engines of one machine talk over loopback"),
        Variable("GLOO_SOCKET_IFNAME", "lo", "engines of one machine talk over loopback"),
        Variable("UCX_NET_DEVICES", "lo", "KV blocks travel over loopback: nothing listens on the network"),
        Variable("VLLM_NO_USAGE_STATS", "1", "nothing is reported to anybody"),
        Variable("DO_NOT_TRACK", "1", "nothing is reported to anybody"),
        Variable("HF_HUB_DISABLE_TELEMETRY", "1", "nothing is reported to anybody"),
        Variable("TOKENIZERS_PARALLELISM", "false", "forked processes would warn about it"),
    ]
    if Path(settings.model.path).is_dir():
        table.append(Variable("HF_HUB_OFFLINE", "1", "a model on disk needs nothing from the network"))
    return table


def environment(table: list[Variable], base: Mapping[str, str]) -> dict[str, str]:
    """`base` with the table applied, without the BATON_* settings (they are already part of the configuration),
    and with this installation first on PYTHONPATH."""
    ours = {variable.name for variable in table}
    result = {name: value for name, value in base.items() if not name.upper().startswith("BATON_") and name not in ours}
    result.update({variable.name: variable.value for variable in table if variable.value is not None})
    root = str(Path(__file__).resolve().parents[2])
    result["PYTHONPATH"] = os.pathsep.join(filter(None, [root, base.get("PYTHONPATH")]))
    return result
