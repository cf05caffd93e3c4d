"""What a file is, from its header alone."""

from __future__ import annotations

import json

import folder_paths
from comfy_api.latest import io, ui

from ..lightx2v_core.checkpoint.source import open_checkpoint
from ..lightx2v_core.report import make_report
from .files import fingerprint, list_files, resolve
from .progress import show_text
from .schema import found_by

FOLDERS = (
    *("diffusion_models", "text_encoders", "vae", "vae_approx", "loras", "clip_vision"),
    "checkpoints",
)
SHOWN = (
    *("kind", "family", "task", "expert", "size", "layout", "scheme", "release", "preset"),
    *("bytes", "runs"),
)


class Inspect(io.ComfyNode):
    """Reads no weights: safe and quick on any file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = [name for name in FOLDERS if name in folder_paths.folder_names_and_paths]
        return io.Schema(
            node_id="LightX2VInspect",
            display_name="Inspect File (LightX2V)",
            category="LightX2V/tools",
            description="Says what a model file is: family, task, expert, number format, release "
            "and preset, what it needs, what goes with it, and whether it runs here.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[
                        f"{folder}/{name}" for folder in folders for name in list_files(folder)
                    ],
                    tooltip="Any file of ComfyUI's model folders. Only its header is read.",
                ),
            ],
            outputs=[io.String.Output(display_name="report")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by("model info", "identify"),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return fingerprint(*file.split("/", 1))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        report = make_report(open_checkpoint(resolve(*file.split("/", 1))))
        facts = {key: value for key, value in report.as_json().items() if key in SHOWN}
        text = "\n".join((*report.lines(), json.dumps(facts)))
        show_text(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
