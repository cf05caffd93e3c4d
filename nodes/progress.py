"""What a node shows while it runs: a bar with previews, and a line of text on the node."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import comfy.model_patcher
import latent_preview
from torch import Tensor

log = logging.getLogger(__name__)


def step_callback(
    model: comfy.model_patcher.ModelPatcher, steps: int
) -> Callable[[int, Tensor, Tensor, int], None]:
    """(step from 0, denoised, x, steps in all) to a bar and a preview.

    Looked up through the module at run time: VideoHelperSuite replaces its previewer.
    """
    return latent_preview.prepare_callback(model, steps)


def show_text(text: str, node_id: str | None) -> None:
    """On the node itself where a server is running, and in the log."""
    log.info("%s", text)
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)
