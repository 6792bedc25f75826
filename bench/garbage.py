"""Owns when Python looks for garbage while something is measured."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collected_at(*thresholds: int) -> Iterator[None]:
    """By these thresholds inside (`gc.set_threshold`), and never among what is there when it begins."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
