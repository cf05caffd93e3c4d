"""The command line: generate a video, inspect a file, quantise one."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .assemble import EXPERT_FOLDERS, find_parts
from .checkpoint.convert import SCHEMES
from .configuration.read import Configuration, read_configuration
from .configuration.running import Wish, open_pipeline, request_for
from .configuration.settings import ConfiguredLora, Settings, settings_for
from .console import progress_bar, result_lines, version
from .errors import CheckpointError, LightX2VError, RequestError
from .lora.steps import read_strengths
from .ops.matmul import MATMUL_CHOICES
from .pipeline import Result
from .presets import Preset
from .quant.quantise import LOAD_CHOICES


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
    add(
        "--config-json",
        type=Path,
        metavar="FILE",
        help="a LightX2V configuration, for what is not given here",
    )
    add("--output", type=Path, required=True, metavar="FILE.mp4")
    add("--contact-sheet", type=Path, metavar="FILE.png", help="also write frames side by side")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Size, schedule, experts and LoRAs."""
    add = parser.add_argument
    for name in ("width", "height", "frames"):
        add(f"--{name}", type=int, help="default: what the model was trained for")
    add("--fps", type=int, help="16 unless given")
    add("--seed", type=int, help="0 unless given")
    add("--steps", type=int, help="equal steps instead of the trained list")
    add("--shift", type=float)
    add("--denoising-step-list", type=_numbers, metavar="1000,750,500,250")
    add("--solver", choices=("euler", "renoise"))
    add("--cfg", type=float, help="1 (off) for distilled models")
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
    add("--dry-run", action="store_true", help="print the plan and stop")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    """How and where it is computed."""
    add = parser.add_argument
    add("--attention", help="auto, sdpa, flash, sage")
    add("--quant", choices=LOAD_CHOICES, help="turn the linears of a full file into codes")
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


def run_generate(options: argparse.Namespace) -> int:
    """Load, print the plan, make the video, write it, and say what it took."""
    _check(options)
    from .device import select_device
    from .media import contact_sheet, read_image, write_video
    from .sampling.schedule import describe

    first, last = (
        None if path is None else read_image(path) for path in (options.image, options.last_image)
    )
    settings = _settings(options)
    pipeline, lines = open_pipeline(settings, select_device(options.device))
    wish = Wish(options.prompt, options.negative_prompt, first, last, settings.seed or 0)
    shape = _shape(options, settings, pipeline.preset)
    wish = replace(wish, frames=options.frames, target_shape=shape)
    request = request_for(settings, pipeline, wish)
    plan = describe(pipeline.plan(settings.overrides))
    for line in (*settings.notes, *lines, plan):
        print(line)
    if options.dry_run:
        return 0
    with progress_bar() as on_progress:
        rescue = options.output.with_suffix(".latent")
        result = pipeline.generate(request, on_progress, rescue)
    write_video(
        result.frames, options.output, settings.fps, _metadata(options, settings, result, plan)
    )
    if options.contact_sheet:
        contact_sheet([(options.prompt, result.frames)], options.contact_sheet)
    for line in result_lines(result, options.output):
        print(line)
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    """What the command line says, before what the configuration says."""
    settings = _configured(options) if options.config_json else _plain(options)
    asked = {
        "steps": options.steps,
        "shift": options.shift,
        "denoising_list": options.denoising_step_list,
        "cfg": options.cfg,
        "solver": options.solver,
        "high_steps": options.high_steps,
        "boundary": options.boundary,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if "steps" in given:  # a list would win over it
        given.setdefault("denoising_list", None)
    changes = {
        "attention": options.attention,
        "quantisation": options.quant,
        "vram_bytes": None if options.vram_gb is None else int(options.vram_gb * 1e9),
        "fps": options.fps,
        "seed": options.seed,
    }
    loras = (*settings.loras, *(_lora(text) for text in options.lora))
    return replace(
        settings,
        task="flf2v" if options.last_image else options.task,
        overrides=replace(settings.overrides, **given),
        loras=loras,
        matmul=options.matmul,
        merge_loras=options.lora_merge,
        wished=options.attention is None,
        **{name: value for name, value in changes.items() if value is not None},
    )


def _plain(options: argparse.Namespace) -> Settings:
    given = {
        "vae": options.vae,
        "tae": options.tae,
        "text": options.text_encoder,
        "clip": options.clip_vision,
    }
    low, tokenizer = options.low_noise_model, options.tokenizer
    parts = find_parts(options.model, options.task, low, given, tokenizer)
    return Settings("", options.task, parts)


def _configured(options: argparse.Namespace) -> Settings:
    """By a LightX2V configuration, in which files named on the command line stand instead."""
    configuration = read_configuration(options.config_json)
    named = {
        "vae_path": options.vae,
        "tae_path": options.tae,
        "use_tae": True if options.tae else None,
        "t5_original_ckpt": options.text_encoder,
        "t5_quantized_ckpt": options.text_encoder,
        "t5_tokenizer_path": options.tokenizer,
        "clip_original_ckpt": options.clip_vision,
        "clip_quantized_ckpt": options.clip_vision,
    }
    if low := options.low_noise_model:
        for form in ("original", "quantized"):
            named |= {f"high_noise_{form}_ckpt": options.model, f"low_noise_{form}_ckpt": low}
    given = {k: v if v is True else str(v) for k, v in named.items() if v is not None}
    configuration = replace(configuration, values={**configuration.values, **given})
    model_cls = "wan2.2_moe_distill" if _has_two(options, configuration) else "wan2.1_distill"
    task = "flf2v" if options.last_image else options.task
    return settings_for(model_cls, task, options.model, configuration)


def _has_two(options: argparse.Namespace, configuration: Configuration) -> bool:
    folders = (Path(options.model), Path(options.model) / "distill_models")
    return any(key.startswith("high_noise_") for key in configuration.values) or any(
        (folder / EXPERT_FOLDERS[0]).is_dir() for folder in folders
    )


def _lora(text: str) -> ConfiguredLora:
    """FILE, FILE:STRENGTH or FILE:1,1,0.6,0; a Windows drive letter is no file."""
    path, _, strengths = text.rpartition(":")
    if not path or not set(strengths) <= set("0123456789+-.,eE "):
        return ConfiguredLora(Path(text))
    return ConfiguredLora(Path(path), read_strengths(strengths))


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


def _shape(
    options: argparse.Namespace, settings: Settings, preset: Preset
) -> tuple[int, int] | None:
    """Height and width; None where a configuration's rule for start images decides."""
    if options.config_json and not (options.width or options.height):
        return None
    video = settings.sizes.video(preset)
    return (options.height or video.height, options.width or video.width)


def _metadata(
    options: argparse.Namespace, settings: Settings, result: Result, plan: str
) -> dict[str, object]:
    return {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "seed": settings.seed or 0,
        "model": str(options.model),
        "configuration": None if options.config_json is None else str(options.config_json),
        "lora": options.lora,
        "lora_merge": options.lora_merge,
        "size": [result.size.width, result.size.height, result.size.frames],
        "plan": plan,
        "version": version(),
    }
