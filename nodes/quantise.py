"""A MODEL of this pack in fewer bits, and as a file that other tools load.

Clones of a MODEL share one module tree, which never changes after loading: another number format is
another load of the same file, which takes over what the graph has put on the MODEL.
"""

from __future__ import annotations

from pathlib import Path

import comfy.model_patcher
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..lightx2v_core.checkpoint.convert import quantise_file
from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.ops.matmul import MATMUL_CHOICES
from ..lightx2v_core.quant.quantise import KEEP, LOAD_CHOICES, WRITTEN
from .bridge import LoadRequest, load_model
from .progress import show_text
from .schema import ADVANCED, found_by

Patcher = comfy.model_patcher.ModelPatcher
FOLDER = "diffusion_models"  # below the output folder: ComfyUI lists it among its models
# What a graph puts on a patcher, apart from the weights and what was done to them.
WISHES = (
    *("patches", "patches_uuid", "object_patches", "weight_wrapper_patches", "model_options"),
    *("attachments", "additional_models", "callbacks", "wrappers", "injections"),
    *("hook_patches", "forced_hooks", "hook_mode"),
)


class Quantize(io.ComfyNode):
    """The input MODEL stays as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VQuantize",
            display_name="Quantize Model (LightX2V)",
            category="LightX2V/loaders",
            description="Turns the linears of a bf16 or fp16 model into 8 bits: half the memory. "
            "LoRA and settings on the model stay. Says what it costs and what multiplies it.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Wan Model (LightX2V)."),
                io.Combo.Input(
                    "scheme",
                    options=list(LOAD_CHOICES),
                    default="fp8",
                    tooltip="fp8, int8: a scale for each output row. keep: as the file is.",
                ),
                io.Combo.Input(
                    "matmul",
                    options=list(MATMUL_CHOICES),
                    default="auto",
                    tooltip="auto: multiplies in 8 bits where the card can. dequantise: exact, "
                    "saves memory alone. measured: the fastest on this card, by time. A named one "
                    "is used or refused with the reason.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(
                    display_name="summary", tooltip="Bytes before and after, and the matmul."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by("fp8", "int8", "quantise", "low vram"),
        )

    @classmethod
    def execute(cls, model: Patcher, scheme: str, matmul: str) -> io.NodeOutput:
        asked = _request_of(model)
        # A file of full precision may have come through ComfyUI's own memory, which has no codes.
        memory = asked.memory if scheme == KEEP else "auto"
        fresh, summary = load_model(
            asked._replace(memory=memory, quantisation=scheme, matmul=matmul)
        )
        show_text(summary, cls.hidden.unique_id)
        return io.NodeOutput(_with_wishes(fresh, model), summary)


class SaveQuantized(io.ComfyNode):
    """Reads the file the MODEL was loaded from; nothing is run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VSaveQuantized",
            display_name="Save Quantized Model (LightX2V)",
            category="LightX2V/tools",
            description="Writes a model in 8 bits to output/diffusion_models, from where every "
            "loader of ComfyUI can take it. Refuses to overwrite.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Wan Model (LightX2V), without LoRA."),
                io.Combo.Input(
                    "scheme",
                    options=list(WRITTEN),
                    default="fp8-tensor",
                    tooltip="fp8-tensor: for ComfyUI's own loaders too. fp8, int8: a scale for "
                    "each row, for LightX2V and this pack.",
                ),
                io.String.Input("filename", default="wan_quantized", tooltip="A new file name."),
            ],
            outputs=[io.String.Output(display_name="path")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **found_by("save model", "fp8", "int8", "export"),
        )

    @classmethod
    def execute(cls, model: Patcher, scheme: str, filename: str) -> io.NodeOutput:
        source = _request_of(model).path
        if model.patches or any(key.startswith("diffusion_model.") for key in model.object_patches):
            raise RequestError(
                "a LoRA or merge is on this MODEL and would not be in the file; connect the MODEL "
                "as it was before it"
            )
        target = _target(filename)
        bar = comfy.utils.ProgressBar(1)
        quantise_file(source, target, scheme, bar.update_absolute)
        show_text(f"{target}: {scheme}, {target.stat().st_size / 1e9:.2f} GB", cls.hidden.unique_id)
        return io.NodeOutput(str(target))


def _request_of(model: Patcher) -> LoadRequest:
    request = getattr(model.model, "request", None)
    if not isinstance(request, LoadRequest):
        raise RequestError(
            "this MODEL comes from another loader and its file is not known here; load it with "
            "Load Wan Model (LightX2V)"
        )
    return request


def _with_wishes(fresh: Patcher, model: Patcher) -> Patcher:
    """`fresh` with all that the graph has put on `model`."""
    wished = model.clone()
    for name in WISHES:
        if hasattr(wished, name):
            setattr(fresh, name, getattr(wished, name))
    return fresh


def _target(name: str) -> Path:
    folder = Path(folder_paths.get_output_directory()) / FOLDER
    file = name if name.endswith(".safetensors") else f"{name}.safetensors"
    target = (folder / file).resolve()
    if not name.strip() or not target.is_relative_to(folder.resolve()):
        raise RequestError(
            f"{name!r} is no file name; use letters, numbers and folders below {folder}"
        )
    return target
