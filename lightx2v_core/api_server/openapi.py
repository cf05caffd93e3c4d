"""What the service says of itself, out of its routes, their docstrings and the table of fields."""

from __future__ import annotations

import inspect
from html import escape

from aiohttp import web

from .body import FIELDS

TYPES = {str: "string", int: "integer", bool: "boolean", list: "array", (int, float): "number"}
USES = {"ignored": "No effect: ", "refused": "Refused: ", "quiet": "No meaning here: ", "used": ""}
CURL = """curl -X POST http://127.0.0.1:8000/v1/tasks/video/ -H 'Content-Type: application/json' \\
     -d '{"prompt": "a red fox runs through snow", "seed": 42, "save_result_path": "fox.mp4"}'
curl -F prompt='it turns its head' -F image_file=@fox.png http://127.0.0.1:8000/v1/tasks/video/form
curl http://127.0.0.1:8000/v1/tasks/TASK_ID/status
curl -o fox.mp4 http://127.0.0.1:8000/v1/tasks/TASK_ID/result
curl -X DELETE http://127.0.0.1:8000/v1/tasks/TASK_ID"""


def describe(application: web.Application) -> dict[str, object]:
    """The OpenAPI 3.0 document as plain data."""
    paths: dict[str, dict[str, object]] = {}
    for route in application.router.routes():
        if route.resource is None or route.method == "HEAD":
            continue
        path = route.resource.canonical
        operation: dict[str, object] = {
            "summary": inspect.getdoc(route.handler) or "",
            "responses": {"200": {"description": "done"}, "default": {"$ref": PROBLEM}},
        }
        if names := [part[1:-1] for part in path.split("/") if part.startswith("{")]:
            text = {"in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [{"name": name, **text} for name in names]
        if route.method == "POST":
            operation["requestBody"] = {"required": True, "content": _content(path)}
        paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "LightX2V service of lightx2v-distill",
            "version": "1",
            "description": "Videos from words and pictures, one after the other for each worker.",
        },
        "paths": paths,
        "components": {
            "schemas": {"VideoTask": _fields()},
            "responses": {"Problem": {"description": "refused: {'detail': sentence}"}},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


PROBLEM = "#/components/responses/Problem"


def _content(path: str) -> dict[str, object]:
    if path.endswith("/form"):
        schema = _fields()
        files = {"type": "string", "format": "binary"}
        properties = schema["properties"]
        assert isinstance(properties, dict)
        for name in ("image_path", "last_frame_path"):
            del properties[name]
        properties |= {"image_file": files, "last_frame_file": files}
        return {"multipart/form-data": {"schema": schema}}
    return {"application/json": {"schema": {"$ref": "#/components/schemas/VideoTask"}}}


def _fields() -> dict[str, object]:
    properties: dict[str, object] = {}
    for name, known in FIELDS.items():
        entry: dict[str, object] = {
            "type": TYPES[known.kind],
            "description": USES[known.use] + known.text,
        }
        if known.kind is list:
            entry["items"] = {"type": "integer" if known.use == "used" else "object"}
        properties[name] = entry
    return {"type": "object", "properties": properties}


def page(document: dict[str, object]) -> str:
    """The same for people: routes, fields and command lines in one page of plain HTML."""
    routes = "".join(
        f"<tr><td>{escape(method.upper())}</td><td><code>{escape(path)}</code></td>"
        f"<td>{escape(str(operation['summary']))}</td></tr>"
        for path, operations in _objects(document["paths"])
        for method, operation in _objects(operations)
    )
    fields = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{TYPES[known.kind]}</td>"
        f"<td>{escape(USES[known.use] + known.text)}</td></tr>"
        for name, known in FIELDS.items()
    )
    return PAGE.format(routes=routes, fields=fields, curl=escape(CURL))


def _objects(value: object) -> list[tuple[str, dict[str, object]]]:
    assert isinstance(value, dict)
    return list(value.items())


PAGE = """<!doctype html><meta charset="utf-8"><title>LightX2V service</title>
<style>body{{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
td{{padding:.2em 1em .2em 0;vertical-align:top}}pre{{background:#eee;padding:1em;overflow:auto}}
@media(prefers-color-scheme:dark){{body{{background:#111;color:#ddd}}pre{{background:#222}}}}
</style><h1>LightX2V service</h1>
<p>Errors are <code>{{"detail": "a sentence"}}</code>. For programs:
<a href="/openapi.json">openapi.json</a>.</p>
<h2>Routes</h2><table>{routes}</table>
<h2>Fields of a video task</h2><table>{fields}</table>
<h2>From a command line</h2><pre>{curl}</pre>
"""
