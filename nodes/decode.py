"""Latents to pictures, whatever the memory: no finished run is lost to the decoder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import torch
from comfy.sd import VAE
from comfy_api.latest import io
from torch import Tensor

from ..lightx2v_core.errors import CapabilityError, LightX2VError
from ..lightx2v_core.media import describe_padding
from ..lightx2v_core.media import even_sides as even
from ..lightx2v_core.memory.codec import save_raw_latent
from ..lightx2v_core.sizing import Fitted
from .checks import check_latent, check_vae
from .finish import Watch, note_for_files
from .progress import show_text
from .schema import ADVANCED, ASKED_KEY, found_by

log = logging.getLogger(__name__)

TILE = 256  # pixels a side
OVERLAP = 64
TILE_LATENT_FRAMES = 16
OVERLAP_LATENT_FRAMES = 4


class _NoRoomError(Exception):
    """The host gave up on the whole clip and would go on in tiles."""


class DecodeVideo(io.ComfyNode):
    """Whole, then whole with everything else unloaded, then tiles, then tiles in time too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LightX2VDecodeVideo",
            display_name="Decode Video (LightX2V)",
            category="LightX2V/latent",
            description="Decodes a video latent. When memory is short it unloads other models "
            "first and uses tiles last. If all fails the latent is saved and named.",
            inputs=[
                io.Latent.Input("latent"),
                io.Vae.Input(
                    "vae", tooltip="wan_2.1_vae, or a tiny one for a quick look, from any loader."
                ),
                io.Boolean.Input(
                    "even_sides",
                    default=False,
                    optional=True,
                    tooltip="Repeat the last row or column of an odd side: mp4 has none.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The frames.")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            **found_by("vae decode", "vae decode tiled"),
        )

    @classmethod
    def execute(cls, latent: dict, vae: VAE, even_sides: bool = False) -> io.NodeOutput:
        samples = latent["samples"]
        channels = getattr(vae, "latent_channels", samples.shape[1])
        check_latent(samples, channels, "this VAE")
        check_vae(vae, channels)
        _check_finite(samples)
        watch = Watch(mm.vae_device())
        try:
            with watch.stage():
                frames, how = _decode(
                    vae, samples, lambda text: show_text(text, cls.hidden.unique_id)
                )
        except mm.InterruptProcessingException:
            raise
        except Exception as error:
            raise _with_rescue(error, _keep(samples)) from error
        frames, told = _as_asked(frames, latent.get(ASKED_KEY), even_sides)
        count, height, width, _ = frames.shape
        line = f"{count} frames of {width}x{height} in {watch.stages[0]:.1f} s, {how}"
        line += watch.peak()
        show_text("\n".join([line, *([told] if told else [])]), cls.hidden.unique_id)
        note_for_files(cls.hidden.extra_pnginfo, decoded=line)
        return io.NodeOutput(frames)


def _as_asked(frames: Tensor, fitted: Fitted | None, even_sides: bool) -> tuple[Tensor, str]:
    """IMAGE of exactly the size asked for, and what is to be said. A latent that another node made
    larger or smaller since is left as it is."""
    clips = frames if frames.ndim == 5 else frames[None]
    made = None if fitted is None else fitted.made
    if made is not None and clips.shape[1:4] == (made.frames, made.height, made.width):
        clips = torch.stack([fitted.trim(clip) for clip in clips])
    images = clips.flatten(0, 1)
    if not (told := describe_padding(images)):
        return images, ""
    if even_sides:
        return even(images), told
    return (
        images,
        f"{images.shape[2]}x{images.shape[1]} has an odd side: for mp4 turn on even_sides",
    )


def _check_finite(samples: Tensor) -> None:
    if not torch.isfinite(samples).all():
        raise CapabilityError(
            "the latent holds NaN or infinity, so it would decode to black frames; the fault is "
            "in sampling: choose attention 'sdpa' in LoadModel"
        )


def _decode(vae: VAE, samples: Tensor, say: Callable[[str], None]) -> tuple[Tensor, str]:
    """The frames, and how they were decoded in the end."""
    tile, overlap = TILE, OVERLAP
    in_time = {"tile_t": TILE_LATENT_FRAMES, "overlap_t": OVERLAP_LATENT_FRAMES}
    cells = {"tile_x": tile // 8, "tile_y": tile // 8, "overlap": overlap // 8}
    attempts: list[tuple[str, Callable[[], Tensor]]] = [
        ("whole", lambda: _decode_whole(vae, samples)),
        ("whole, with other models unloaded", lambda: _decode_alone(vae, samples)),
        (f"tiles of {tile} pixels", lambda: vae.decode_tiled(samples, **cells)),
        ("tiles, also in time", lambda: vae.decode_tiled(samples, **cells, **in_time)),
    ]
    for number, (how, attempt) in enumerate(attempts):
        if number:
            say(f"not enough memory; decoding again: {how}")
        try:
            return attempt(), how
        except (_NoRoomError, mm.OOM_EXCEPTION):
            if number == len(attempts) - 1:
                raise
        mm.soft_empty_cache()
    raise AssertionError("the last attempt returns or raises")


def _decode_whole(vae: VAE, samples: Tensor) -> Tensor:
    """`vae.decode` without its own quiet change to tiles."""

    def no_tiles(*_args: object, **_kwargs: object) -> Tensor:
        raise _NoRoomError("the whole clip does not fit")

    strict = copy.copy(vae)
    strict.decode_tiled_3d = strict.decode_tiled_ = strict.decode_tiled_1d = no_tiles
    return strict.decode(samples)


def _decode_alone(vae: VAE, samples: Tensor) -> Tensor:
    mm.unload_all_models()
    mm.soft_empty_cache()
    return _decode_whole(vae, samples)


def _keep(samples: Tensor) -> str:
    """Save the latent in the output folder; a sentence about where it is."""
    output = folder_paths.get_output_directory()
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path("latents/lightx2v", output)
        path = save_raw_latent(samples, Path(folder) / f"{name}_{counter:05}_.latent")
    except (LightX2VError, OSError) as error:
        return (
            f"its latent could not be saved either ({error}). It is still in ComfyUI's memory: "
            "make room and press Run again without a change, and only decoding is repeated "
            "(not with --cache-none)"
        )
    return (
        f"the latent of this run is saved as {path}: copy it into the input folder and open "
        "it with LoadLatent, then decode a smaller size, fewer frames or on the CPU (--cpu-vae)"
    )


def _with_rescue(error: Exception, kept: str) -> Exception:
    """An error of the same kind as `error`, where the host must know it, that says what is kept."""
    message = f"decoding failed ({error}); {kept}"
    is_memory = isinstance(error, mm.OOM_EXCEPTION)
    return type(error)(message) if is_memory else CapabilityError(message)
