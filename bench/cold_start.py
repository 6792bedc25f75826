"""Owns the measuring of a cold engine start: python -m bench.cold_start CONFIG prints seconds.

From the start of a fresh process to an engine that takes requests, alone on the machine: what Serve has to do again for
an engine that died, without what Serve adds to it.
"""

import asyncio
import sys
import time

import psutil

from engine.ports import free_ports
from engine.protocol import Phase
from engine.vllm_engine import VllmEngine
from gateway.app import engine_spec
from gateway.runtime.environment import LOOPBACK
from gateway.settings import Settings, load


async def start_s(settings: Settings) -> float:
    """Starts one decode engine of the configuration in this process and ends it."""
    spec = engine_spec(settings, Phase.DECODE)
    cores = spec.cpu_cores[0] if spec.cpu_cores else []
    engine = await VllmEngine.start(spec.engine_config(f"cold-{free_ports(LOOPBACK)[0]}", cores, LOOPBACK))
    took_s = time.time() - psutil.Process().create_time()
    await engine.shutdown()
    return took_s


if __name__ == "__main__":
    print(f"{asyncio.run(start_s(load(sys.argv[1]))):.3f}")
