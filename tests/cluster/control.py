"""Owns a test's hold on the Serve of a run."""

from bench.serve_control import ServeControl
from tests.cluster.running import Run


class Control(ServeControl):
    def __init__(self, run: Run) -> None:
        super().__init__(run.pids())
