"""Owns the log's line for each HTTP request. It says nothing that a client has written: no path but Baton's own routes,
no query, header or body."""

import logging
import time

from starlette.types import Message, Scope, Send

from gateway.api import context, fields

log = logging.getLogger("baton.access")

OTHER = "other"
RECEIPTS = "/baton/receipts/"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
PATHS = frozenset(path for _, path in fields.ROUTES)


class Line:
    """Of one request: sees its response go by, and is written when that is over."""

    def __init__(self, scope: Scope, send: Send, request: context.RequestContext) -> None:
        self._scope = scope
        self._send = send
        self._request = request
        self._status: int | None = None
        self._is_whole = False

    async def send(self, message: Message) -> None:
        await self._send(message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            self._is_whole = not message.get("more_body", False)

    def write(self) -> None:
        method, request = self._scope["method"], self._request
        told = {
            "http_method": method if method in METHODS else OTHER,
            "http_route": route_of(self._scope["path"]),
            "http_status": self._status,
            "duration_ms": round((time.monotonic() - request.received_s) * 1000, 1),
            "whole": self._is_whole,
            "prompts": request.num_groups,
            "tenant": request.tenant.name if request.tenant else None,
        }
        end = "" if self._is_whole else ", broken off"
        log.info("%(http_method)s %(http_route)s %(http_status)s in %(duration_ms)s ms" + end, told, extra=told)


def route_of(path: str) -> str:
    if path.startswith(RECEIPTS):
        return RECEIPTS + "{request_id}"
    return path if path in PATHS else OTHER
