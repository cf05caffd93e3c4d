"""What all handlers share: the parts of the service, and the form of its refusals."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web

from .metrics import Metrics
from .options import Options
from .tasks import Tasks
from .workers import Pool


@dataclass(slots=True)
class Service:
    """What the handlers share."""

    options: Options
    tasks: Tasks
    pool: Pool
    metrics: Metrics
    decoding: asyncio.Semaphore  # pictures decoded at a time
    receiving: asyncio.Semaphore  # large bodies in memory at a time


SERVICE = web.AppKey("service", Service)


def problem(status: int, detail: str, **headers: str) -> web.Response:
    """{"detail": sentence}, as LightX2V's."""
    return web.json_response({"detail": detail}, status=status, headers=headers)
