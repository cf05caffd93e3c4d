"""ComfyUI entry point. Loading this file imports nothing, so tests and tools can do it too."""

from __future__ import annotations

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> object:
    from .nodes import make_extension

    return make_extension()
