"""The nodes and their registration. Imported only when ComfyUI asks for the extension."""

from __future__ import annotations

import logging
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import comfyui_version
from comfy_api.latest import ComfyExtension

from ..lightx2v_core.errors import CapabilityError

if TYPE_CHECKING:
    from comfy_api.latest import io

log = logging.getLogger(__name__)

FLOOR = (0, 8, 0)
# (module, class); one row adds a node.
NODES = (
    ("load", "LoadModel"),
    ("load", "LoadTextEncoder"),
    ("load", "LoadVae"),
    ("lora", "ApplyLora"),
    ("quantise", "Quantize"),
    ("quantise", "SaveQuantized"),
    ("encode", "ImageToVideo"),
    ("encode", "EmptyVideoLatent"),
    ("sample", "DistillSampler"),
    ("sample", "DistillSigmas"),
    ("decode", "DecodeVideo"),
    ("inspect", "Inspect"),
)


class LightX2VExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Every node that this ComfyUI can show; one that cannot be built is named in the log."""
        found = []
        for module, name in NODES:
            try:
                node = getattr(import_module(f".{module}", __package__), name)
                node.GET_SCHEMA()
            except (ImportError, AttributeError, TypeError, ValueError, KeyError) as error:
                log.error("LightX2V node %s is left out, %s", name, _why(error))
            else:
                found.append(node)
        return found


def _why(error: Exception) -> str:
    """An import that fails inside the pack is an update of which only a part arrived."""
    pack = str(__package__).rpartition(".")[0]
    if isinstance(error, ImportError) and f"{error.name}.".startswith(f"{pack}."):
        folder = Path(__file__).parents[1]
        return (
            f"files of two versions of the pack are mixed ({error.msg.partition(' (')[0]}): delete "
            f"the folder {folder.name} in custom_nodes, install it again, and restart ComfyUI"
        )
    return f"this ComfyUI does not fit it: {error}"


def make_extension() -> LightX2VExtension:
    version = comfyui_version.__version__
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < FLOOR:
        needed = ".".join(map(str, FLOOR))
        raise CapabilityError(
            f"LightX2V Distill needs ComfyUI {needed} or newer and this is {version}; "
            "update ComfyUI and restart it. No node of the pack was loaded"
        )
    return LightX2VExtension()
