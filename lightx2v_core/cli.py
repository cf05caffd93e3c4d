"""The command line: generate a video, inspect a file, quantise one, time one."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from .assemble import EXPERT_FOLDERS, find_parts
from .checkpoint.writing import write_somewhere
from .conditioning import fit_image
from .configuration.read import Configuration, read_configuration
from .configuration.running import Wish, open_pipeline, request_for
from .configuration.settings import ConfiguredLora, Settings, settings_for
from .console import progress_bar, result_lines, version
from .datatypes import VideoSize
from .errors import CheckpointError, LightX2VError, RequestError
from .lora.steps import read_strengths
from .memory.ram import limit_to
from .options import make_parser
from .pipeline import Pipeline
from .presets import Preset
from .quant.quantise import KEEP
from .request import GenerateRequest, Result
from .sizing import fit_size


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 after an error in words, 130 after Ctrl-C."""
    commands = {
        "generate": run_generate,
        "inspect": run_inspect,
        "quantize": run_quantize,
        "bench": run_bench,
    }
    options = make_parser(commands).parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
    ram_gb = getattr(options, "ram_gb", None)
    limit_to(None if ram_gb is None else int(ram_gb * 1e9))
    try:
        return options.run(options)
    except LightX2VError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130


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
        options.attention or "auto",
        options.quant or KEEP,
        options.matmul,
        None if options.vram_gb is None else int(options.vram_gb * 1e9),
    )
    report = bench(request, device)
    print(json.dumps(report.as_json()) if options.json else "\n".join(report.lines()))
    return 0


def run_generate(options: argparse.Namespace) -> int:
    """Load, print the plan, make the video, write it, and say what it took."""
    _check(options)
    from .device import select_device
    from .media import contact_sheet, describe_padding, read_image, write_video
    from .sampling.schedule import describe

    first, last = (
        None if path is None else read_image(path) for path in (options.image, options.last_image)
    )
    settings = _settings(options)
    pipeline, lines = open_pipeline(settings, select_device(options.device))
    request = _request(options, settings, pipeline, (first, last))
    assert request.size is not None, "settings give one"
    size = request.size
    if request.size_fit and (told := (fitted := fit_size(size, request.size_fit)).describe()):
        size, lines = fitted.made, [*lines, told]
    plan = describe(
        pipeline.plan(request.overrides, size, options.strict), pipeline.describe_loras()
    )
    for line in (*settings.notes, *lines, plan):
        print(line)
    if options.dry_run:
        return 0
    with progress_bar() as on_progress:
        rescue = options.output.with_suffix(".latent")
        result = pipeline.generate(request, on_progress, rescue)
    if padded := describe_padding(result.frames):
        print(padded)
    said = _metadata(options, settings, result, plan)
    video = write_somewhere(
        lambda path: write_video(result.frames, path, settings.fps, said), options.output
    )
    if options.contact_sheet:
        rows = [(f"{plan.splitlines()[0].partition(' (')[0]}: {options.prompt}", result.frames)]
        contact_sheet([*rows, *_beside(options.beside)], options.contact_sheet)
    for line in result_lines(result, video):
        print(line)
    return 0


def _request(
    options: argparse.Namespace,
    settings: Settings,
    pipeline: Pipeline,
    images: tuple[Tensor | None, Tensor | None],
) -> GenerateRequest:
    wish = Wish(options.prompt, options.negative_prompt, *images, settings.seed or 0)
    shape = _shape(options, settings, pipeline.preset)
    wish = replace(wish, frames=options.frames, target_shape=shape)
    request = request_for(settings, pipeline, wish)
    if options.image_fit:
        request = replace(request, fit=partial(fit_image, how=options.image_fit))
    # A configuration has sizes of its own rules.
    size_fit = None if options.config_json else options.fit
    return replace(request, size_fit=size_fit, motion=options.motion, strict=options.strict)


def _beside(path: Path | None) -> list[tuple[str, Tensor]]:
    """A row of the contact sheet for a video that this program wrote."""
    if path is None:
        return []
    from .media import read_metadata, read_video

    told = read_metadata(path)
    plan = str(told.get("plan", "")).partition(" (")[0]
    label = f"{Path(str(told.get('model', path.name))).stem}, {plan}: {told.get('prompt', '')}"
    return [(label, read_video(path))]


def _settings(options: argparse.Namespace) -> Settings:
    """What the command line says, before what the configuration says."""
    settings = _configured(options) if options.config_json else _plain(options)
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
        overrides=replace(settings.overrides, **_overrides(options)),
        loras=loras,
        matmul=options.matmul,
        merge_loras=options.lora_merge,
        wished=options.attention is None,
        **{name: value for name, value in changes.items() if value is not None},
    )


def _overrides(options: argparse.Namespace) -> dict[str, object]:
    """What was given of the plan; with it what a configuration says otherwise is taken back."""
    asked = {
        "steps": options.steps,
        "denoising_list": options.denoising_step_list,
        "solver": options.solver,
        "high_steps": options.high_steps,
        "boundary": options.boundary,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    if "steps" in given:  # a list would win over it
        given.setdefault("denoising_list", None)
    for one, each in (("shift", "shifts"), ("cfg", "cfgs")):
        if values := getattr(options, one):
            is_one = len(values) == 1
            given |= {one: values[0] if is_one else None, each: None if is_one else values}
    return given


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
