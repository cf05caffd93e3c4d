"""The arguments that LightX2V's commands share, and the refusal of those for other models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import RequestError
from .read import read_configuration
from .settings import MODEL_CLASSES, TASKS, ConfiguredLora, Settings, settings_for

# Arguments of LightX2V that belong to models or features which are not run here.
FOREIGN = {
    "--src_video": "VACE models",
    "--src_mask": "VACE models",
    "--src_ref_images": "VACE models",
    "--src_pose_path": "Animate models",
    "--src_face_path": "Animate models",
    "--src_bg_path": "Animate models",
    "--src_mask_path": "Animate models",
    "--prompt_ref": "Animate models",
    "--audio_path": "models driven by sound",
    "--state_path": "robot models",
    "--save_action_path": "robot models",
    "--video_path": "models that take a video",
    "--sr_ratio": "super-resolution",
    "--pose": "WorldPlay models",
    "--action_path": "world models",
    "--image_strength": "models of pictures with sound",
    "--image_frame_idx": "models of pictures with sound",
    "--i2i_denoise_strength": "image models",
    "--keep_original_aspect": "image models",
    "--layout_bboxes": "image models",
    "--strength_model": "older configurations; use --lora_strength",
    "--split": "older services; components are not split over processes here",
    "--lora_dir": "services that switch LoRAs",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model_cls to --config_json as LightX2V has them, LoRAs, and where to compute."""
    add = parser.add_argument
    add("--model_cls", default="wan2.1_distill", help=", ".join(MODEL_CLASSES))
    add("--task", default="t2v", help=", ".join(TASKS))
    add("--model_path", required=True, help="model folder in LightX2V's layout, a file, or demo")
    add("--config_json", type=Path, required=True, help="a LightX2V configuration")
    add(
        "--lora_path",
        action="append",
        default=[],
        metavar="FILE",
        help="beside those of the configuration; may be given several times",
    )
    add(
        "--lora_strength",
        type=float,
        action="append",
        default=[],
        help="of each --lora_path in turn; 1 unless given",
    )
    add("--device", default="auto", help="auto, cuda, mps, cpu")
    add("--vram_gb", type=float, metavar="GB", help="at most this much of the card")


def settings_from(options: argparse.Namespace) -> Settings:
    """Of parsed `add_model_arguments`. Raises the errors of `settings_for`."""
    paths, strengths = options.lora_path, options.lora_strength
    if len(strengths) > len(paths):
        raise RequestError(
            f"{len(strengths)} --lora_strength and {len(paths)} --lora_path are given; give at "
            "most one strength for each file"
        )
    strengths = [*strengths, *[1.0] * (len(paths) - len(strengths))]
    loras = [ConfiguredLora(Path(p), s) for p, s in zip(paths, strengths, strict=True)]
    configuration = read_configuration(options.config_json)
    return settings_for(
        options.model_cls,
        options.task,
        options.model_path,
        configuration,
        loras,
        options.vram_gb,
    )


def refuse_unknown(unknown: Sequence[str], known: Sequence[str] = ()) -> None:
    """Raise RequestError for what parse_known_args left over; `known` is what there is."""
    names = [word.partition("=")[0] for word in unknown if word.startswith("-")]
    if not unknown:
        return
    name = names[0] if names else unknown[0]
    if name in FOREIGN:
        raise RequestError(f"{name} is for {FOREIGN[name]}: not run here; leave it out")
    there = f"; there are {', '.join(known)}" if known else ""
    raise RequestError(f"{name} is not an argument of this command{there}")
