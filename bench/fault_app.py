"""Owns the run that faults strike: `baton serve` as ever, with leave for others to change how many replicas a pool has.

python -m bench.fault_app CONFIG PORT
"""

import functools
import sys

from ray import serve

from gateway import app, launcher
from gateway.settings import Settings, load

BUILD = "bench.fault_app:build"


def build(settings: Settings) -> serve.Application:
    serve.RunTarget = functools.partial(serve.RunTarget, external_scaler_enabled=True)
    return app.build(settings)


if __name__ == "__main__":
    sys.exit(launcher.serve(load(sys.argv[1], {"gateway.port": int(sys.argv[2])}), build=BUILD, demo=False))
