"""Owns a hold on the Serve of a local run: which process is which replica, and how many replicas a pool has.

`ServeControl` is the caller's end. The other is a process of its own in the run's environment, because Ray takes a
process for good and reads its settings when it is imported: python -m bench.serve_control ADDRESS
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

APP_NAME = "baton"


class ServeControl:
    def __init__(self, pids: Iterable[int]) -> None:
        """`pids`: of all processes of the run. Raises RuntimeError if they are not those of one run."""
        processes = list(_processes(pids))
        drivers = [process for process, words in processes if "gateway.runtime.driver" in words]
        addresses = {
            word.removeprefix("--gcs-address=")
            for _, words in processes
            for word in words
            if word.startswith("--gcs-address=")
        }
        if len(drivers) != 1 or len(addresses) != 1:
            raise RuntimeError(f"these are not the processes of one run: {len(drivers)} drivers, Ray at {addresses}")
        (self.ray_address,) = addresses
        self.environment = drivers[0].environ()
        """What a process needs to be a client of this Ray."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.serve_control", self.ray_address],
            cwd=Path(__file__).parents[1],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    @property
    def pid(self) -> int:
        """Of the other end."""
        return self._process.pid

    def pids(self, deployment: str) -> dict[str, int]:
        """The running replicas' processes by replica id."""
        return self._ask("pids", deployment)

    def scale(self, deployment: str, num_replicas: int) -> None:
        """Returns when Serve has been told; it takes its time."""
        self._ask("scale", deployment, num_replicas)

    def update(self, settings_file: Path) -> None:
        """Deploys the run's application anew, with other settings: every replica of every deployment is replaced.
        Returns when Serve has been told; it takes its time."""
        self._ask("update", str(settings_file))

    def failure(self) -> str:
        """Why Serve has given up an update; empty if it has not."""
        return self._ask("failure")

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
        if not answer:
            raise RuntimeError(f"the control process ended with {self._process.wait()}")
        return json.loads(answer)


def _processes(pids: Iterable[int]) -> Iterator[tuple[psutil.Process, list[str]]]:
    """With their command lines."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield (process := psutil.Process(pid)), process.cmdline()


def main(address: str) -> None:
    import ray
    from ray import serve
    from ray.serve._private.common import DeploymentID, DeploymentStatus
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationStatus, ServeInstanceDetails

    from gateway.app import build
    from gateway.settings import Settings

    # Ray and Serve print as they like; only answers may come where the caller reads.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    ray.init(address, log_to_driver=False, configure_logging=False, namespace="serve")
    client = _get_global_client()
    assert client is not None
    controller: Any = client._controller

    def pids(deployment: str) -> dict[str, int]:
        told: Any = ray.get(controller.get_serve_instance_details.remote())
        details = ServeInstanceDetails(**told)
        replicas = details.applications[APP_NAME].deployments[deployment].replicas
        return {replica.replica_id: replica.pid for replica in replicas if replica.pid and replica.state == "RUNNING"}

    def scale(deployment: str, num_replicas: int) -> None:
        ray.get(controller.update_deployment_replicas.remote(DeploymentID(deployment, APP_NAME), num_replicas))

    def update(settings_file: str) -> None:
        app = build(Settings.model_validate_json(Path(settings_file).read_text()))
        target = serve.RunTarget(target=app, name=APP_NAME, route_prefix="/", external_scaler_enabled=True)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def failure() -> str:
        told: Any = ray.get(controller.get_serve_instance_details.remote())
        app = ServeInstanceDetails(**told).applications[APP_NAME]
        if app.status != ApplicationStatus.DEPLOY_FAILED:
            return ""
        return (
            " ".join(one.message for one in app.deployments.values() if one.status == DeploymentStatus.DEPLOY_FAILED)
            or app.message
        )

    commands = {"pids": pids, "scale": scale, "update": update, "failure": failure}
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(commands[command](*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
