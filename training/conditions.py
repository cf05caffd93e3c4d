"""What a published model is asked while it is distilled: prompts, for an image model with pictures.

    python -m training.conditions --lines FILE.jsonl --text-encoder FILE --out FILE.safetensors
    python -m training.conditions --lines FILE.jsonl --text-encoder FILE --out FILE.safetensors \
        --vae FILE --clip-vision FILE

A line of FILE.jsonl is {"prompt": TEXT} or {"prompt": TEXT, "image": PATH}, the path from its
folder on. The result holds `states` N 512 E of the prompts and `empty` 1 512 E; with pictures also
`image` N 20 T H W, mask and latent as the model takes them beside the noise, and with --clip-vision
`clip` N 257 1280. All are encoded by the product. Nothing else is needed: distribution matching
sees no real clips.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightx2v_core.assemble import load_clip_vision, load_text_encoder, load_vae
from lightx2v_core.conditioning import check_encodes, frame_mask, image_condition
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import select_device
from lightx2v_core.media import read_image
from lightx2v_core.wan.config import CLIP_DIM, TEXT_LEN, WanConfig

from .dmd import Question
from .text import TextStates

RANDOM_ROWS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """N questions, on the CPU. Row i of each tensor belongs to the same clip."""

    states_NSE: Tensor
    empty_1SE: Tensor
    image_NCTHW: Tensor | None = None
    clip_NSE: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states_NSE)

    def ask(self, row: int, noise_BCTHW: Tensor) -> Question:
        """One of them for that noise, where the noise is."""
        device = noise_BCTHW.device

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[row : row + 1].to(device, torch.float32)

        text = as_text(self.states_NSE[row : row + 1], device)
        return Question(noise_BCTHW, text, take(self.image_NCTHW), take(self.clip_NSE))

    def empty(self, device: torch.device) -> TextStates:
        """States of no prompt, for guidance."""
        return as_text(self.empty_1SE, device)


def as_text(states_BSE: Tensor, device: torch.device) -> TextStates:
    """All 512 positions, so that none of them stands for others."""
    bias = torch.zeros(states_BSE.shape[:2], device=device)
    return TextStates(states_BSE.to(device, torch.float32), bias)


def shapes_for(config: WanConfig, size: VideoSize) -> dict[str, tuple[int, ...]]:
    """What a model of `config` takes at `size`: shapes of a row by the names of the file."""
    wanted: dict[str, tuple[int, ...]] = {
        "states": (TEXT_LEN, config.text_dim),
        "empty": (TEXT_LEN, config.text_dim),
    }
    if config.takes_image:
        wanted["image"] = tuple(size.latent_shape(config.in_dim - config.out_dim)[1:])
    if config.clip_tokens:
        wanted["clip"] = (config.clip_tokens, CLIP_DIM)
    return wanted


def read_conditions(path: Path, config: WanConfig, size: VideoSize) -> Conditions:
    """Of a file that this module wrote; what the model does not take is left out."""
    tensors, wanted = load_file(path), shapes_for(config, size)
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape[1:]) if name in tensors else None
        if found != shape:
            told = "is missing" if found is None else f"is N x {as_words(found)}"
            raise SystemExit(
                f"{path}: `{name}` {told}, and this model at {size.width}x{size.height}, "
                f"{size.frames} frames takes N x {as_words(shape)}; "
                "make the file with training.conditions for this model and size"
            )
    counts = {name: len(tensors[name]) for name in wanted if name != "empty"}
    if len(set(counts.values())) != 1:
        raise SystemExit(f"{path}: rows do not belong together: {counts}")
    return as_conditions({name: tensors[name] for name in wanted})


def random_conditions(config: WanConfig, size: VideoSize) -> Conditions:
    """Of the real shapes, to measure memory and seconds: the first frame given, random else."""
    tensors = {
        name: torch.randn(1 if name == "empty" else RANDOM_ROWS, *shape)
        for name, shape in shapes_for(config, size).items()
    }
    if "image" in tensors:
        mask = frame_mask(size, {0})
        tensors["image"][:, : mask.shape[1]] = mask
    return as_conditions(tensors)


def as_conditions(tensors: Mapping[str, Tensor]) -> Conditions:
    return Conditions(
        tensors["states"], tensors["empty"], tensors.get("image"), tensors.get("clip")
    )


def as_words(shape: Sequence[int]) -> str:
    return " x ".join(str(length) for length in shape)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.clip_vision is not None and options.vae is None:
        parser.error("--clip-vision is for an image model: give its --vae too")
    lines = read_lines(options.lines, ("prompt", *(("image",) if options.vae else ())))
    device = select_device(options.device)
    tensors = encode_prompts(options, [line["prompt"] for line in lines], device)
    if options.vae is not None:
        pictures = [read_image(options.lines.parent / line["image"]) for line in lines]
        tensors |= encode_pictures(options, pictures, device)
    save_file(tensors, options.out)
    print(", ".join(f"{name} {as_words(tensor.shape)}" for name, tensor in tensors.items()))


def read_lines(path: Path, names: Sequence[str]) -> list[dict]:
    """Every line of a JSON-lines file, or the end at the first that lacks one of `names`."""
    lines = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number} is not JSON: {error}") from None
        missing = [name for name in names if not isinstance(line, dict) or name not in line]
        if missing:
            raise SystemExit(f"{path}, line {number} lacks {' and '.join(missing)}: {text[:80]}")
        lines.append(line)
    if not lines:
        raise SystemExit(f"{path} has no line; give one JSON object for each prompt")
    return lines


@torch.inference_mode()
def encode_prompts(
    options: argparse.Namespace, prompts: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """`states` and `empty`, bfloat16."""
    encoder = load_text_encoder(options.text_encoder)
    encoder.transformer.to(device)
    states = [encoder.encode([prompt]).cpu().bfloat16() for prompt in (*prompts, "")]
    return {"states": torch.cat(states[:-1]), "empty": states[-1]}


@torch.inference_mode()
def encode_pictures(
    options: argparse.Namespace, pictures: Sequence[Tensor], device: torch.device
) -> dict[str, Tensor]:
    """`image`, and `clip` where there is an encoder for it, float16. Pictures C H W in [-1, 1]."""
    size = VideoSize(options.width, options.height, options.frames)
    vae = load_vae(options.vae, torch.bfloat16 if device.type == "cuda" else torch.float32)
    check_encodes(vae)
    vae.to(device)
    image = torch.cat([image_condition(vae, size, picture).cpu().half() for picture in pictures])
    if options.clip_vision is None:
        return {"image": image}
    tower = load_clip_vision(options.clip_vision).to(device)
    features = [tower.features(picture[None].to(device)).cpu().half() for picture in pictures]
    return {"image": image, "clip": torch.cat(features)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.conditions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lines", type=Path, required=True, help="prompts and pictures")
    parser.add_argument("--text-encoder", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="for an image model")
    parser.add_argument("--clip-vision", type=Path, help="for Wan 2.1 image-to-video")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    add_size(parser)
    return parser


def add_size(parser: argparse.ArgumentParser) -> None:
    for name, default in (("width", 832), ("height", 480), ("frames", 81)):
        parser.add_argument(f"--{name}", type=int, default=default)


if __name__ == "__main__":
    main()
