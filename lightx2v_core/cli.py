"""The command line: generate a video, inspect a file, quantise one, time one."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from .checkpoint.convert import SCHEMES
from .checkpoint.writing import write_somewhere
from .conditioning import IMAGE_FITS, fit_image
from .datatypes import VideoSize
from .errors import CheckpointError, LightX2VError, RequestError
from .lora.steps import read_strengths
from .ops.attention import BACKENDS
from .ops.matmul import MATMUL_CHOICES
from .pipeline import GenerateRequest, OnProgress, Pipeline, Result
from .presets import FPS, Overrides
from .quant.quantise import KEEP, LOAD_CHOICES
from .sizing import FITS, fit_size

STAGE_NAMES = {"text": "prompt", "image": "start image", "sampling": "sampling", "decode": "decode"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 after an error in words, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
    try:
        return options.run(options)
    except LightX2VError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightx2v_core",
        description="Wan 2.1 / 2.2 video in four steps without CFG.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="make a video"))
    inspect = commands.add_parser("inspect", help="say what a file is, from its header alone")
    inspect.add_argument("file", type=Path, help="checkpoint file or folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--verbose", action="store_true", help="log what happens")
    inspect.set_defaults(run=run_inspect)
    quantize = commands.add_parser("quantize", help="write a transformer in fewer bits")
    quantize.add_argument("source", type=Path, help="bf16, fp16 or fp32 file or folder")
    quantize.add_argument("target", type=Path, help="new .safetensors or .gguf file")
    quantize.add_argument("--scheme", required=True, help=", ".join(SCHEMES))
    quantize.add_argument("--verbose", action="store_true", help="log what happens")
    quantize.set_defaults(run=run_quantize)
    _add_bench(commands.add_parser("bench", help="time the denoiser on this machine"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    _add_plan(parser)
    _add_machine(parser)
    parser.set_defaults(run=run_generate)


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
    add("--image-fit", choices=IMAGE_FITS, default="crop", help="of start and end image")
    add("--motion", type=float, default=1.0, help="amplitude for image to video: 1.0 to 1.15")
    add("--fps", type=int, default=FPS)
    add("--seed", type=int, default=0)
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
    add("--attention", default="auto", help=f"auto, {', '.join(BACKENDS)}")
    add(
        "--quant",
        default=KEEP,
        choices=LOAD_CHOICES,
        help="turn the linears of a full file into codes",
    )
    add("--matmul", default="auto", help=f"of 8-bit weights: {', '.join(MATMUL_CHOICES)}")
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    add(
        "--vram-gb",
        type=_gigabytes,
        default="auto",
        metavar="auto|GB",
        help="at most this much of the card for the whole run; auto: what is free",
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
    parser.set_defaults(run=run_bench)


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


def run_inspect(options: argparse.Namespace) -> int:
    """Print what a file is. Exit code 0 for anything recognised, 1 for an unreadable file."""
    from .checkpoint.source import open_checkpoint
    from .report import make_report

    report = make_report(open_checkpoint(options.file))
    if options.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        print("\n".join(report.lines()))
    return 0


def run_quantize(options: argparse.Namespace) -> int:
    """Stream a file into a form of fewer bits, with a bar, and say what came of it."""
    from rich.progress import Progress

    from .checkpoint.convert import quantise_file

    with Progress() as progress:
        task = progress.add_task(f"writing {options.scheme}", total=None)
        quantise_file(
            options.source,
            options.target,
            options.scheme,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    size = options.target.stat().st_size
    print(f"{options.target}: {options.scheme}, {size / 1e9:.2f} GB")
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Time forwards of one transformer and say what multiplied and attended, and why."""
    from .bench import BenchRequest, bench
    from .device import select_device
    from .presets import demo_path

    device = select_device(options.device)
    sides = (options.width, options.height, options.frames)
    if any(sides) and not all(sides):
        raise RequestError("give --width, --height and --frames together, or none of them")
    request = BenchRequest(
        demo_path(options.task) if options.model == "demo" else Path(options.model),
        VideoSize(*sides) if all(sides) else None,
        options.forwards,
        options.attention,
        options.quant,
        options.matmul,
        None if options.vram_gb is None else int(options.vram_gb * 1e9),
    )
    report = bench(request, device)
    print(json.dumps(report.as_json()) if options.json else "\n".join(report.lines()))
    return 0


