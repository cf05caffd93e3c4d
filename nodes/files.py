"""Which files the loader nodes list. The shipped demo files appear beside the user's own.

They are listed here and not registered with folder_paths, where every other loader would show them.
"""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..lightx2v_core.checkpoint.source import whole
from ..lightx2v_core.errors import CheckpointError
from ..lightx2v_core.presets import DEMO_FILES, DEMO_FOLDER

DEMO_PREFIX = "lightx2v_demo/"
DEMO_PARTS = {"diffusion_models": ("t2v", "i2v"), "vae": ("vae",), "text_encoders": ("text",)}


def list_files(folder: str) -> list[str]:
    """Names for a combo: the demo's files of this kind, then those of ComfyUI's model folder."""
    parts = (DEMO_FILES[part] for part in DEMO_PARTS.get(folder, ()))
    demo = [DEMO_PREFIX + name for name in parts if (DEMO_FOLDER / name).is_file()]
    return [*demo, *folder_paths.get_filename_list(folder)]


def resolve(folder: str, name: str) -> Path:
    """The path behind a listed name; for one file of many, the folder they are in."""
    if name.startswith(DEMO_PREFIX):
        path = DEMO_FOLDER / name.removeprefix(DEMO_PREFIX)
    else:
        path = Path(folder_paths.get_full_path(folder, name) or "")
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
