"""Owns the files of receipts: one line of JSON for each request that has ended, in files that do not grow for ever."""

import contextlib
import logging
import queue
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path

import msgspec

from gateway.routing import receipt_lines
from gateway.routing.receipts import Receipt

SUFFIX = ".jsonl"
MAX_WAITING = 10_000
"""Receipts that wait for the disk; further ones are left out and counted."""

CLOSE_TIMEOUT_S = 2.0
MAX_FILES = 64
"""In one folder. Each start of a gateway begins a file, and takes away those that were written to the longest ago."""


class UnreadableReceipt(ValueError):
    """A line of a file is no receipt of this version."""


class ReceiptLog:
    """One gateway's file, written by a thread of its own. When it is full it becomes the old one (`.1`), in place of
    the one before: at most twice `max_bytes` are kept."""

    def __init__(self, file: Path, max_bytes: int, dropped: Callable[[], None]) -> None:
        """`dropped` is told of each receipt that is left out. Raises OSError."""
        file.parent.mkdir(parents=True, exist_ok=True)
        _make_room(file.parent)
        self._logger = logging.Logger(f"baton.receipts.{file.stem}")
        waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING)
        self._logger.addHandler(_Dropping(waiting, dropped))
        writer = _Writer(file, maxBytes=max_bytes, backupCount=1, encoding="utf-8")
        writer.dropped = dropped
        self._listener = _Listener(waiting, writer)
        self._writer = writer
        self._listener.start()

    def append(self, receipt: Receipt) -> None:
        self._logger.info("%s", receipt_lines.encode(receipt).decode())

    def close(self) -> None:
        """Writes what waits; a disk that takes nothing for CLOSE_TIMEOUT_S loses it. Raises queue.Full."""
        self._listener.stop()
        self._writer.close()


def _files(folder: Path) -> list[Path]:
    return [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}.1")]


def _make_room(folder: Path) -> None:
    by_age: list[tuple[float, Path]] = []
    for file in _files(folder):
        # Another gateway that starts may take the same one away.
        with contextlib.suppress(OSError):
            by_age.append((file.stat().st_mtime, file))
    for _, file in sorted(by_age)[: max(len(by_age) - MAX_FILES + 1, 0)]:
        with contextlib.suppress(OSError):
            file.unlink()


class _Writer(RotatingFileHandler):
    dropped: Callable[[], None]

    def handleError(self, record: logging.LogRecord) -> None:
        """What the disk refuses."""
        self.dropped()


class _Listener(QueueListener):
    def enqueue_sentinel(self) -> None:
        self.queue.put(None, timeout=CLOSE_TIMEOUT_S)  # type: ignore[attr-defined]


class _Dropping(QueueHandler):
    def __init__(self, waiting: "queue.Queue[logging.LogRecord]", dropped: Callable[[], None]) -> None:
        super().__init__(waiting)
        self._dropped = dropped

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._dropped()


def files_in(paths: Iterable[Path]) -> list[Path]:
    """The files of receipts that the paths name: files themselves, and those of folders, each
    gateway's old one before its new one."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(_files(path), key=lambda file: (file.name.removesuffix(".1"), not file.name.endswith(".1")))
        else:
            found.append(path)
    return found


def read(file: Path, absent: Counter[str] | None = None) -> Iterator[Receipt]:
    """A last line that is cut off, as a killed gateway leaves it, is none. In `absent` receipts are counted by the
    inputs that they lack (`receipt_lines.decode`). Raises OSError, UnreadableReceipt."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield receipt_lines.decode(line, absent)
            except msgspec.DecodeError as error:
                raise UnreadableReceipt(
                    f"{file}, line {number}: no receipt of this version of Baton: {error}"
                ) from error
