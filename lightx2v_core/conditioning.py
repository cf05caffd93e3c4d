"""Pictures into what an image-to-video transformer sees beside the noise: mask and latent."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .datatypes import VideoSize
from .errors import RequestError
from .wan.config import WanConfig
from .wan.tae import TinyVae, Vae

Fit = Callable[[Tensor, int, int], Tensor]  # (image C H W, width, height) -> C height width

TINY_ENCODER = (
    "a start image must be encoded by the real VAE, and this one is tiny (TAEHV): its first latent "
    "frame mixes four frames, the start image with three grey ones. Encode with wan_2.1_vae; the "
    "tiny one can still decode the result"
)


def fit_image(image_CHW: Tensor, width: int, height: int) -> Tensor:
    """Scale to cover width x height (bicubic, antialiased) and crop the middle; values [-1, 1]."""
    _, rows, columns = image_CHW.shape
    if (columns, rows) == (width, height):
        return image_CHW
    scale = max(width / columns, height / rows)
    size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    resized = F.interpolate(image_CHW[None].float(), size, mode="bicubic", antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resized[:, top : top + height, left : left + width].clamp(-1, 1)


def frame_mask(size: VideoSize, known_frames: set[int]) -> Tensor:
    """1 4 T H W of ones where a pixel frame is given: four pixel frames for each latent frame.

    The first latent frame stands for one pixel frame, so its four channels agree.
    """
    _, _, latent_frames, height, width = size.latent_shape()
    given = torch.zeros(size.frames)
    given[sorted(known_frames)] = 1.0
    spread = torch.cat((given[:1].repeat(4), given[1:]))
    mask_T4 = spread.view(latent_frames, 4)
    return mask_T4.t()[None, :, :, None, None].expand(1, 4, latent_frames, height, width)


def image_condition(
    vae: Vae,
    size: VideoSize,
    first_CHW: Tensor,
    last_CHW: Tensor | None = None,
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
    encode: Callable[..., Tensor] | None = None,
    fit: Fit = fit_image,
) -> Tensor:
    """1 20 T H W float32: 4 mask channels, then the 16 of the normalised latent.

    The latent is of the clip whose given frames are pictures (values [-1, 1], brought to the size
    by `fit`) and whose other frames are mid grey. `encode(pixels, on_chunk)` stands in for the
    VAE's own. The clip stays on the CPU; the VAE takes it chunk by chunk.
    """
    size.check()
    clip = torch.zeros(1, 3, size.frames, size.height, size.width)
    known = {0: first_CHW} if last_CHW is None else {0: first_CHW, size.frames - 1: last_CHW}
    if len(known) < 2 and last_CHW is not None:
        raise RequestError("a first and a last picture need at least 5 frames; use 5 or more")
    for frame, image in known.items():
        clip[0, :, frame] = fit(image, size.width, size.height)
    latent = (encode or vae.encode)(clip, on_chunk).to(next(vae.parameters()).device).float()
    mask = frame_mask(size, set(known)).to(latent.device)
    return torch.cat((mask, latent), dim=1)


def check_encodes(vae: object) -> None:
    """Refuse a tiny VAE for start images: what it encodes is not what a model was trained on."""
    if isinstance(vae, TinyVae):
        raise RequestError(TINY_ENCODER)


def check_pairing(
    config: WanConfig, takes_image: bool, takes_last: bool = False, has_clip: bool = False
) -> None:
    """Refuse pictures for a text model and an image model without one, before any long work."""
    if takes_image and not config.takes_image:
        raise RequestError(
            "a start image is given and this is a text-to-video model; "
            "load an image-to-video model or remove the image"
        )
    if config.takes_image and not takes_image:
        raise RequestError(
            "this is an image-to-video model and no start image is given; "
            "give one, or load a text-to-video model"
        )
    if takes_last and config.clip_tokens == 257:
        raise RequestError(
            "a last image is given and this model takes only a first one; "
            "use a first-last-frame (FLF2V) or a Wan 2.2 image-to-video model"
        )
    if has_clip and not config.clip_tokens:
        raise RequestError(
            "CLIP vision features are given and this model has no CLIP branch (Wan 2.2 has none); "
            "remove them"
        )
