"""Owns what keeps Ray Serve on loopback where it has no option for it: a hook that every Ray worker runs first.

Three places bind every interface, whatever the options say: HAProxy's metrics and stats pages (left out: the admin
socket tells the same) and the gRPC server of each replica. The front door binds the configured host. Local runs only.
"""

import importlib
import os
from typing import Any

from gateway.runtime.environment import HTTP_HOST, LOOPBACK

_METRICS_PAGE = """frontend prometheus
    bind :{{ config.metrics_port }}
    mode http
    http-request use-service prometheus-exporter if { path {{ config.metrics_uri }} }
    no log
"""
_STATS_PAGE = """listen stats
  bind *:{{ config.stats_port }}
  stats enable
  stats uri {{ config.stats_uri }}
  stats refresh 1s
"""
_FRONT_DOOR = "bind {{ config.frontend_host }}:{{ config.frontend_port }}"
_ADMIN_SOCKET = "mode 666 level admin"
_SPLICE_REQUEST = "    option splice-request\n"
"""Beside `abortonclose` HAProxy 2.8 then misses that a client has gone, and spins until the answer is complete."""


class ConfinementError(RuntimeError):
    """Ray Serve's internals are not what this module was written for; the pinned version changed."""


def confine() -> None:
    """The worker hook (`worker_process_setup_hook` of Ray). Raises ConfinementError."""
    haproxy: Any = importlib.import_module("ray.serve._private.haproxy")
    replica: Any = importlib.import_module("ray.serve._private.replica")
    haproxy.HAPROXY_CONFIG_TEMPLATE = confined_template(
        haproxy.HAPROXY_CONFIG_TEMPLATE, os.environ.get(HTTP_HOST, LOOPBACK)
    )
    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server: object, address: str) -> int:
        return add_port(server, loopback_address(address))

    replica.add_port_to_grpc_server = add_loopback_port


def confined_template(template: str, host: str) -> str:
    """HAProxy's configuration template without its open pages, with the front door on `host`."""
    front_door = f"[{host}]" if ":" in host else host
    for text, replacement in (
        (_METRICS_PAGE, ""),
        (_STATS_PAGE, ""),
        (_FRONT_DOOR, f"bind {front_door}:{{{{ config.frontend_port }}}}"),
        (_ADMIN_SOCKET, "mode 600 level admin"),
        (_SPLICE_REQUEST, ""),
    ):
        if template.count(text) != 1:
            raise ConfinementError(f"HAProxy's template does not hold {text!r} once; see gateway/runtime/confine.py")
        template = template.replace(text, replacement)
    return template


def loopback_address(address: str) -> str:
    """`[::]:0` -> `127.0.0.1:0`."""
    host, _, port = address.rpartition(":")
    if host not in ("[::]", "0.0.0.0", LOOPBACK):
        raise ConfinementError(f"a replica binds {address}; check gateway/runtime/confine.py")
    return f"{LOOPBACK}:{port}"