def run_generate(options: argparse.Namespace) -> int:
    """Load, print the plan, make the video, write it, and say what it took."""
    _check(options)
    from .assemble import find_parts
    from .device import select_device
    from .media import contact_sheet, describe_padding, read_image, write_video
    from .sampling.schedule import describe

    images = [None if p is None else read_image(p) for p in (options.image, options.last_image)]
    parts = find_parts(
        options.model, options.task, options.low_noise_model, _given(options), options.tokenizer
    )
    vram = None if options.vram_gb is None else int(options.vram_gb * 1e9)
    device = select_device(options.device)
    pipeline = Pipeline(parts, device, options.attention, vram, options.quant, options.matmul)
    for expert in pipeline.experts:
        print(expert.summary)
    for line in pipeline.set_loras([_lora(text) for text in options.lora], options.lora_merge):
        print(line)
    request = _request(options, images, pipeline)
    fitted = fit_size(_size(options, pipeline), options.fit)
    if told := fitted.describe():
        print(told)
    loras = pipeline.describe_loras()
    plan = describe(pipeline.plan(request.overrides, fitted.made, options.strict), loras)
    print(plan)
    if options.dry_run:
        return 0
    with _progress_bar() as on_progress:
        rescue = options.output.with_suffix(".latent")
        result = pipeline.generate(request, on_progress, rescue)
    if padded := describe_padding(result.frames):
        print(padded)
    said = _metadata(options, result, plan)
    video = write_somewhere(
        lambda path: write_video(result.frames, path, options.fps, said), options.output
    )
    if options.contact_sheet:
        rows = [(f"{plan.splitlines()[0].partition(' (')[0]}: {options.prompt}", result.frames)]
        contact_sheet([*rows, *_beside(options.beside)], options.contact_sheet)
    for line in result.memory:
        print(line)
    stages = ", ".join(f"{STAGE_NAMES[k]} {v:.1f} s" for k, v in result.seconds.items())
    per_step = result.seconds["sampling"] / result.plan.steps
    peak = f", peak {result.peak_bytes / 1e9:.1f} GB" if result.peak_bytes else ""
    print(f"{video}: {len(result.frames)} frames; {stages}; {per_step:.2f} s/step{peak}")
    return 0


def _beside(path: Path | None) -> list[tuple[str, Tensor]]:
    """A row of the contact sheet for a video that this program wrote."""
    if path is None:
        return []
    from .media import read_metadata, read_video

    told = read_metadata(path)
    plan = str(told.get("plan", "")).partition(" (")[0]
    label = f"{Path(str(told.get('model', path.name))).stem}, {plan}: {told.get('prompt', '')}"
    return [(label, read_video(path))]


def _given(options: argparse.Namespace) -> dict[str, Path | None]:
    """Parts that are named and not searched for."""
    return {
        "vae": options.vae,
        "tae": options.tae,
        "text": options.text_encoder,
        "clip": options.clip_vision,
    }


def _lora(text: str) -> tuple[Path, float | tuple[float, ...]]:
    """FILE, FILE:STRENGTH or FILE:1,1,0.6,0; a Windows drive letter is no file."""
    path, _, strengths = text.rpartition(":")
    if not path or not set(strengths) <= set("0123456789+-.,eE "):
        return Path(text), 1.0
    return Path(path), read_strengths(strengths)


def _check(options: argparse.Namespace) -> None:
    if options.output.suffix.lower() != ".mp4":
        raise RequestError(f"--output {options.output} must end in .mp4")
    if options.task == "i2v" and options.image is None:
        raise RequestError("--task i2v needs a start image; add --image FILE")
    if options.task == "t2v" and options.image is not None:
        raise RequestError("--image is given with --task t2v; use --task i2v")
    if options.lora_merge and not options.lora:
        raise RequestError("--lora-merge is given without a LoRA; add --lora FILE")
    if options.low_noise_model and not options.low_noise_model.exists():
        raise CheckpointError(f"--low-noise-model {options.low_noise_model} does not exist")


def _request(
    options: argparse.Namespace, images: Sequence[Tensor | None], pipeline: Pipeline
) -> GenerateRequest:
    return GenerateRequest(
        options.prompt,
        options.negative_prompt,
        *images,
        size=_size(options, pipeline),
        seed=options.seed,
        overrides=_overrides(options),
        fit=partial(fit_image, how=options.image_fit),
        size_fit=options.fit,
        motion=options.motion,
        strict=options.strict,
    )


def _overrides(options: argparse.Namespace) -> Overrides:
    shift, cfg = options.shift or (), options.cfg or ()
    return Overrides(
        steps=options.steps,
        shift=shift[0] if len(shift) == 1 else None,
        denoising_list=options.denoising_step_list,
        cfg=cfg[0] if len(cfg) == 1 else None,
        solver=options.solver,
        high_steps=options.high_steps,
        boundary=options.boundary,
        shifts=shift if len(shift) > 1 else None,
        cfgs=cfg if len(cfg) > 1 else None,
    )


def _size(options: argparse.Namespace, pipeline: Pipeline) -> VideoSize:
    trained = pipeline.preset.size
    return VideoSize(
        options.width or trained.width,
        options.height or trained.height,
        options.frames or trained.frames,
    )


def _metadata(options: argparse.Namespace, result: Result, plan: str) -> dict[str, object]:
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
        "model": str(options.model),
        "lora": options.lora,
        "lora_merge": options.lora_merge,
        "size": [result.size.width, result.size.height, result.size.frames],
        "plan": plan,
        "version": version(),
    }


def version() -> str:
    """The pack's version, which only pyproject.toml holds."""
    import re

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found else "unknown"


@contextmanager
def _progress_bar() -> Iterator[OnProgress]:
    """One bar over the stages; each stage has its share of the whole."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
    )
    shares = {
        "text": (0.0, 2.0),
        "image": (2.0, 8.0),
        "sampling": (10.0, 70.0),
        "decode": (80.0, 20.0),
    }
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("loading", total=100.0)

        def on_progress(stage: str, done: int, total: int) -> None:
            start, share = shares[stage]
            label = f"step {done}/{total}" if stage == "sampling" else STAGE_NAMES[stage]
            progress.update(task, completed=start + share * done / total, description=label)

        yield on_progress
