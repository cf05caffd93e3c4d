"""Child processes that leave no open pipe behind, whatever ends them."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import Process
from collections.abc import Awaitable
from contextlib import suppress

CHUNK = 1 << 16


async def finish(work: Awaitable[object]) -> None:
    """Wait for `work` to its end. A cancel that comes meanwhile is heard after it, since an ending
    cut short leaves a process and its pipes behind."""
    future = asyncio.ensure_future(work)
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await future
        raise


async def read_to_end(stream: asyncio.StreamReader | None, seconds: float) -> None:
    """Take and drop what is left: end of file closes a pipe. At most `seconds`, since a child of
    the process may hold the other end."""
    assert stream is not None, "the process was started with a pipe"
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while await stream.read(CHUNK):
                pass


async def end(process: Process, seconds: float) -> None:
    """Kill a process whose stdout nobody else reads; it and that pipe are gone on return."""
    if process.returncode is None:
        process.kill()
    await read_to_end(process.stdout, seconds)
    await process.wait()
