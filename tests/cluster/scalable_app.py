"""Owns the application `baton` as a run deploys it, with leave for others to change how many replicas a pool has."""

import functools

from ray import serve

from gateway import app
from gateway.settings import Settings


def build(settings: Settings) -> serve.Application:
    serve.RunTarget = functools.partial(serve.RunTarget, external_scaler_enabled=True)
    return app.build(settings)
