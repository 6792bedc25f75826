"""SIGTERM ends a process that has a handler of its own for it, once it was told so, from whatever thread."""

import signal
import subprocess
import sys

import pytest

DEADLINE_S = 30.0
PROCESS = """
import signal, sys, threading
signal.signal(signal.SIGTERM, lambda *_: None)
if sys.argv[1] == "told":
    from engine.termination import end_at_sigterm
    thread = threading.Thread(target=end_at_sigterm)
    thread.start()
    thread.join()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("told", "code"), [("told", -signal.SIGTERM), ("not told", 0)])
def test_sigterm_ends_a_process_that_was_told_so(told: str, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        # The end of its input ends one that lives on.
        process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
