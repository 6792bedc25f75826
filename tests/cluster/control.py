"""Owns a test's hold on the Serve of a run: which process is which replica, and how many replicas a pool has.

`Control` is the test's end. The other is a process of its own in the run's environment, because Ray takes a process
for good and reads its settings when it is imported: python -m tests.cluster.control ADDRESS
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.running import Run

APP_NAME = "baton"


class Control:
    def __init__(self, run: Run) -> None:
        (driver,) = (process for process, words in _processes(run) if "gateway.runtime.driver" in words)
        (address,) = {
            word.removeprefix("--gcs-address=")
            for _, words in _processes(run)
            for word in words
            if word.startswith("--gcs-address=")
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.control", address],
            cwd=Path(__file__).parents[2],
            env=driver.environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def pids(self, deployment: str) -> dict[str, int]:
        """The running replicas' processes by replica id."""
        return self._ask("pids", deployment)

    def scale(self, deployment: str, num_replicas: int) -> None:
        """Returns when Serve has been told; it takes its time."""
        self._ask("scale", deployment, num_replicas)

    def update(self, settings_file: Path, simulation: dict[str, Any]) -> None:
        """Deploys the run's application anew, with other settings of the simulated engines: every replica of every
        deployment is replaced. Returns when Serve has been told; it takes its time."""
        self._ask("update", str(settings_file), simulation)

    def close(self) -> None:
        """May be repeated."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the control process ended with {self._process.wait()}"
        return json.loads(answer)


def _processes(run: Run) -> Iterator[tuple[psutil.Process, list[str]]]:
    """With their command lines."""
    for pid in run.pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield (process := psutil.Process(pid)), process.cmdline()


def main(address: str) -> None:
    import ray
    from ray import serve
    from ray.serve._private.common import DeploymentID
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeInstanceDetails

    from gateway.app import build
    from gateway.settings import Settings

    ray.init(address, log_to_driver=False, configure_logging=False, namespace="serve")
    controller: Any = _get_global_client()._controller

    def pids(deployment: str) -> dict[str, int]:
        details = ServeInstanceDetails(**ray.get(controller.get_serve_instance_details.remote()))
        replicas = details.applications[APP_NAME].deployments[deployment].replicas
        return {replica.replica_id: replica.pid for replica in replicas if replica.pid and replica.state == "RUNNING"}

    def scale(deployment: str, num_replicas: int) -> None:
        ray.get(controller.update_deployment_replicas.remote(DeploymentID(deployment, APP_NAME), num_replicas))

    def update(settings_file: str, simulation: dict[str, Any]) -> None:
        settings = Settings.model_validate_json(Path(settings_file).read_text())
        assert settings.simulation is not None
        changed = settings.model_copy(update={"simulation": settings.simulation.model_copy(update=simulation)})
        target = serve.RunTarget(target=build(changed), name=APP_NAME, route_prefix="/", external_scaler_enabled=True)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    commands = {"pids": pids, "scale": scale, "update": update}
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
