"""Owns where a replica's log lines go, and how they name the request that they concern."""

import contextlib
import contextvars
import logging
from collections.abc import Iterator

REQUEST_ID = "baton_request_id"
"""The field of a line that has it: what clients get as `x-baton-request-id`, of a request's further prompts with its
number."""

_current: contextvars.ContextVar[str | None] = contextvars.ContextVar(REQUEST_ID, default=None)


@contextlib.contextmanager
def about(request_id: str) -> Iterator[None]:
    """What is logged within, and by tasks that begin within, concerns this request."""
    token = _current.set(request_id)
    try:
        yield
    finally:
        # A generator that is closed elsewhere ends in another context.
        with contextlib.suppress(ValueError):
            _current.reset(token)


class NameRequest(logging.Filter):
    """Drops nothing; gives each line the id of the request it concerns, if it concerns one."""

    def filter(self, record: logging.LogRecord) -> bool:
        request_id = _current.get()
        if request_id is not None and not hasattr(record, REQUEST_ID):
            setattr(record, REQUEST_ID, request_id)
            if not hasattr(record, "request_id"):
                # What Ray Serve's text format shows. In JSON it is Serve's own id, which engines' ids are made from.
                record.request_id = request_id
        return True


def begin() -> None:
    """From now on this process's lines name their request, and Baton's go where Ray Serve's do, from INFO on."""
    for handler in logging.getLogger("ray.serve").handlers:
        handler.addFilter(NameRequest())
    adopt("baton")
    logging.getLogger("baton").setLevel(logging.INFO)


def adopt(name: str) -> None:
    """A logger's lines go where Ray Serve's do, whole, with their level and their trace, and nowhere else."""
    logger = logging.getLogger(name)
    logger.handlers[:] = logging.getLogger("ray.serve").handlers
    logger.propagate = False
