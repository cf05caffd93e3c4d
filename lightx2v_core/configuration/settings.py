"""A configuration, a model folder and arguments into what a Pipeline needs, as plain data.

Reads headers of model files, no weights. Everything that cannot be obeyed and would change the
frames is refused here by a sentence; what only changes how they are computed is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..assemble import Parts, find_parts
from ..checkpoint.detect import CheckpointInfo, detect
from ..checkpoint.source import open_checkpoint
from ..errors import CapabilityError, RequestError
from ..lora.steps import Strengths
from ..presets import FPS, Overrides
from ..quant.quantise import KEEP
from ..wan.config import TEXT_LEN
from .folders import Finder, find_parts_of, missing_clip
from .keys import KEYS
from .read import Configuration
from .schemes import Scheme, choose_quantisation, read_attention, transformer_scheme
from .sizes import SizeRule, read_sizes

TASKS = ("t2v", "i2v", "flf2v")
# --model_cls -> how many experts.
MODEL_CLASSES = {"wan2.1_distill": 1, "wan2.2_moe_distill": 2, "wan2.1": 1}
DISTILL_SCHEDULER = "WanStepDistillScheduler"
# Names of LightX2V that are known and not run, and why.
NOT_RUN = {
    "wan2.2_moe": "models that are not distilled (40 to 50 steps); use wan2.2_moe_distill with a "
    "distillation LoRA in lora_configs",
    "wan2.1_mean_flow_distill": "mean-flow models, which take two timesteps; use wan2.1_distill",
    "wan2.1_sf": "self-forcing models in causal chunks",
    "wan2.1_sf_mtxg2": "Matrix-Game models",
    "wan2.1_causvid": "CausVid models in causal chunks",
    "wan2.1_vace": "VACE models",
    "wan2.2_moe_vace": "VACE models",
    "wan2.2": "the 5B model of Wan 2.2",
    "wan2.2_animate": "Animate models",
    "wan22_animate2_distilled": "Animate models",
    "wan2.1_audio": "models driven by sound",
    "wan2.2_audio": "models driven by sound",
    "wan2.2_moe_audio": "models driven by sound",
    "wan2.2_s2v": "models driven by sound",
    "wan_dancer": "models driven by sound",
    "seko_talk": "models driven by sound",
}
EXPERT_NAMES = {"high_noise_model": "high", "low_noise_model": "low"}
# Keys that change the frames and are not done: key -> values that ask for nothing.
_NOTHING = (False, "NoCaching", "Default", "", 0)


@dataclass(frozen=True, slots=True)
class ConfiguredLora:
    """A LoRA file, how strong (one number, or one for each step), and for which of two experts
    (high, low; None: by its name)."""

    path: Path
    strength: Strengths = 1.0
    expert: str | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What makes a pipeline and its requests. `notes` are lines to show once at the start.

    A `wished` attention gives way to the exact one where it cannot run; another is refused.
    """

    model_cls: str
    task: str
    parts: Parts
    attention: str = "auto"
    wished: bool = False
    quantisation: str = KEEP
    matmul: str = "auto"
    vram_bytes: int | None = None
    loras: tuple[ConfiguredLora, ...] = ()
    merge_loras: bool = False
    overrides: Overrides = Overrides()
    sizes: SizeRule = SizeRule()
    fps: int = FPS
    seed: int | None = None
    notes: tuple[str, ...] = ()


def settings_for(
    model_cls: str,
    task: str,
    model_path: str | Path,
    configuration: Configuration,
    loras: Sequence[ConfiguredLora] = (),
    vram_gb: float | None = None,
) -> Settings:
    """`model_path` is a folder in LightX2V's layouts, a transformer file, or "demo"; `loras` come
    beside those of the configuration.

    Raises RequestError for what contradicts itself, CapabilityError for what is not done yet,
    CheckpointError for files that are missing or no models.
    """
    experts = check_model_cls(model_cls, configuration)
    check_task(task)
    _check_not_yet(configuration)
    notes = [*configuration.notes, *_check_values(configuration)]
    scheme = transformer_scheme(configuration)
    wanted = (*_configured_loras(configuration, Path(model_path), experts), *loras)
    parts, found = _parts(model_cls, task, model_path, configuration, scheme, bool(wanted))
    info = detect(open_checkpoint(parts.transformer))
    notes += [*found, *_check_model(configuration, parts, info, task, scheme)]
    attention, said = read_attention(configuration)
    overrides, planned = _overrides(configuration, experts)
    return Settings(
        model_cls,
        task,
        parts,
        attention,
        True,
        choose_quantisation(configuration, scheme, info.scheme),
        vram_bytes=None if vram_gb is None else int(vram_gb * 1e9),
        loras=wanted,
        overrides=overrides,
        sizes=read_sizes(configuration),
        fps=configuration.count("fps") or FPS,
        seed=configuration.count("seed"),
        notes=(*notes, *said, *planned),
    )


def check_model_cls(name: str, configuration: Configuration) -> int:
    """The number of experts of that class."""
    if name in NOT_RUN:
        raise CapabilityError(f"--model_cls {name} is for {NOT_RUN[name]}; this is not run yet")
    if name not in MODEL_CLASSES:
        raise RequestError(
            f"--model_cls {name} is not one that is run here; use {', '.join(MODEL_CLASSES)}"
        )
    if name == "wan2.1" and configuration.text("scheduler_type") != DISTILL_SCHEDULER:
        raise CapabilityError(
            "--model_cls wan2.1 is for models that are not distilled (40 to 50 steps), which are "
            "not run here; use wan2.1_distill, with a distillation LoRA in lora_configs where the "
            "model is not distilled itself"
        )
    return MODEL_CLASSES[name]


