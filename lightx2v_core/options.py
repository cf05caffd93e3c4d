"""The arguments of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from .checkpoint.convert import SCHEMES
from .conditioning import IMAGE_FITS
from .ops.attention import BACKENDS
from .ops.matmul import MATMUL_CHOICES
from .quant.quantise import LOAD_CHOICES
from .sizing import FITS

Run = Callable[[argparse.Namespace], int]


def make_parser(commands: Mapping[str, Run]) -> argparse.ArgumentParser:
    """`run` of what it parses is that of `commands` for the command that was given."""
    parser = argparse.ArgumentParser(
        prog="python -m lightx2v_core",
        description="Wan 2.1 / 2.2 video in four steps without CFG.",
    )
    added = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(added.add_parser("generate", help="make a video"))
    inspect = added.add_parser("inspect", help="say what a file is, from its header alone")
    inspect.add_argument("file", type=Path, help="checkpoint file or folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--verbose", action="store_true", help="log what happens")
    quantize = added.add_parser("quantize", help="write a transformer in fewer bits")
    quantize.add_argument("source", type=Path, help="bf16, fp16 or fp32 file or folder")
    quantize.add_argument("target", type=Path, help="new .safetensors or .gguf file")
    quantize.add_argument("--scheme", required=True, help=", ".join(SCHEMES))
    quantize.add_argument("--verbose", action="store_true", help="log what happens")
    _add_bench(added.add_parser("bench", help="time the denoiser on this machine"))
    for name, run in commands.items():
        added.choices[name].set_defaults(run=run)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    _add_plan(parser)
    _add_machine(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    """What goes in and what comes out."""
    add = parser.add_argument
    add(
        "--task", choices=("t2v", "i2v"), default="t2v", help="t2v: words; i2v: a picture and words"
    )
    add("--model", default="demo", help="demo, a transformer file, or a model folder")
    add("--low-noise-model", type=Path, help="second expert of Wan 2.2 A14B; --model is the first")
    add("--text-encoder", type=Path, help="umt5 file; else searched beside the model")
    add("--tokenizer", type=Path, help="folder or file; else embedded or beside the encoder")
    add("--vae", type=Path, help="Wan 2.1 VAE; else searched beside the model")
    add("--tae", type=Path, help="taew2_1 or lighttaew2_1, to decode with instead of the VAE")
    add("--clip-vision", type=Path, help="CLIP ViT-H of Wan 2.1 I2V; else searched")
    add("--prompt", required=True)
    add("--negative-prompt", default="", help="used only with --cfg above 1")
    add("--image", type=Path, help="start image")
    add("--last-image", type=Path, help="end image (FLF2V and Wan 2.2 I2V)")
    add(
        "--config-json",
        type=Path,
        metavar="FILE",
        help="a LightX2V configuration, for what is not given here",
    )
    add("--output", type=Path, required=True, metavar="FILE.mp4")
    add("--contact-sheet", type=Path, metavar="FILE.png", help="also write frames side by side")
    add("--beside", type=Path, metavar="FILE.mp4", help="a video of ours below it in that sheet")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Size, schedule, experts and LoRAs."""
    add = parser.add_argument
    for name in ("width", "height", "frames"):
        add(f"--{name}", type=int, help="default: what the model was trained for")
    add(
        "--fit",
        choices=FITS,
        default="crop",
        help="for sizes Wan cannot make: a larger one cropped, or a smaller one padded",
    )
    add("--image-fit", choices=IMAGE_FITS, help="of start and end image; crop unless given")
    add("--motion", type=float, default=1.0, help="amplitude for image to video: 1.0 to 1.15")
    add("--fps", type=int, help="16 unless given")
    add("--seed", type=int, help="0 unless given")
    add("--steps", type=int, help="equal steps instead of the trained list")
    add("--shift", type=_numbers, metavar="5|8,8,5,5", help="one, or one for each step")
    add("--denoising-step-list", type=_numbers, metavar="1000,750,500,250")
    add("--solver", choices=("euler", "renoise"))
    add(
        "--cfg",
        type=_numbers,
        metavar="1|3.5,1,1,1",
        help="1 (off) for distilled models; one, or one for each step",
    )
    add("--high-steps", type=int, help="steps of the high-noise expert")
    add("--boundary", type=float, help="switch experts at this sigma instead")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="may be given several times; FILE:1,1,0.6,0 is a strength for each step; high_noise "
        "or low_noise in its name chooses the expert",
    )
    add(
        "--lora-merge",
        action="store_true",
        help="add LoRAs to the weights of a bf16, fp16 or fp32 model instead of computing them "
        "beside; needs RAM for a second copy of the weights",
    )
    add("--strict", action="store_true", help="make an error of every warning in the plan")
    add("--plan", "--dry-run", dest="dry_run", action="store_true", help="print the plan and stop")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """How and where it is computed."""
    add = parser.add_argument
    add("--attention", help=f"auto, {', '.join(BACKENDS)}")
    add("--quant", choices=LOAD_CHOICES, help="turn the linears of a full file into codes")
    add(
        "--matmul",
        default="auto",
        help=f"of 8-bit weights: {', '.join(MATMUL_CHOICES)}; measured times them in each run anew",
    )
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    add(
        "--vram-gb",
        type=_gigabytes,
        default="auto",
        metavar="auto|GB",
        help="at most this much of the card for the whole run; auto: what is free",
    )
    add(
        "--ram-gb",
        type=_gigabytes,
        default="auto",
        metavar="auto|GB",
        help="at most this much RAM, page-locked included; auto: what is free, or a container's",
    )
    add("--verbose", action="store_true", help="log what happens")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", default="demo", help="demo, a transformer file, or a model folder")
    add("--task", choices=("t2v", "i2v"), default="t2v", help="which demo model")
    add("--forwards", type=int, default=4, help="that are timed, after one to warm up")
    for name in ("width", "height", "frames"):
        add(f"--{name}", type=int, help="default: what the model was trained for")
    add("--json", action="store_true", help="print JSON")
    _add_machine(parser)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1000,750,500,250") from error


def _gigabytes(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of GB") from error
