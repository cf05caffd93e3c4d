"""What does not fit together, said as a sentence before any long work. Knows shapes and kinds."""

from __future__ import annotations

from torch import Tensor

from ..lightx2v_core.checkpoint.detect import CheckpointInfo
from ..lightx2v_core.conditioning import TINY_ENCODER, check_encodes
from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.wan.config import CLIP_TOKENS
from ..lightx2v_core.wan.vae import SPACE, TIME

CHANNELS_5B = 48
ENCODERS = {768: "a CLIP-L encoding", 1280: "a CLIP-G encoding", 2048: "an SDXL encoding"}


def check_text_width(width: int, needed: int) -> None:
    if width == needed:
        return
    found = f"{ENCODERS[width]} ({width} wide)" if width in ENCODERS else f"{width} wide"
    advice = (
        "load umt5_xxl with LoadTextEncoder, or with CLIPLoader type 'wan'"
        if needed == 4096
        else "load the text encoder that belongs to this model"
    )
    raise RequestError(
        f"the conditioning is {found} and this model needs {needed}: wrong text encoder; {advice}"
    )


def check_start_image(in_dim: int, out_dim: int, image_latent: Tensor | None) -> None:
    """`image_latent` is the concat_latent_image of the conditioning."""
    if image_latent is None:
        return
    if in_dim == out_dim:
        raise RequestError(
            "this is a text-to-video model and a start image is connected; "
            "load an image-to-video model or disconnect the image"
        )
    channels = image_latent.shape[1]
    if channels == CHANNELS_5B:
        raise RequestError(
            "the start image was encoded by wan2.2_vae (48 channels), which is only for the 5B "
            "model; encode it with wan_2.1_vae"
        )
    if in_dim == 2 * out_dim + 4 and channels != out_dim:
        raise RequestError(
            f"the start image latent has {channels} channels and this image-to-video model takes "
            f"{out_dim}: a Fun-control or camera input is in the conditioning; remove it"
        )


def check_needs_image(in_dim: int, out_dim: int, image_latent: Tensor | None) -> None:
    if in_dim == 2 * out_dim + 4 and image_latent is None:
        raise RequestError(
            "this is an image-to-video model and no start image is in the conditioning; put "
            "ImageToVideo (or WanImageToVideo) between the prompt and the sampler, or load a "
            "text-to-video model"
        )


def check_latent(samples: Tensor, channels: int, where: str) -> None:
    """`channels` is what the model or VAE at `where` takes; an empty latent may have any number."""
    if samples.ndim != 5:
        raise RequestError(
            f"the latent at {where} has shape {tuple(samples.shape)}: a picture latent; a video "
            "latent has five axes (batch, channels, latent frames, rows, columns); "
            "use EmptyVideoLatent or ImageToVideo"
        )
    found = samples.shape[1]
    if found == channels:
        return
    if CHANNELS_5B in (found, channels):
        raise RequestError(
            f"{where} takes {channels} latent channels and got {found}: Wan 2.2 14B and all Wan "
            "2.1 models use wan_2.1_vae (16 channels); wan2.2_vae (48) is only for the 5B model"
        )
    raise RequestError(
        f"{where} takes {channels} latent channels and got {found}; the latent was made for "
        "another model: use EmptyVideoLatent or ImageToVideo"
    )


def check_vae(vae: object, channels: int) -> None:
    """Before encoding: the VAE of the 5B model is the usual mistake."""
    found = getattr(vae, "latent_channels", channels)
    if getattr(vae, "latent_dim", 3) != 3:
        raise RequestError(
            "this is a VAE for pictures and a VAE for video is needed; load wan_2.1_vae"
        )
    if found == channels:
        return
    which = "wan2.2_vae, only for the 5B model" if found == CHANNELS_5B else "not Wan's"
    raise RequestError(
        f"this VAE has {found} latent channels ({which}) and {channels} are needed; load "
        "wan_2.1_vae, which all Wan 2.1 and Wan 2.2 14B models use"
    )


def check_image_encoder(vae: object) -> None:
    """Before encoding a start image: a tiny VAE, ours or the host's own, is for decoding."""
    model = getattr(vae, "first_stage_model", None)
    check_encodes(getattr(model, "core", model))
    if type(model).__name__ == "TAEHV":
        raise RequestError(TINY_ENCODER)


def check_same_size(samples: Tensor, image_latent: Tensor | None) -> None:
    """The host would stretch the latent of the picture, and the video would start from a blur."""
    if image_latent is None or samples.shape[2:] == image_latent.shape[2:]:
        return
    raise RequestError(
        f"the start image is for {_clip(image_latent)} and the latent for {_clip(samples)}; take "
        "the latent from the node that encodes the image"
    )


def _clip(latent: Tensor) -> str:
    frames, rows, columns = latent.shape[2:]
    return f"{columns * SPACE}x{rows * SPACE}, {(frames - 1) * TIME + 1} frames"


def check_clip_vision(needed: int, output: object) -> None:
    """`needed` tokens: 257 for one picture, 514 for a first and a last one, 0 for none."""
    states = getattr(output, "penultimate_hidden_states", None)
    if states is None or not needed or states.shape[1] == needed:
        return
    pictures = {CLIP_TOKENS: "one picture", 2 * CLIP_TOKENS: "a first and a last picture"}
    found, wanted = (pictures.get(n, f"{n} tokens") for n in (states.shape[1], needed))
    raise RequestError(
        f"the CLIP vision features are of {found} and this model takes {wanted}; "
        "WanFirstLastFrameToVideo joins two, an image-to-video model takes one"
    )


def check_request(model: object, positive: list, samples: Tensor) -> None:
    """Everything a wrong pairing of MODEL, CONDITIONING and LATENT shows in its shapes.

    `model` is what a MODEL holds, of any loader: what it does not tell is not checked.
    """
    transformer = model.diffusion_model
    channels = model.latent_format.latent_channels
    if bool(samples.any()) or samples.ndim != 5:  # the host adapts the channels of an empty latent
        check_latent(samples, channels, "the sampler")
    first_layer = getattr(transformer, "patch_embedding", None)
    in_dim = first_layer.weight.shape[1] if first_layer is not None else channels
    config = getattr(transformer, "config", None)
    text_dim = getattr(config, "text_dim", getattr(transformer, "text_dim", None))
    for states, extra in positive:
        if text_dim is not None:
            check_text_width(states.shape[-1], text_dim)
        image_latent = extra.get("concat_latent_image")
        check_start_image(in_dim, channels, image_latent)
        check_needs_image(in_dim, channels, image_latent)
        check_same_size(samples, image_latent)
        if (tokens := getattr(config, "clip_tokens", None)) is not None:
            check_clip_vision(tokens, extra.get("clip_vision_output"))


def check_experts(high: CheckpointInfo | None, low: CheckpointInfo | None = None) -> None:
    """`None` for a model of another loader, of which nothing is known."""
    if high is None or low is None:
        return
    if high.expert == "low" and low.expert == "high":
        raise RequestError(
            "the two experts are swapped: the low-noise file is connected as model and the "
            "high-noise file as model_low_noise; exchange the two links"
        )
    if high.config != low.config:
        raise RequestError(
            f"the two experts are of different kinds ({high.describe()}; {low.describe()}); give "
            "the high-noise and the low-noise file of the same release"
        )