def check_task(task: str) -> None:
    if task not in TASKS:
        raise CapabilityError(f"--task {task} is not run here; use {', '.join(TASKS)}")


def check_processes(count: int) -> None:
    """Of --nproc_per_node or torchrun's WORLD_SIZE."""
    if count != 1:
        raise CapabilityError(
            f"{count} processes are asked for, and several GPUs are not used yet; start one, "
            "without torchrun or with --nproc_per_node 1"
        )


def _check_not_yet(configuration: Configuration) -> None:
    for key, value in configuration.values.items():
        if key not in KEYS or KEYS[key].fate != "not yet" or key == "parallel":
            continue
        if value in _NOTHING or value == {}:
            continue
        raise CapabilityError(
            f"{configuration.source}: {key} is not done yet ({KEYS[key].what}); remove it to run "
            "without"
        )


def _check_values(configuration: Configuration) -> list[str]:
    """Sentences about keys that are weighed against others."""
    source, notes = configuration.source, []
    if configuration.values.get("parallel"):
        notes.append(f"{source}: parallel: not yet; {KEYS['parallel'].what}")
    text_len = configuration.count("text_len")
    if text_len not in (None, TEXT_LEN):
        raise RequestError(
            f"{source}: text_len is {text_len}, and every Wan model has {TEXT_LEN}; correct it"
        )
    if configuration.flag("cpu_offload") or configuration.flag("lazy_load"):
        notes.append(
            f"{source}: memory is planned from what is free in place of cpu_offload and its like"
        )
    return notes


def _overrides(configuration: Configuration, experts: int) -> tuple[Overrides, list[str]]:
    source, notes = configuration.source, []
    steps, listed = configuration.count("infer_steps"), configuration.numbers("denoising_step_list")
    if listed and steps not in (None, len(listed)):
        notes.append(
            f"{source}: infer_steps is {steps}, and denoising_step_list has {len(listed)}; the "
            "list decides"
        )
    guided = configuration.flag("enable_cfg")
    cfg = _scale(configuration) if guided else 1.0
    if guided and cfg != 1.0:
        notes.append(
            f"warning: {source}: enable_cfg is true with scale {cfg:g}; a distilled model burns "
            "with CFG: set it to false"
        )
    return Overrides(
        steps=None if listed else steps,
        shift=configuration.number("sample_shift"),
        denoising_list=listed or None,
        cfg=cfg,
        high_steps=configuration.count("boundary_step_index") if experts == 2 else None,
    ), notes


def _scale(configuration: Configuration) -> float:
    pair = configuration.numbers("sample_guide_scale")
    if pair and pair[0] != pair[1]:
        raise CapabilityError(
            f"{configuration.source}: sample_guide_scale {list(pair)} differs for the two experts, "
            "which is not done; give one number, or set enable_cfg to false"
        )
    return pair[0] if pair else configuration.number("sample_guide_scale") or 1.0


def _configured_loras(
    configuration: Configuration, home: Path, experts: int
) -> tuple[ConfiguredLora, ...]:
    finder = Finder(configuration, home if home.is_dir() else home.parent)
    found = []
    entries = configuration.values.get("lora_configs")
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        where = f"lora_configs[{index}]"
        strength = entry.get("strength")
        expert = _expert(configuration.source, where, entry.get("name"), experts)
        path = finder.resolve(str(entry["path"]), f"{where}.path", "loras")
        found.append(ConfiguredLora(path, 1.0 if strength is None else float(strength), expert))
    old = configuration.values.get("lora_path") or []
    strength = configuration.number("strength_model")
    for text in [old] if isinstance(old, str) else old if isinstance(old, list) else []:
        path = finder.resolve(text, "lora_path", "loras")
        found.append(ConfiguredLora(path, 1.0 if strength is None else strength))
    return tuple(found)


def _expert(source: str, where: str, name: object, experts: int) -> str | None:
    if experts == 1 or not name:
        return None
    if name not in EXPERT_NAMES:
        raise RequestError(
            f"{source}: {where}.name {name} is no expert; use {' or '.join(EXPERT_NAMES)}"
        )
    return EXPERT_NAMES[str(name)]


def _parts(
    model_cls: str,
    task: str,
    model_path: str | Path,
    configuration: Configuration,
    scheme: Scheme | None,
    with_loras: bool,
) -> tuple[Parts, list[str]]:
    if str(model_path) == "demo":
        return find_parts("demo", task), []
    experts, is_distilled = MODEL_CLASSES[model_cls], model_cls.endswith("_distill")
    home = Path(model_path).expanduser()
    return find_parts_of(configuration, home, scheme, experts, is_distilled, with_loras)


def _check_model(
    configuration: Configuration,
    parts: Parts,
    info: CheckpointInfo,
    task: str,
    scheme: Scheme | None,
) -> list[str]:
    """Refuse a model of another task before anything is loaded; say where file and key differ."""
    name, source = parts.transformer.name, configuration.source
    if info.config is not None and (task == "t2v") == info.config.takes_image:
        kind = "an image-to-video" if info.config.takes_image else "a text-to-video"
        raise RequestError(
            f"--task {task} is given, and {name} is {kind} model; give the task it was made for"
        )
    if info.config is not None and info.config.clip_tokens and parts.clip is None:
        raise missing_clip(configuration, parts.transformer.parent)
    if scheme is None and info.scheme not in ("bf16", "fp16", "fp32", "unknown"):
        return [f"{source}: no dit_quantized, and {name} is {info.scheme}; the file decides"]
    plain = info.scheme in ("bf16", "fp16", "fp32")
    if scheme is not None and not plain and not scheme.fits(info.scheme):
        return [
            f"{source}: {scheme.name} is asked for, and {name} is {info.scheme}; the file decides"
        ]
    return []
