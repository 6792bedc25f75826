"""Owns the Ray Serve deployment of the prefill pool."""

from ray import serve

from engine.deployment import WorkerReplica
from prefill.worker import PrefillWorker


@serve.deployment(name="prefill")
class PrefillReplica(WorkerReplica):
    worker_class = PrefillWorker
