"""Which files a model folder in LightX2V's layouts gives, under a configuration.

Layouts: docs/EN/source/getting_started/model_structure.md, method_tutorials/step_distill.md and
find_torch_model_path in lightx2v/utils/utils.py of ModelTC/LightX2V at f8aee98b, and its versions
of 2025. Reads headers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..assemble import EXPERT_FOLDERS, PART_NAMES, Parts
from ..checkpoint.detect import detect
from ..checkpoint.source import (
    BLOCK,
    NOT_TRANSFORMERS,
    NUMBERED,
    REST,
    SHARD,
    open_checkpoint,
)
from ..errors import CheckpointError, RequestError
from .read import Configuration
from .schemes import Scheme, encoder_scheme, is_quantised_on_load

# Below the model folder, where parts lie; the first found wins.
PLACES = ("distill_int8", "distill_fp8", "distill_models", "int8", "fp8", "original", "")
TOKENIZER = "google/umt5-xxl"
TEXT_STEM = "models_t5_umt5-xxl-enc"
CLIP_STEM = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
LIGHT_VAES = ("lightvaew2_1.pth", "lightvaew2_1.safetensors")
TINY_VAES = (
    *("taew2_1.pth", "taew2_1.safetensors"),
    *("lighttaew2_1.pth", "lighttaew2_1.safetensors"),
)
OLD_FILE = "distill_model.pt"
EXPERT_KEYS = ("high_noise", "low_noise")


@dataclass
class Finder:
    """Searches below `home` for what `configuration` names or leaves to the layout; `notes` grows
    by a sentence for each choice that is not plain."""

    configuration: Configuration
    home: Path
    notes: list[str] = field(default_factory=list)

    def named(self, key: str, *extra: str) -> Path | None:
        """The file or folder a key names: as it stands, else below the model folder, else beside
        it. `extra` are folders below the model folder to look in too."""
        text = self.configuration.text(key)
        return None if not text else self.resolve(text, key, *extra)

    def resolve(self, text: str, key: str, *extra: str) -> Path:
        given = Path(text).expanduser()
        homes = [self.home, *(self.home / name for name in extra), self.home.parent]
        places = [given, *(home / given for home in homes if not given.is_absolute())]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            where = ", ".join(str(home) for home in homes)
            also = "" if given.is_absolute() else f" (looked from here, and in {where})"
            raise CheckpointError(
                f"{self.configuration.source}: {key} {text} does not exist{also}; correct the path"
            )
        return found

    def first(self, *names: str) -> Path | None:
        """The first of `names` in LightX2V's order of folders, then beside the model folder."""
        homes = (self.home, self.home.parent)
        places = (home / place / name for home in homes for place in PLACES for name in names)
        return next((place for place in places if place.is_file()), None)


def find_parts_of(
    configuration: Configuration,
    home: Path,
    scheme: Scheme | None,
    experts: int,
    is_distilled: bool,
    with_loras: bool,
) -> tuple[Parts, list[str]]:
    """Every file of one model, and what to say about how they were chosen.

    `home` is the model folder, or a transformer file whose folder holds the rest; `experts` 1 or 2.
    `is_distilled` prefers distilled weights where both lie there, `with_loras` the ones LoRAs are
    for. Raises CheckpointError that names what is missing, where it was searched, and the key that
    would name it.
    """
    if not home.exists():
        raise CheckpointError(f"--model_path {home} does not exist; give the model folder")
    finder = Finder(configuration, home if home.is_dir() else home.parent)
    if experts == 2:
        paths = [_expert(finder, index, scheme, with_loras) for index in (0, 1)]
    elif home.is_file():
        paths = [home]
    else:
        paths = [_single(finder, scheme, is_distilled, with_loras)]
    parts = Parts(
        transformer=paths[0],
        low=paths[1] if experts == 2 else None,
        vae=_vae(finder),
        text=_text(finder),
        clip=_clip(finder),
        tokenizer=_tokenizer(finder),
        tae=_tae(finder),
    )
    return parts, finder.notes


def _single(finder: Finder, scheme: Scheme | None, is_distilled: bool, with_loras: bool) -> Path:
    on_load = scheme is not None and is_quantised_on_load(finder.configuration)
    keys = ("dit_original_ckpt", "dit_distill_ckpt")
    for key in ("dit_quantized_ckpt",) if scheme and not on_load else keys:
        if path := finder.named(key):
            return _one_model(finder, path, scheme, key)
    if scheme and not on_load:
        places = [f"distill_{scheme.family}" if is_distilled else scheme.family, ""]
    elif is_distilled and not with_loras:
        places = ["distill_models", "", "original"]
    else:
        places = ["", "original"]
    key = "dit_quantized_ckpt" if scheme and not on_load else "dit_original_ckpt"
    return _in_places(finder, places, scheme, key)


def _expert(finder: Finder, index: int, scheme: Scheme | None, with_loras: bool) -> Path:
    """The high-noise expert is 0, the low-noise one 1."""
    configuration, folder = finder.configuration, EXPERT_FOLDERS[index]
    on_load = scheme is not None and is_quantised_on_load(configuration)
    stem = EXPERT_KEYS[index]
    key = f"{stem}_quantized_ckpt" if scheme and not on_load else f"{stem}_original_ckpt"
    if path := finder.named(key):
        return _one_model(finder, path, scheme, key)
    if scheme and not on_load:
        places = [f"distill_{scheme.family}/{folder}", folder]
    else:
        places = [folder] if with_loras else [f"distill_models/{folder}", folder]
    return _in_places(finder, places, scheme, key)


