"""Pictures into what an image-to-video transformer sees beside the noise: mask and latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from numpy import zeros
from torch import Tensor

from .datatypes import VideoSize
from .errors import RequestError
from .wan.config import WanConfig
from .wan.tae import TinyVae, Vae
from .wan.vae import denormalise, normalise
from .wan.vae_pieces import stills_between

Fit = Callable[[Tensor, int, int], Tensor]  # (image C H W, width, height) -> C height width

T = TypeVar("T")

TINY_ENCODER = (
    "a start image must be encoded by the real VAE, and this one is tiny (TAEHV): its first latent "
    "frame mixes four frames, the start image with three grey ones. Encode with wan_2.1_vae; the "
    "tiny one can still decode the result"
)


IMAGE_FITS = ("crop", "pad", "stretch")
MOTION_LIMIT = 6.0  # of what is amplified


def fit_image(image_CHW: Tensor, width: int, height: int, how: str = "crop") -> Tensor:
    """A picture of exactly width x height, bicubic and antialiased; values [-1, 1].

    `crop` scales to cover and crops the middle, `pad` scales to fit inside black bars, `stretch`
    changes the aspect.
    """
    if how not in IMAGE_FITS:
        raise RequestError(f"image fit {how!r} is unknown; use {', '.join(IMAGE_FITS)}")
    _, rows, columns = image_CHW.shape
    if (columns, rows) == (width, height):
        return image_CHW
    ratios = (width / columns, height / rows)
    if how == "stretch":
        return _resized(image_CHW, height, width)
    if how == "pad":
        scale = min(ratios)
        size = (
            min(height, max(1, round(rows * scale))),
            min(width, max(1, round(columns * scale))),
        )
        resized = _resized(image_CHW, *size)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        bars = (left, width - size[1] - left, top, height - size[0] - top)
        return F.pad(resized, bars, value=-1.0)
    scale = max(ratios)
    size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return _resized(image_CHW, *size)[:, top : top + height, left : left + width]


def _resized(image_CHW: Tensor, rows: int, columns: int) -> Tensor:
    if image_CHW.shape[1:] == (rows, columns):
        return image_CHW
    resized = F.interpolate(
        image_CHW[None].float(), (rows, columns), mode="bicubic", antialias=True
    )
    return resized[0].clamp(-1, 1)


def amplify_motion(raw_BCTHW: Tensor, known_frames: set[int], amplitude: float) -> Tensor:
    """Raw latent means in which what is not given lies `amplitude` times as far from the first
    latent frame: distilled image models move more above 1 (1.0 to 1.15 is used).

    Only the part of the difference that varies inside a latent frame is scaled, so that brightness
    stays. Latent frames that hold a given pixel frame stay as they are, bit for bit; what changes
    is clamped to +-6. Idea: princepainter/ComfyUI-PainterI2V.
    """
    if not 0.0 <= amplitude <= 3.0:
        raise RequestError(
            f"motion amplitude {amplitude:g} is not between 0 and 3; use 1.0 to 1.15"
        )
    if amplitude == 1.0:
        return raw_BCTHW
    given = {(frame + 3) // 4 for frame in known_frames}
    free = [t for t in range(raw_BCTHW.shape[2]) if t not in given and t > 0]
    if not free:
        return raw_BCTHW
    first = raw_BCTHW[:, :, :1]
    difference = raw_BCTHW[:, :, free] - first
    mean = difference.mean(dim=(1, 3, 4), keepdim=True)
    moved = first + mean + amplitude * (difference - mean)
    result = raw_BCTHW.clone()
    result[:, :, free] = moved.clamp(-MOTION_LIMIT, MOTION_LIMIT)
    return result


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


def place_images(
    size: VideoSize, first: Tensor, last: Tensor | None = None, fit: Fit = fit_image
) -> tuple[Tensor, set[int]]:
    """The clip F 3 H W in [-1, 1] with pictures where they are given and mid grey elsewhere, and
    the frames that are given.

    `first` and `last` are C H W, or F C H W: the first frames of the clip, and its last.
    """
    start = first if first.ndim == 4 else first[None]
    end = start[:0] if last is None else last if last.ndim == 4 else last[None]
    if len(start) + len(end) > size.frames:
        raise RequestError(
            f"{len(start)} start and {len(end)} end images do not fit into {size.frames} frames; "
            "give fewer images or more frames"
        )
    # Of the grey frames a VAE reads one: the system makes no pages of the others.
    clip = torch.from_numpy(zeros((size.frames, 3, size.height, size.width), dtype="float32"))
    placed = dict(enumerate(start))
    placed |= {size.frames - len(end) + i: image for i, image in enumerate(end)}
    for frame, image_CHW in placed.items():
        clip[frame] = fit(image_CHW, size.width, size.height)
    return clip, set(placed)


def image_condition(
    vae: Vae,
    size: VideoSize,
    first: Tensor,
    last: Tensor | None = None,
    on_chunk: Callable[[int, int], None] = lambda done, total: None,
    encode: Callable[..., Tensor] | None = None,
    fit: Fit = fit_image,
    motion: float = 1.0,
) -> Tensor:
    """1 20 T H W float32: 4 mask channels, then the 16 of the normalised latent.

    The latent is of the clip that `place_images` makes of pictures that `fit` brings to the size;
    `motion` is the amplitude of `amplify_motion`. `encode(pixels, on_chunk, stills)` stands in for
    the VAE's own. The clip stays on the CPU; the VAE takes it chunk by chunk.
    """
    size.check()
    if last is not None and size.frames < 5:
        raise RequestError("a first and a last picture need at least 5 frames; use 5 or more")
    clip_FCHW, known = place_images(size, first, last, fit)
    clip = clip_FCHW.transpose(0, 1)[None]
    if encode is None:
        latent = vae.encode(clip, on_chunk)
    else:
        latent = encode(clip, on_chunk, stills_between(known, size.frames))
    latent = latent.to(next(vae.parameters()).device).float()
    if motion != 1.0:
        raw = denormalise(latent)
        moved = amplify_motion(raw, known, motion)
        latent = torch.where(moved == raw, latent, normalise(moved))
    mask = frame_mask(size, known).to(latent.device)
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


class Last:
    """The last result of something slow, with what it was made from."""

    def __init__(self) -> None:
        self._made_from: tuple[object, ...] | None = None
        self._result: object = None

    def get(self, made_from: tuple[object, ...], make: Callable[[], T]) -> T:
        """The result again where `made_from` is what it was, tensors by value; else `make()`."""
        known = self._made_from
        if known is None or not _same(known, made_from):
            self._made_from = None  # in case of an error
            self._result = make()
            self._made_from = made_from
        return cast(T, self._result)


def _same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
