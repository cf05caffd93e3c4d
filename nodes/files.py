"""Which files the loader nodes list: those ComfyUI lists, GGUF files, and the shipped demo.

The last two are listed here and not registered with folder_paths, where every other loader would
show them.
"""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..lightx2v_core.checkpoint.source import whole
from ..lightx2v_core.errors import CheckpointError
from ..lightx2v_core.presets import DEMO_FILES, DEMO_FOLDER
from ..lightx2v_core.wan.tae import named_release

DEMO_PREFIX = "lightx2v_demo/"
DEMO_PARTS = {
    "diffusion_models": ("t2v", "i2v", "base"),
    "loras": ("lora", "high", "low"),
    "vae": ("vae",),
    "text_encoders": ("text",),
}
APPROX = "vae_approx"  # where ComfyUI keeps tiny VAEs, among those of other models
# ComfyUI's folder, and the name under which ComfyUI-GGUF (or extra_model_paths.yaml) adds to it.
GGUF_FOLDERS = {"diffusion_models": "unet_gguf", "text_encoders": "clip_gguf"}
GGUF_ENDINGS = {".gguf"}


def list_files(folder: str) -> list[str]:
    """Names for a combo: the demo's files of this kind, then those of ComfyUI's model folder."""
    parts = (DEMO_FILES[part] for part in DEMO_PARTS.get(folder, ()))
    demo = [DEMO_PREFIX + name for name in parts if (DEMO_FOLDER / name).is_file()]
    own = {*folder_paths.get_filename_list(folder), *_gguf_files(folder)}
    return [*demo, *sorted(own)]


def _gguf_files(folder: str) -> list[str]:
    """GGUF files of a folder, which ComfyUI itself does not list, by their paths below it."""
    if folder not in GGUF_FOLDERS:
        return []
    added = GGUF_FOLDERS[folder]
    names = [folder, *([added] if added in folder_paths.folder_names_and_paths else [])]
    homes = {path for name in names for path in folder_paths.get_folder_paths(name)}
    found = {name for home in homes for name in folder_paths.recursive_search(home, [".git"])[0]}
    return folder_paths.filter_files_extensions(found, GGUF_ENDINGS)


def _full_path(folder: str, name: str) -> str | None:
    found = folder_paths.get_full_path(folder, name)
    if found is None and folder in GGUF_FOLDERS:
        return folder_paths.get_full_path(GGUF_FOLDERS[folder], name)
    return found


def list_vaes() -> list[str]:
    """As `list_files`, and the tiny VAEs for Wan 2.1 as vae_approx/NAME."""
    tiny = [name for name in list_files(APPROX) if named_release(name)]
    return [*list_files("vae"), *(f"{APPROX}/{name}" for name in tiny)]


def vae_place(listed: str) -> tuple[str, str]:
    """Folder and name behind an entry of `list_vaes`."""
    if listed.startswith(f"{APPROX}/") and listed not in list_files("vae"):
        return APPROX, listed.removeprefix(f"{APPROX}/")
    return "vae", listed


def resolve(folder: str, name: str) -> Path:
    """The path behind a listed name; for one file of many, the folder they are in."""
    if name.startswith(DEMO_PREFIX):
        path = DEMO_FOLDER / name.removeprefix(DEMO_PREFIX)
    else:
        path = Path(_full_path(folder, name) or "")
    if not path.is_file():
        raise CheckpointError(
            f"{name} is not in the folder {folder} any more; press R to refresh the lists and "
            "choose another file"
        )
    return whole(path)


def fingerprint(folder: str, name: str) -> str:
    """Changes when the file does. Reads no contents: they may be 14 GB."""
    path = resolve(folder, name)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    stats = ((file.name, file.stat()) for file in files)
    return "|".join(f"{path.parent}/{n}:{s.st_mtime_ns}:{s.st_size}" for n, s in stats)
