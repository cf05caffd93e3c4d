"""Files from ComfyUI's model folders, and the shipped demo, as MODEL, CLIP and VAE."""

from __future__ import annotations

from comfy_api.latest import io

from ..lightx2v_core.quant.quantise import KEEP, LOAD_CHOICES
from .attention import AUTO
from .attention import CHOICES as ATTENTIONS
from .bridge import MEMORY_CHOICES, LoadRequest, load_model
from .codecs import load_host_clip, load_host_vae
from .files import fingerprint, list_files, list_vaes, resolve, vae_place
from .progress import show_text
from .schema import ADVANCED, found_by

MODELS, ENCODERS = "diffusion_models", "text_encoders"


class LoadModel(io.ComfyNode):
    """A Wan transformer by this pack's own core."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VLoadModel",
            display_name="Load Wan Model (LightX2V)",
            category="LightX2V/loaders",
            description="Loads a Wan 2.1 or 2.2 transformer, distilled or not. What it is is read "
            "from the file.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files(MODELS),
                    tooltip="From models/diffusion_models, also GGUF; lightx2v_demo/... comes with "
                    "the pack.",
                ),
                io.Combo.Input(
                    "quantisation",
                    options=list(LOAD_CHOICES),
                    default=KEEP,
                    tooltip="keep: the number format of the file. fp8, int8: the linears of a bf16 "
                    "or fp16 file become 8 bits while it loads, half the memory.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    default=AUTO,
                    tooltip="auto: what this ComfyUI was told to run; else the fastest that fits "
                    "the file and the card. comfyui: always ComfyUI's. Another one is used or "
                    "refused with the reason.",
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "memory",
                    options=list(MEMORY_CHOICES),
                    default="auto",
                    tooltip="ours: whole blocks stay on the card or stream. comfyui: ComfyUI's own "
                    "way, also its Dynamic VRAM.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.String.Output(
                    display_name="summary", tooltip="What the file is and how it is run."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by("distill", "4 step", "unet loader"),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, **_others: object) -> str:
        return fingerprint(MODELS, file)

    @classmethod
    def execute(cls, file: str, quantisation: str, attention: str, memory: str) -> io.NodeOutput:
        request = LoadRequest(resolve(MODELS, file), attention, memory, quantisation)
        model, summary = load_model(request)
        show_text(summary, cls.hidden.unique_id)
        return io.NodeOutput(model, summary)


class LoadTextEncoder(io.ComfyNode):
    """UMT5, for native CLIPTextEncode."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VLoadTextEncoder",
            display_name="Load Text Encoder (LightX2V)",
            category="LightX2V/loaders",
            description="Loads the UMT5 text encoder of Wan. Prompts are cleaned, cut and padded "
            "as in the official pipeline.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_files(ENCODERS),
                    tooltip="umt5_xxl from models/text_encoders; its tokenizer is in the file or "
                    "beside it.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="clip", tooltip="For CLIP Text Encode.")],
            **found_by("umt5", "t5", "clip loader"),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return fingerprint(ENCODERS, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_host_clip(resolve(ENCODERS, file)))


class LoadVae(io.ComfyNode):
    """Wan's VAE, for native VAE nodes too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VLoadVae",
            display_name="Load VAE (LightX2V)",
            category="LightX2V/loaders",
            description="Loads the Wan 2.1 VAE, which Wan 2.2 14B uses too, its light form, or a "
            "tiny one to decode with. It works in causal chunks and can be stopped between them.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_vaes(),
                    tooltip="wan_2.1_vae or lightvaew2_1 from models/vae; taew2_1 or lighttaew2_1 "
                    "(tiny, for decoding) also from models/vae_approx. wan2.2_vae is only for the "
                    "5B model.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae")],
            **found_by("wan vae", "tae", "taehv", "lightvae"),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return fingerprint(*vae_place(file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_host_vae(resolve(*vae_place(file))))
