"""Schema keywords that only newer ComfyUIs know, and widgets that several nodes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from comfy_api.latest import io

from ..lightx2v_core.datatypes import MAX_FRAMES, MAX_SIDE
from ..lightx2v_core.errors import RequestError
from ..lightx2v_core.presets import Overrides
from ..lightx2v_core.sampling.schedule import DISTILL_LIST
from ..lightx2v_core.sizing import FITS

ASKED_KEY = "lightx2v_asked"  # in a LATENT: what Decode Video cuts the frames to
# Folds a widget away where the frontend can; older ones show it like any other.
ADVANCED = {"advanced": True}


def newer(**keywords: object) -> dict[str, object]:
    """Those keywords that this ComfyUI's Schema takes."""
    known = {field.name for field in fields(io.Schema)}
    return {name: value for name, value in keywords.items() if name in known}


def found_by(*words: str) -> dict[str, object]:
    """What people type to find a node, where this ComfyUI's search takes more than names."""
    return newer(search_aliases=["lightx2v", "wan", *words])


def size_inputs() -> list[io.Input]:
    """Width, height and frames, any; `fit_input` says what becomes of those Wan cannot make."""
    return [
        io.Int.Input("width", default=832, min=1, max=MAX_SIDE, tooltip="In pixels; any."),
        io.Int.Input("height", default=480, min=1, max=MAX_SIDE, tooltip="In pixels; any."),
        io.Int.Input(
            "frames",
            default=81,
            min=1,
            max=MAX_FRAMES,
            tooltip="Any; 4*n + 1 are made. The models were trained with 81 at 16 per second.",
        ),
    ]


def fit_input() -> io.Combo.Input:
    return io.Combo.Input(
        "fit",
        options=list(FITS),
        default=FITS[0],
        optional=True,
        tooltip="Where the size is no multiple of 16: crop a larger clip, or pad a smaller one "
        "with black. Decode Video gives exactly the size asked for.",
        extra_dict=ADVANCED,
    )


def schedule_input() -> io.DynamicCombo.Input:
    shift = io.Float.Input(
        "shift",
        default=5.0,
        min=0.1,
        max=100.0,
        step=0.1,
        tooltip="Moves steps towards noise. 5 is what the distilled models were trained with.",
    )
    steps = io.Int.Input("steps", default=4, min=1, max=100, tooltip="4 for distilled models.")
    values = io.String.Input(
        "denoising_steps",
        default=", ".join(map(str, DISTILL_LIST)),
        tooltip="Trained timesteps before the shift, falling from 1000 towards 0.",
    )
    return io.DynamicCombo.Input(
        "schedule",
        options=[
            io.DynamicCombo.Option("auto", []),
            io.DynamicCombo.Option("steps", [steps, shift]),
            io.DynamicCombo.Option("list", [values, shift]),
        ],
        tooltip=(
            "auto: the schedule the file was distilled with. steps: equal steps, shifted. "
            "list: your own timesteps, shifted."
        ),
    )


def split_input() -> io.DynamicCombo.Input:
    high_steps = io.Int.Input(
        "high_steps", default=2, min=1, max=99, tooltip="Steps of the high-noise expert."
    )
    boundary = io.Float.Input(
        "boundary",
        default=0.9,
        min=0.0,
        max=1.0,
        step=0.005,
        tooltip="Sigma down to which the high-noise expert works: 0.9 for I2V, 0.875 for T2V.",
    )
    return io.DynamicCombo.Input(
        "split",
        options=[
            io.DynamicCombo.Option("auto", []),
            io.DynamicCombo.Option("by step", [high_steps]),
            io.DynamicCombo.Option("by boundary", [boundary]),
        ],
        tooltip="Which expert of Wan 2.2 runs which step. Without a second model it has no effect.",
    )


def read_overrides(
    schedule: dict, split: dict | None = None, cfg: float | None = None, solver: str | None = None
) -> Overrides:
    """What the dynamic widgets hold, as the core takes it."""
    split = split or {}
    return Overrides(
        steps=schedule.get("steps"),
        shift=schedule.get("shift"),
        denoising_list=read_numbers(
            schedule.get("denoising_steps"), "denoising steps", ", ".join(map(str, DISTILL_LIST))
        ),
        cfg=cfg or None,
        solver=None if solver == "auto" else solver,
        high_steps=split.get("high_steps"),
        boundary=split.get("boundary"),
    )


def read_numbers(text: str | None, what: str, example: str) -> Sequence[float] | None:
    """Numbers with commas between them; None for an empty text."""
    if not text or not text.strip():
        return None
    try:
        return [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError as error:
        raise RequestError(
            f"{what} {text!r} are not numbers with commas between them; use {example}"
        ) from error
