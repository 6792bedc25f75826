"""Owns what SIGTERM does to a replica's process: it ends at once."""

import ctypes
import signal


def end_at_sigterm() -> None:
    """From any thread, and for good: SIGTERM does to this process what the kernel makes of it.

    Ray's handler ends the actor and not the process, which then serves on over connections that it has, passes for
    hanging at Serve, and keeps its resources, so that no other can start in its place. What a replica leaves when it
    dies is in good hands; so let it die.
    """
    # Python lets only the main thread set handlers, and that is Ray's.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGTERM, None)
