"""Requests for videos: bodies and forms read with limits, pictures checked, a place in line."""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

from aiohttp import BodyPartReader, web

from ..errors import RequestError
from .body import VideoRequest, read_body, read_form
from .pictures import check_picture, from_base64
from .remote import fetch
from .service import SERVICE, Service, problem

FORM_FILES = {"image_file": "image_path", "last_frame_file": "last_frame_path"}
SMALL_BODY = 1 << 20  # bytes
MAX_PARTS = 40
MAX_TEXT = 64 << 10  # bytes of a text field of a form


async def create_task(request: web.Request) -> web.StreamResponse:
    """Queue the video that a JSON body asks for."""
    service = request.app[SERVICE]
    if refused := refusal(service):
        return refused
    if request.content_type != "application/json":
        return problem(415, "send JSON with Content-Type: application/json, or a form to .../form")
    async with _gate(request):
        try:
            async with asyncio.timeout(service.options.body_seconds):
                data = await request.read()
        except TimeoutError:
            return problem(408, "the body came too slowly", Connection="close")
        try:
            body = await asyncio.to_thread(json.loads, data)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from error
        asked = read_body(body, service.options.limits)
        _check_task(service, asked, set(asked.pictures))
        pictures: dict[str, bytes] = {}
        for name, text in asked.pictures.items():
            pictures[name] = await _picture(service, name, text)
        return await _queue(service, asked, pictures)


async def create_task_from_form(request: web.Request) -> web.StreamResponse:
    """Queue the video that a form with files asks for."""
    service = request.app[SERVICE]
    if refused := refusal(service):
        return refused
    if request.content_type != "multipart/form-data":
        return problem(415, "send a form as multipart/form-data")
    async with _gate(request):
        try:
            async with asyncio.timeout(service.options.body_seconds):
                texts, pictures = await _read_parts(request, service.options.limits.upload_bytes)
        except TimeoutError:
            return problem(408, "the body came too slowly", Connection="close")
        asked = read_form(texts, service.options.limits)
        _check_task(service, asked, set(pictures))
        return await _queue(service, asked, pictures)


def _gate(request: web.Request) -> AbstractAsyncContextManager[object]:
    """A few large bodies at a time; one that does not say how large it is counts as large."""
    length = request.content_length
    is_small = length is not None and length <= SMALL_BODY
    return nullcontext() if is_small else request.app[SERVICE].receiving


async def _read_parts(
    request: web.Request, max_bytes: int
) -> tuple[dict[str, str], dict[str, bytes]]:
    """Text fields and files of a form. What a file is called is never looked at."""
    texts: dict[str, str] = {}
    pictures: dict[str, bytes] = {}
    try:
        reader = await request.multipart()
        for _ in range(MAX_PARTS):
            part = await reader.next()
            if part is None:
                return texts, pictures
            if not isinstance(part, BodyPartReader) or part.name is None:
                raise RequestError("the form holds a part without a name")
            if part.name in FORM_FILES:
                if data := await _read_part(part, max_bytes):
                    pictures[FORM_FILES[part.name]] = data
            elif part.filename:
                if await _read_part(part, max_bytes):
                    raise RequestError(f"the file {part.name[:40]!r} has no use here; leave it out")
            else:
                texts[part.name] = (await _read_part(part, MAX_TEXT)).decode("utf-8")
    except (ValueError, AssertionError) as error:  # what aiohttp raises for forms that are none
        raise RequestError(f"the form cannot be read: {error}") from error
    raise RequestError(f"the form has more than {MAX_PARTS} parts")


async def _read_part(part: BodyPartReader, max_bytes: int) -> bytes:
    data = bytearray()
    while chunk := await part.read_chunk(1 << 16):
        data += chunk
        if len(data) > max_bytes:
            raise web.HTTPRequestEntityTooLarge(max_bytes, len(data))
    return bytes(data)


def refusal(service: Service) -> web.Response | None:
    tasks = service.tasks
    if tasks.is_stopping:
        return problem(503, "the service is stopping")
    if tasks.is_full:
        detail = f"Task queue is full (max {tasks.capacity} tasks)"
        return problem(503, detail, **{"Retry-After": "5"})
    return None


def _check_task(service: Service, asked: VideoRequest, sent: set[str]) -> None:
    """Pictures the service's task needs or does not take; the rest is the worker's to judge."""
    needed = {"i2v": {"image_path"}, "flf2v": {"image_path", "last_frame_path"}}
    task = service.options.task
    if missing := needed.get(task, set()) - sent:
        raise RequestError(f"task {task} needs {' and '.join(sorted(missing))}")
    if task == "t2v" and sent:
        raise RequestError("this service runs t2v, which takes no picture; leave it out")


async def _picture(service: Service, name: str, text: str) -> bytes:
    most = service.options.limits.upload_bytes
    if text[:8].lower().startswith(("http://", "https:/")):
        if not service.options.allow_remote_images:
            raise RequestError(
                f"{name} is a URL, and this service fetches none; send the picture as base64, or "
                "start it with --allow-remote-images"
            )
        return await fetch(text, name, most)
    data = await asyncio.to_thread(from_base64, text, name)
    if len(data) > most:
        raise web.HTTPRequestEntityTooLarge(most, len(data))
    return data


async def _queue(
    service: Service, asked: VideoRequest, pictures: dict[str, bytes]
) -> web.StreamResponse:
    files: dict[str, Path] = {}
    taken = False
    try:
        for name, data in pictures.items():
            async with service.decoding:
                suffix = await asyncio.to_thread(check_picture, data, name)
            files[name] = service.tasks.folders.keep_picture(data, suffix)
        if refused := refusal(service):
            return refused
        if service.tasks.find(asked.task_id) is not None:
            return problem(409, f"Task ID {asked.task_id} already exists")
        record = service.tasks.create(asked, files).record
        taken = True
    finally:
        for path in () if taken else files.values():
            path.unlink(missing_ok=True)
    return web.json_response(
        {
            "task_id": record.id,
            "task_status": "pending",
            "save_result_path": record.name,
            "warnings": record.warnings,
        }
    )
