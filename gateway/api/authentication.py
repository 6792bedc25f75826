"""Owns the ASGI layer that asks for keys: whose request it is, and whether its tenant may have one more."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import metrics
from gateway.agents.tenants import Limiter, Tenant, Tenants
from gateway.api import context
from gateway.api.middleware import send_error
from gateway.refusals import RefusalLog
from gateway.routing.types import Rejection

OPEN_PATHS = frozenset({"/health"})
"""They say nothing of anybody, and load balancers and kubelets ask them."""

BEARER = "bearer "
NO_KEY_GIVEN = "this needs an API key: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
UNKNOWN_KEY = "no tenant has this API key"


class Authentication:
    """Lets in requests with a tenant's key, within the tenant's limits; answers 401 or 429 to others, their bodies
    unread. Whatever becomes of a request that was let in, it is counted out once, when the application has ended."""

    def __init__(self, app: ASGIApp, tenants: Tenants, limiter: Limiter):
        self._app = app
        self._tenants = tenants
        self._limiter = limiter
        self._refusals = RefusalLog()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        request = context.current.get()
        assert request is not None, "ResponseStart must be around this layer"
        key = key_of(Headers(scope=scope))
        tenant = None if key is None else self._tenants.of(key)
        if tenant is None:
            metrics.UNAUTHENTICATED.inc()
            message = NO_KEY_GIVEN if key is None else UNKNOWN_KEY
            await send_error(scope, send, 401, message, headers={"www-authenticate": "Bearer"})
            return
        entry = self._limiter.enter(tenant)
        if isinstance(entry, Rejection):
            await self._refuse(scope, send, request, tenant, entry)
            return
        request.entry = entry
        try:
            await self._app(scope, receive, send)
        finally:
            entry.close()

    async def _refuse(
        self, scope: Scope, send: Send, request: context.RequestContext, tenant: Tenant, rejection: Rejection
    ) -> None:
        # Its headers were not read: what it claims is not known.
        metrics.count_rejection(rejection, request.hints.priority, tenant.name)
        self._refusals.note(request.request_id, rejection, request.hints.priority)
        await send_error(
            scope, send, rejection.status, rejection.reason, headers={"retry-after": str(rejection.retry_after_s)}
        )


def key_of(headers: Headers) -> bytes | None:
    """The key in `x-api-key`, as Anthropic's clients send it, or else in `Authorization: Bearer`; as it was sent."""
    key = headers.get("x-api-key", "")
    authorization = headers.get("authorization", "")
    if not key and authorization.lower().startswith(BEARER):
        key = authorization[len(BEARER) :].strip()
    return key.encode("latin-1") or None
