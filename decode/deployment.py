"""Owns the Ray Serve deployment of the decode pool."""

from ray import serve

from decode.worker import DecodeWorker
from engine.deployment import WorkerReplica


@serve.deployment(name="decode")
class DecodeReplica(WorkerReplica):
    worker_class = DecodeWorker
