"""Pictures and sizes into the CONDITIONING and LATENT that native samplers take as well."""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import comfy.model_management as mm
import node_helpers
import torch
from comfy.clip_vision import Output as ClipVisionOutput
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..lightx2v_core.conditioning import (
    IMAGE_FITS,
    Last,
    amplify_motion,
    fit_image,
    frame_mask,
    place_images,
)
from ..lightx2v_core.datatypes import VideoSize
from ..lightx2v_core.sizing import Fitted, fit_size
from ..lightx2v_core.wan.vae import Z_DIM
from .checks import check_image_encoder, check_vae
from .progress import show_text
from .schema import ADVANCED, ASKED_KEY, fit_input, found_by, size_inputs

Conditioning = list[list]  # [[text states, {key: value}], ...]

# What each VAE encoded last, as long as it lives.
ENCODED: WeakKeyDictionary[VAE, Last] = WeakKeyDictionary()


class ImageToVideo(io.ComfyNode):
    """Writes concat_latent_image (raw mean) and concat_mask, as WanImageToVideo does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VImageToVideo",
            display_name="Image To Video (LightX2V)",
            category="LightX2V/conditioning",
            description="Puts a start image, and an end image if given, into the conditioning.",
            inputs=[
                io.Conditioning.Input("positive"),
                io.Vae.Input("vae", tooltip="wan_2.1_vae, from any loader; not a tiny one."),
                io.Image.Input(
                    "start_image", tooltip="Fitted to the size; several are the first frames."
                ),
                *size_inputs(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Only used where CFG is above 1."
                ),
                io.Image.Input(
                    "end_image", optional=True, tooltip="For FLF2V and Wan 2.2 I2V models."
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="Wan 2.1 I2V was trained with it; Wan 2.2 does not use it.",
                ),
                fit_input(),
                io.Combo.Input(
                    "image_fit",
                    options=list(IMAGE_FITS),
                    default=IMAGE_FITS[0],
                    optional=True,
                    tooltip="Pictures of another aspect: crop the middle, pad with black bars, or "
                    "stretch.",
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "motion",
                    default=1.0,
                    min=0.5,
                    max=2.0,
                    step=0.01,
                    optional=True,
                    tooltip="Above 1 (to about 1.15) distilled models move more; 1 changes "
                    "nothing. Given frames stay as they are.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
            hidden=[io.Hidden.unique_id],
            **found_by("i2v", "wan image to video", "first last frame"),
        )

    @classmethod
    def execute(
        cls,
        positive: Conditioning,
        vae: VAE,
        start_image: Tensor,
        width: int,
        height: int,
        frames: int,
        negative: Conditioning | None = None,
        end_image: Tensor | None = None,
        clip_vision_output: ClipVisionOutput | None = None,
        fit: str = "crop",
        image_fit: str = "crop",
        motion: float = 1.0,
    ) -> io.NodeOutput:
        check_vae(vae, Z_DIM)
        check_image_encoder(vae)
        fitted = fit_size(VideoSize(width, height, frames), fit)
        if told := fitted.describe():
            show_text(told, cls.hidden.unique_id)
        size = fitted.made

        def encode() -> tuple[Tensor, set[int]]:
            pictures = [None if i is None else _as_core(i) for i in (start_image, end_image)]
            clip_FCHW, known = place_images(size, *pictures, fit=partial(fit_image, how=image_fit))
            return vae.encode((clip_FCHW.permute(0, 2, 3, 1) + 1.0) / 2.0), known

        # Another prompt makes ComfyUI run this node again, with the same pictures.
        last = ENCODED.setdefault(vae, Last())
        raw, known = last.get((start_image, end_image, size, image_fit), encode)
        values = {
            "concat_latent_image": amplify_motion(raw, known, motion),
            "concat_mask": 1.0 - frame_mask(size, known),
        }
        if clip_vision_output is not None:
            values["clip_vision_output"] = clip_vision_output
        negative = negative or _nothing_like(positive)
        return io.NodeOutput(
            node_helpers.conditioning_set_values(positive, values),
            node_helpers.conditioning_set_values(negative, values),
            empty_latent(fitted),
        )


class EmptyVideoLatent(io.ComfyNode):
    """The latent a text-to-video run starts from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VEmptyVideoLatent",
            display_name="Empty Video Latent (LightX2V)",
            category="LightX2V/latent",
            description="An empty latent of a size that Wan can make.",
            inputs=[*size_inputs(), fit_input()],
            outputs=[io.Latent.Output(display_name="latent")],
            hidden=[io.Hidden.unique_id],
            **found_by("t2v", "empty latent video"),
        )

    @classmethod
    def execute(cls, width: int, height: int, frames: int, fit: str = "crop") -> io.NodeOutput:
        fitted = fit_size(VideoSize(width, height, frames), fit)
        if told := fitted.describe():
            show_text(told, cls.hidden.unique_id)
        return io.NodeOutput(empty_latent(fitted))


def empty_latent(fitted: Fitted) -> dict[str, object]:
    """What is asked for travels with the latent to Decode Video, through native samplers too."""
    shape = fitted.made.latent_shape(Z_DIM)
    latent = {"samples": torch.zeros(shape, device=mm.intermediate_device())}
    return latent if fitted.made == fitted.asked else {**latent, ASKED_KEY: fitted}


def _as_core(images_FHWC: Tensor) -> Tensor:
    """F C H W in [-1, 1]."""
    return images_FHWC[..., :3].permute(0, 3, 1, 2).float() * 2.0 - 1.0


def _nothing_like(positive: Conditioning) -> Conditioning:
    """Zeroed text states: what stands for "no negative prompt"."""
    return [[torch.zeros_like(states), dict(extra)] for states, extra in positive]