def _in_places(finder: Finder, places: list[str], scheme: Scheme | None, key: str) -> Path:
    folders = [finder.home / place for place in places]
    for folder in folders:
        if (folder / OLD_FILE).is_file():
            return folder / OLD_FILE
        if _models_in(folder):
            return _one_model(finder, folder, scheme, key)
    searched = ", ".join(str(folder) for folder in folders)
    raise CheckpointError(
        f"no transformer found: {searched} hold no weights; name it with {key} in the "
        "configuration, or check --model_path"
    )


def _models_in(folder: Path) -> list[Path]:
    """Weight files in `folder` that may be a transformer's, by name."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".gguf")
        and not any(word in path.name.lower() for word in NOT_TRANSFORMERS)
    )


def _one_model(finder: Finder, path: Path, scheme: Scheme | None, key: str) -> Path:
    """`path` itself, or the one model in that folder which the configuration means."""
    if path.is_file():
        return path
    files = _models_in(path)
    whole = [p for p in files if not _is_piece(p.name)]
    if scheme and scheme.gguf_type:
        whole = [p for p in files if p.suffix == ".gguf" and scheme.gguf_type in p.name]
    if len(whole) == 1:
        return whole[0]
    if not whole:
        return path  # shards or blocks, or nothing, which opening it names
    wanted = [p for p in whole if _is_meant(p, scheme)]
    names = ", ".join(p.name for p in whole)
    if len(wanted) != 1:
        raise RequestError(
            f"{path} holds {len(whole)} models ({names}), and the configuration does not tell "
            f"which; name one with {key}"
        )
    finder.notes.append(
        f"{wanted[0].name} taken out of {len(whole)} models in {path.name}: its number format is "
        "the configuration's"
    )
    return wanted[0]


def _is_piece(name: str) -> bool:
    return bool(SHARD.search(name) or BLOCK.match(name) or NUMBERED.search(name)) or name == REST


def _is_meant(path: Path, scheme: Scheme | None) -> bool:
    stored = detect(open_checkpoint(path)).scheme
    return scheme.fits(stored) if scheme else stored in ("bf16", "fp16", "fp32")


def _missing(finder: Finder, what: str, names: tuple[str, ...], key: str) -> CheckpointError:
    places = ", ".join(place or "." for place in PLACES)
    return CheckpointError(
        f"no {what} below {finder.home}: looked in {places} for {', '.join(names)}; put it there, "
        f"or name it with {key} in the configuration"
    )


def _text(finder: Finder) -> Path:
    scheme = encoder_scheme(finder.configuration, "t5")
    key = "t5_quantized_ckpt" if scheme else "t5_original_ckpt"
    names = _encoder_names(TEXT_STEM, f"-{scheme.family}" if scheme else "-bf16")
    names = names if scheme else (*names, *PART_NAMES["text"])
    found = finder.named(key) or finder.first(*dict.fromkeys(names))
    if found is None:
        raise _missing(finder, "text encoder", tuple(dict.fromkeys(names)), key)
    return found


def _encoder_names(stem: str, ending: str) -> tuple[str, ...]:
    return (f"{stem}{ending}.pth", f"{stem}{ending}.safetensors")


def _clip(finder: Finder) -> Path | None:
    """None where there is none; `settings_for` knows whether the model needs it."""
    if not finder.configuration.flag("use_image_encoder", True):
        return None
    scheme = encoder_scheme(finder.configuration, "clip")
    key = "clip_quantized_ckpt" if scheme else "clip_original_ckpt"
    return finder.named(key) or finder.first(*clip_names(scheme))


def clip_names(scheme: Scheme | None) -> tuple[str, ...]:
    names = _encoder_names(CLIP_STEM, f"-{scheme.family}" if scheme else "")
    return names if scheme else tuple(dict.fromkeys((*names, *PART_NAMES["clip"])))


def missing_clip(configuration: Configuration, home: Path) -> CheckpointError:
    """For a model that has a CLIP branch where no CLIP was found."""
    scheme = encoder_scheme(configuration, "clip")
    key = "clip_quantized_ckpt" if scheme else "clip_original_ckpt"
    finder = Finder(configuration, home if home.is_dir() else home.parent)
    return _missing(finder, "CLIP image encoder, which this model needs,", clip_names(scheme), key)


def _tokenizer(finder: Finder) -> Path | None:
    folder = finder.home / TOKENIZER
    return finder.named("t5_tokenizer_path") or (folder if folder.is_dir() else None)


def _vae(finder: Finder) -> Path:
    configuration = finder.configuration
    if path := finder.named("vae_path"):
        return path
    if configuration.flag("use_lightvae"):
        names = LIGHT_VAES
    elif name := configuration.text("vae_name"):
        names = (name,)
    else:
        names = (*sorted(PART_NAMES["vae"], key=lambda name: not name.endswith(".pth")),)
    if found := finder.first(*names):
        return found
    raise _missing(finder, "VAE", names, "vae_path")


def _tae(finder: Finder) -> Path | None:
    configuration = finder.configuration
    if not configuration.flag("use_tae"):
        return None
    path = finder.named("tae_path") or finder.first(*TINY_VAES)
    if path is None:
        raise _missing(finder, "tiny VAE", TINY_VAES, "tae_path")
    is_light = "light" in path.name.lower()
    if "need_scaled" in configuration.values and configuration.flag("need_scaled") != is_light:
        finder.notes.append(
            f"warning: {configuration.source}: need_scaled is "
            f"{str(configuration.flag('need_scaled')).lower()}, and the name {path.name} says "
            "otherwise; the name decides"
        )
    return path
