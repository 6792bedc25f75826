"""Owns a deployment of Baton on a Ray cluster that is there, for as long as this process lives.

`python -m bench.on_cluster CONFIG`, on a node of the cluster: as `serve run gateway.app:from_config config=CONFIG`, but
the signal that ends other systems of a comparison ends this one as well.
"""

import signal
import sys
import time
from types import FrameType

import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from bench.systems import IS_DEPLOYED
from gateway.app import from_config
from gateway.settings import load

APP_NAME = "baton"
GONE_WITHIN_S = 45.0
POLL_S = 0.2


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit


def main(config: str) -> None:
    settings = load(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    ray.init(settings.runtime.ray_address, namespace="serve", log_to_driver=False, configure_logging=False)
    _wait_until_gone()
    try:
        serve.start(http_options={"port": settings.gateway.port})
        serve.run(from_config({"config": config}), name=APP_NAME)
        print(f"{config} {IS_DEPLOYED}", flush=True)
        while True:
            signal.pause()
    finally:
        serve.shutdown()
        _wait_until_gone()


def _wait_until_gone() -> None:
    """Serve's controller may end after the call that ends it; who deploys meanwhile finds one that dies."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            return
        time.sleep(POLL_S)
    raise TimeoutError(
        f"Serve still runs on this cluster after {GONE_WITHIN_S:g} s; see `serve status`, end it with `serve shutdown`"
    )


if __name__ == "__main__":
    main(sys.argv[1])
