"""LightX2V's routes over the queue.

Facts of the routes: LightX2V's lightx2v/server/api (router.py, tasks/common.py, tasks/video.py,
service_routes.py, files.py) and docs deploy_guides/deploy_service. Errors are {"detail": sentence}.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import quote

from aiohttp import web

from .guard import GETS_THAT_ACT, guarded, measured
from .intake import create_task, create_task_from_form
from .journal import COMPLETED, Record
from .openapi import describe, page
from .service import SERVICE, Service

CSP = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def make_application(service: Service) -> web.Application:
    """The routes, behind the counting, the token and the checks against browsers' strangers."""
    upload = service.options.limits.upload_bytes
    application = web.Application(
        middlewares=[measured, guarded], client_max_size=upload * 2 * 4 // 3 + (1 << 20)
    )
    application[SERVICE] = service
    add, get = application.router.add_route, application.router.add_get
    for path in ("/v1/tasks/video/", "/v1/tasks/video", "/v1/tasks/", "/v1/tasks"):
        add("POST", path, create_task)
    for path in ("/v1/tasks/video/form", "/v1/tasks/form"):
        add("POST", path, create_task_from_form)
    for path in ("/v1/tasks/", "/v1/tasks"):
        get(path, list_tasks)
    get("/v1/tasks/queue/status", queue_status)
    get("/v1/tasks/{task_id}/status", task_status)
    get("/v1/tasks/{task_id}/result", task_result)
    add("DELETE", "/v1/tasks/all/running", cancel_all)
    add("DELETE", "/v1/tasks/running", cancel_running)
    for path in GETS_THAT_ACT:
        get(path, cancel_running)
    add("DELETE", "/v1/tasks/{task_id}", cancel_task)
    get("/v1/files/download/{name:.+}", download)
    get("/v1/service/status", service_status)
    get("/v1/service/metadata", service_metadata)
    get("/metrics", metrics)
    get("/health", health)
    get("/ready", ready)
    get("/openapi.json", openapi)
    get("/docs", docs)
    get("/", home)
    return application


async def list_tasks(request: web.Request) -> web.StreamResponse:
    """Every task that is remembered, by id."""
    tasks = request.app[SERVICE].tasks
    return web.json_response({r.id: tasks.status(r) for r in tasks.journal.all()})


async def queue_status(request: web.Request) -> web.StreamResponse:
    """How much of the queue is taken."""
    tasks = request.app[SERVICE].tasks
    running, active = tasks.processing, len(tasks.active)
    return web.json_response(
        {
            "is_processing": bool(running),
            "current_task": running[0].record.id if running else None,
            "pending_count": tasks.pending,
            "active_count": active,
            "queue_size": tasks.capacity,
            "queue_available": tasks.capacity - active,
        }
    )


def _found(request: web.Request) -> Record:
    record = request.app[SERVICE].tasks.find(request.match_info["task_id"])
    if record is None:
        raise web.HTTPNotFound(reason="Task not found")
    return record


async def task_status(request: web.Request) -> web.StreamResponse:
    """State, times, progress and error of one task."""
    record = _found(request)
    return web.json_response(request.app[SERVICE].tasks.status(record))


async def task_result(request: web.Request) -> web.StreamResponse:
    """The video of a completed task, whole or by range."""
    record = _found(request)
    if record.status != COMPLETED:
        raise web.HTTPNotFound(reason="Task not completed")
    return _video(request, record)


async def download(request: web.Request) -> web.StreamResponse:
    """The newest video of that name. Names are looked up among results, never on the disk."""
    record = request.app[SERVICE].tasks.journal.by_name(request.match_info["name"])
    if record is None:
        raise web.HTTPNotFound(reason="File not found")
    return _video(request, record)


def _video(request: web.Request, record: Record) -> web.StreamResponse:
    path = request.app[SERVICE].tasks.folders.result(record)
    if not path.is_file():
        raise web.HTTPNotFound(reason="Task result file does not exist")
    name = quote(PurePosixPath(record.name).name)
    headers = {
        "Content-Type": "video/mp4",
        "Content-Disposition": f"attachment; filename*=UTF-8''{name}",
    }
    return web.FileResponse(path, headers=headers)


def _stopped(count: int, none: str) -> web.Response:
    if not count:
        return web.json_response({"stop_status": "do_nothing", "reason": none})
    reason = "Task stopped successfully." if count == 1 else f"{count} tasks stopped successfully."
    return web.json_response({"stop_status": "success", "reason": reason})


async def cancel_task(request: web.Request) -> web.StreamResponse:
    """Cancel a task that waits or runs."""
    is_cancelled = request.app[SERVICE].tasks.cancel(request.match_info["task_id"])
    return _stopped(int(is_cancelled), "Task not found or already completed.")


async def cancel_running(request: web.Request) -> web.StreamResponse:
    """Cancel what runs; what waits goes on."""
    tasks = request.app[SERVICE].tasks
    running = [task.record.id for task in tasks.processing]
    return _stopped(sum(tasks.cancel(name) for name in running), "No task is running.")


async def cancel_all(request: web.Request) -> web.StreamResponse:
    """Cancel everything that runs or waits."""
    tasks = request.app[SERVICE].tasks
    return _stopped(sum(tasks.cancel(name) for name in list(tasks.active)), "There are no tasks.")


async def service_status(request: web.Request) -> web.StreamResponse:
    """Busy or idle, and counts since the start."""
    tasks = request.app[SERVICE].tasks
    running = [task.record.id for task in tasks.processing]
    return web.json_response(
        {
            "service_status": "busy" if running else "idle",
            "current_task": running[0] if running else None,
            "active_tasks": running,
            "pending_tasks": tasks.pending,
            "queue_size": tasks.capacity,
            "total_tasks": tasks.counts["created"],
            "completed_tasks": tasks.counts["completed"],
            "failed_tasks": tasks.counts["failed"],
            "cancelled_tasks": tasks.counts["cancelled"],
        }
    )


async def service_metadata(request: web.Request) -> web.StreamResponse:
    """What the service was started with."""
    options = request.app[SERVICE].options
    return web.json_response(
        {
            "nproc_per_node": options.processes,
            "model_cls": options.model_cls,
            "model_path": options.model_path,
        }
    )


async def metrics(request: web.Request) -> web.StreamResponse:
    """Prometheus' text format."""
    service = request.app[SERVICE]
    service.metrics.see_workers([worker.process.pid for worker in service.pool.ready])
    await service.metrics.see_gpus()
    headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    return web.Response(body=service.metrics.text(), headers=headers)


async def health(_request: web.Request) -> web.StreamResponse:
    """Whether the service answers at all."""
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.StreamResponse:
    """200 when a worker has loaded the model and work is taken, else 503."""
    service = request.app[SERVICE]
    is_ready = bool(service.pool.ready) and not service.tasks.is_stopping
    body = {"ready": is_ready, "workers": len(service.pool.ready)}
    return web.json_response(body, status=200 if is_ready else 503)


async def openapi(request: web.Request) -> web.StreamResponse:
    """This description, for programs."""
    return web.json_response(describe(request.app))


async def docs(request: web.Request) -> web.StreamResponse:
    """This description, for people; one page without scripts or anything from elsewhere."""
    text = page(describe(request.app))
    return web.Response(
        text=text, content_type="text/html", headers={"Content-Security-Policy": CSP}
    )


async def home(_request: web.Request) -> web.StreamResponse:
    """To /docs."""
    raise web.HTTPFound("/docs")
