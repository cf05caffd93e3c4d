"""What every request passes: the count, errors as JSON, the token, and strangers' pages."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from aiohttp import web

from ..errors import RequestError
from .service import SERVICE, problem

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OPEN = ("/health", "/ready")  # without a token: probes have none
GETS_THAT_ACT = ("/v1/local/video/generate/stop_running_task",)  # of LightX2V's older clients


@web.middleware
async def measured(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as JSON, counted under the route's pattern."""
    service, started = request.app[SERVICE], time.perf_counter()
    resource = request.match_info.route.resource
    endpoint = "unknown" if resource is None else resource.canonical
    status = 500
    try:
        response = await _answer(request, handler)
        status = response.status
    finally:
        seconds = time.perf_counter() - started
        service.metrics.answered(request.method, endpoint, status, seconds)
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPRedirection as error:
        return web.Response(status=error.status, headers={"Location": error.headers["Location"]})
    except web.HTTPException as error:
        detail = error.reason if error.status != 413 else "the body is over the limit of its size"
        return problem(error.status, detail)
    except RequestError as error:
        return problem(400, str(error))


@web.middleware
async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The token, and what browsers do for pages of strangers."""
    options = request.app[SERVICE].options
    if options.token and request.path not in OPEN:
        sent = request.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(sent, f"Bearer {options.token}".encode()):
            return problem(401, "a bearer token is needed", **{"WWW-Authenticate": "Bearer"})
    if not options.token and options.is_local and not _is_local_name(request.host):
        # A page of another site whose name was turned to this machine (DNS rebinding).
        detail = f"this service is for this machine alone, which is not called {request.host!r}; "
        return problem(403, detail + "set a token to be reached by other names")
    origin = request.headers.get("Origin")
    if (origin and urlsplit(origin).netloc != request.host) or _is_strange_action(request):
        return problem(403, "pages of other sites may not use this service")
    return await handler(request)


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _is_strange_action(request: web.Request) -> bool:
    """Browsers say where a request comes from; other programs say nothing."""
    is_action = request.method not in ("GET", "HEAD") or request.path in GETS_THAT_ACT
    return is_action and request.headers.get("Sec-Fetch-Site", "none") not in (
        "none",
        "same-origin",
    )
