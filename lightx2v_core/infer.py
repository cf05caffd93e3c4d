"""``python -m lightx2v_core.infer``: LightX2V's command, its arguments and its model folders."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .configuration.arguments import add_model_arguments, refuse_unknown, settings_from
from .configuration.running import Wish, open_pipeline, request_for
from .configuration.settings import Settings, check_processes
from .console import progress_bar, result_lines, version
from .device import select_device
from .errors import LightX2VError, RequestError
from .media import read_image, write_video
from .sampling.schedule import describe


def main(arguments: Sequence[str] | None = None) -> int:
    """Make one video; 0 when it worked, 1 after an error in words, 130 after Ctrl-C."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
    try:
        refuse_unknown(
            unknown, sorted(word for word in parser._option_string_actions if word[:2] == "--")
        )
        return run(options)
    except LightX2VError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightx2v_core.infer",
        description="LightX2V's infer command for distilled Wan 2.1 and 2.2 models.",
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--prompt", default="")
    add("--prompt_path", type=Path, help="file that holds the prompt")
    add("--negative_prompt", default="", help="used only where the configuration enables CFG")
    add("--image_path", default="", help="start image of i2v and flf2v")
    add("--last_frame_path", default="", help="last image of flf2v")
    add("--save_result_path", "--save_video_path", type=Path, default=Path("output_lightx2v.mp4"))
    add("--seed", type=int, help="42 unless given here or in the configuration")
    add("--num_frames", type=int, help="in place of the configuration's target_video_length")
    add("--target_shape", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    add("--use_prompt_enhancer", action="store_true", help="accepted; the prompt is used as it is")
    add("--warmup", action="store_true", help="accepted; there is nothing to warm up for one video")
    add("--verbose", action="store_true", help="log what happens")
    return parser


def run(options: argparse.Namespace) -> int:
    """Load, say what was loaded and planned, make the video and write it."""
    check_processes(int(os.environ.get("WORLD_SIZE") or 1))
    _check(options)
    settings = settings_from(options)
    for note in settings.notes:
        print(note)
    if options.use_prompt_enhancer:
        print("--use_prompt_enhancer: there is none here; the prompt is used as it is")
    wish = _wish(options)
    pipeline, lines = open_pipeline(settings, select_device(options.device))
    request = request_for(settings, pipeline, wish)
    plan = describe(pipeline.plan(request.overrides))
    for line in (*lines, plan):
        print(line)
    path = options.save_result_path
    with progress_bar() as on_progress:
        result = pipeline.generate(request, on_progress, path.with_suffix(".latent"))
    write_video(
        result.frames, path, settings.fps, _metadata(settings, wish, request.seed, plan, options)
    )
    for line in result_lines(result, path):
        print(line)
    return 0


def _check(options: argparse.Namespace) -> None:
    """What can be refused before any file is opened."""
    if options.save_result_path.suffix.lower() != ".mp4":
        raise RequestError(
            f"--save_result_path {options.save_result_path} must be a file that ends in .mp4"
        )
    if "," in options.image_path:
        raise RequestError(
            f"--image_path {options.image_path} names several images, and Wan takes one; for a "
            "last image use --task flf2v with --last_frame_path"
        )


def _wish(options: argparse.Namespace) -> Wish:
    prompt = options.prompt
    if options.prompt_path:
        try:
            prompt = options.prompt_path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--prompt_path cannot be read ({error}); check the file") from error
    if not prompt and options.task == "t2v":
        raise RequestError("--prompt is empty; say what the video shows")
    first, last = (
        read_image(Path(text)) if text else None
        for text in (options.image_path, options.last_frame_path)
    )
    shape = None if options.target_shape is None else tuple(options.target_shape)
    wish = Wish(prompt, options.negative_prompt, first, last, options.seed)
    return replace(wish, frames=options.num_frames, target_shape=shape)


def _metadata(
    settings: Settings, wish: Wish, seed: int, plan: str, options: argparse.Namespace
) -> dict[str, object]:
    return {
        "prompt": wish.prompt,
        "negative_prompt": wish.negative_prompt,
        "seed": seed,
        "model": str(settings.parts.transformer),
        "configuration": str(options.config_json),
        "lora": [f"{lora.path}:{lora.strength}" for lora in settings.loras],
        "plan": plan,
        "version": version(),
    }


if __name__ == "__main__":
    sys.exit(main())
