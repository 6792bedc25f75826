"""Owns a deployment of Baton on a Ray cluster that is there, for as long as this process lives.

`python -m bench.on_cluster CONFIG`, on a node of the cluster: as `serve run gateway.app:from_config config=CONFIG`, but
the signal that ends other systems of a comparison ends this one as well.
"""

import signal
import sys
from types import FrameType

import ray
from ray import serve

from bench.systems import IS_DEPLOYED
from gateway.app import from_config
from gateway.settings import load

APP_NAME = "baton"


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit


def main(config: str) -> None:
    settings = load(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    ray.init(settings.runtime.ray_address, namespace="serve", log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"port": settings.gateway.port})
        serve.run(from_config({"config": config}), name=APP_NAME)
        print(f"{config} {IS_DEPLOYED}", flush=True)
        while True:
            signal.pause()
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
