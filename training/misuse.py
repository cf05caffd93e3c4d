"""Rows of the table that do to the distilled model what a warning of the product warns of.

The first row is the model as trained; every other is held against it on the same prompts and noise.
`--side` and `--frames` of the table ask the same of clips of another size.
"""

from __future__ import annotations

from dataclasses import replace

from lightx2v_core.presets import Overrides

from .samplers import BASE, DISTILL_LORA, EXPERT_LORAS, STUDENT, Row

# By the name of the warning that the product gives (lightx2v_core/envelope.py).
MISUSES: dict[str, dict[str, Overrides]] = {
    "cfg": {
        "CFG 2": Overrides(cfg=2.0),
        "CFG 3.5": Overrides(cfg=3.5),
    },
    "steps": {f"{steps} steps": Overrides(steps=steps) for steps in (1, 2, 3)},
    "shift": {f"shift {shift:g}": Overrides(shift=shift) for shift in (1.0, 3.0, 8.0, 12.0)},
    "list": {"list [999, 600, 300, 100]": Overrides(denoising_list=(999, 600, 300, 100))},
    # More steps than trained, and the other solver: is there anything to warn of?
    "none": {
        **{f"{steps} steps": Overrides(steps=steps) for steps in (8, 12)},
        "renoise": Overrides(solver="renoise"),
    },
}


# Of files that are not shipped, and of what is no setting of the plan.
OTHERS: dict[str, dict[str, Row]] = {
    "caching": {
        "EasyCache skips step 2": Row("", "t2v", STUDENT, Overrides(), reused=(1,)),
        "EasyCache skips steps 2 and 3": Row("", "t2v", STUDENT, Overrides(), reused=(1, 2)),
    },
    "not distilled": {"base, 4 steps": Row("", "t2v", BASE, Overrides())},
    "lora strength": {
        f"distill LoRA at {strength:g}": Row(
            "", "t2v", BASE, Overrides(), (DISTILL_LORA,), lora_strength=strength
        )
        for strength in (0.125, 0.4, 2.5)
    },
    "one expert": {
        f"the {name}-noise expert alone": Row("", "t2v", BASE, Overrides(), (lora,))
        for name, lora in zip(("high", "low"), EXPERT_LORAS, strict=True)
    },
}


def misuse_rows() -> list[Row]:
    rows = [Row("as trained", "t2v", STUDENT, Overrides())]
    for settings in MISUSES.values():
        rows += [
            Row(name, "t2v", STUDENT, overrides, is_main=False)
            for name, overrides in settings.items()
        ]
    for made in OTHERS.values():
        rows += [replace(row, name=name, is_main=False) for name, row in made.items()]
    return rows


def warning_of(row: str) -> str:
    """The warning that the product gives for a row; "none" where it gives none."""
    tables = (*MISUSES.items(), *OTHERS.items())
    return next((name for name, rows in tables if row in rows), "none")
