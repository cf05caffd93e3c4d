"""Pictures and sizes into the CONDITIONING and LATENT that native samplers take as well."""

from __future__ import annotations

import comfy.model_management as mm
import node_helpers
import torch
from comfy.clip_vision import Output as ClipVisionOutput
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..lightx2v_core.conditioning import fit_image, frame_mask
from ..lightx2v_core.datatypes import VideoSize
from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.wan.vae import Z_DIM
from .checks import check_image_encoder, check_vae
from .progress import show_text
from .schema import newer, size_inputs, snap_size

Conditioning = list[list]  # [[text states, {key: value}], ...]
GREY = 0.5  # what frames without a picture are filled with


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
                    "start_image", tooltip="Scaled to cover the size and cropped in the middle."
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
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["lightx2v", "i2v", "wan image to video", "first last frame"]),
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
    ) -> io.NodeOutput:
        check_vae(vae, Z_DIM)
        check_image_encoder(vae)
        size, snapped = snap_size(width, height, frames)
        if snapped:
            show_text(snapped, cls.hidden.unique_id)
        clip_FHWC, known = _place_images(size, start_image, end_image)
        values = {
            "concat_latent_image": vae.encode(clip_FHWC),
            "concat_mask": 1.0 - frame_mask(size, known),
        }
        if clip_vision_output is not None:
            values["clip_vision_output"] = clip_vision_output
        negative = negative or _nothing_like(positive)
        return io.NodeOutput(
            node_helpers.conditioning_set_values(positive, values),
            node_helpers.conditioning_set_values(negative, values),
            _empty_latent(size),
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
            inputs=size_inputs(),
            outputs=[io.Latent.Output(display_name="latent")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["lightx2v", "t2v", "empty latent video"]),
        )

    @classmethod
    def execute(cls, width: int, height: int, frames: int) -> io.NodeOutput:
        size, snapped = snap_size(width, height, frames)
        if snapped:
            show_text(snapped, cls.hidden.unique_id)
        return io.NodeOutput(_empty_latent(size))


def _empty_latent(size: VideoSize) -> dict[str, Tensor]:
    return {"samples": torch.zeros(size.latent_shape(Z_DIM), device=mm.intermediate_device())}


def _place_images(size: VideoSize, start: Tensor, end: Tensor | None) -> tuple[Tensor, set[int]]:
    """The clip FHWC in 0..1 with pictures where they are given, and the frames that are given.

    Several start images are the first frames of the clip, several end images its last.
    """
    clip = torch.full((size.frames, size.height, size.width, 3), GREY)
    last = 0 if end is None else end.shape[0]
    if start.shape[0] + last > size.frames:
        raise RequestError(
            f"{start.shape[0]} start and {last} end images do not fit into {size.frames} frames; "
            "give fewer images or more frames"
        )
    placed = dict(enumerate(start))
    if end is not None:
        placed |= {size.frames - last + i: image for i, image in enumerate(end)}
    for frame, image_HWC in placed.items():
        image_CHW = image_HWC[..., :3].permute(2, 0, 1).float() * 2.0 - 1.0
        fitted = fit_image(image_CHW, size.width, size.height)
        clip[frame] = (fitted.permute(1, 2, 0) + 1.0) / 2.0
    return clip, set(placed)


def _nothing_like(positive: Conditioning) -> Conditioning:
    """Zeroed text states: what stands for "no negative prompt"."""
    return [[torch.zeros_like(states), dict(extra)] for states, extra in positive]
