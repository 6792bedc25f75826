"""Owns where a replica's log lines go, and how they name the request that they concern."""

import contextvars
import logging
import logging.handlers

REQUEST_ID = "baton_request_id"
"""The field of a line that has it: what clients get as `x-baton-request-id`, of a request's further prompts with its
number."""

_current: contextvars.ContextVar[str | None] = contextvars.ContextVar(REQUEST_ID, default=None)


class about:
    """`with about(id)`: what is logged within, and by tasks that begin within, concerns this request. Once a token goes
    through it, so it is no generator."""

    __slots__ = ("_request_id", "_token")

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id

    def __enter__(self) -> None:
        self._token = _current.set(self._request_id)

    def __exit__(self, *_: object) -> None:
        try:  # noqa: SIM105  suppress takes longer than all the rest
            _current.reset(self._token)
        except ValueError:
            # A generator that is closed elsewhere ends in another context.
            pass


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


_files: dict[logging.handlers.MemoryHandler, logging.Handler] = {}
"""Of Ray Serve's handlers, which collect lines and write them to another."""


def begin() -> None:
    """From now on this process's lines name their request, and Baton's go where Ray Serve's do, from INFO on."""
    for handler in logging.getLogger("ray.serve").handlers:
        handler.addFilter(NameRequest())
        if isinstance(handler, logging.handlers.MemoryHandler) and handler.target is not None:
            _files[handler] = handler.target
    adopt("baton")
    logging.getLogger("baton").setLevel(logging.INFO)


def adopt(name: str) -> None:
    """A logger's lines go where Ray Serve's do, whole, with their level and their trace, and nowhere else.

    A library that configures logging by `logging.config`, as vLLM does, has closed Serve's handlers with all others:
    they kept every line for good and wrote none. They get their files back, and what they have kept goes there.
    """
    for handler, file in _files.items():
        handler.setTarget(file)
        handler.flush()
    logger = logging.getLogger(name)
    logger.handlers[:] = logging.getLogger("ray.serve").handlers
    logger.propagate = False
