"""The rows of the table: which model, with which LoRAs, along which of the product's plans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lightx2v_core.assemble import load_transformer
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.datatypes import SamplerPlan
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.presets import DEMO_FILES, PRESETS, Overrides, make_plan

from .denoising import Denoiser
from .text import TextStates

BASE, STUDENT = "base", "student"
# What each is called on disk, as training writes it or as it is shipped; the first found wins.
FILES = {
    (BASE, "t2v"): ("base_t2v.safetensors", "teacher_t2v.safetensors", DEMO_FILES["base"]),
    (BASE, "i2v"): ("base_i2v.safetensors", "teacher_i2v.safetensors"),
    (STUDENT, "t2v"): ("demo_t2v.safetensors",),
    (STUDENT, "i2v"): ("demo_i2v.safetensors",),
}
DISTILL_LORA = "demo_distill_lora.safetensors"
SHIPPED_AS = {DISTILL_LORA: DEMO_FILES["lora"]}
EXPERT_LORAS = ("demo_high_noise_lora.safetensors", "demo_low_noise_lora.safetensors")
BOUNDARY = 0.9  # sigma from which the high-noise expert works
BASE_STEPS = 50
LATE_LIST = (999, 750, 500, 250)


@dataclass(frozen=True, slots=True)
class Row:
    """One sampler. `loras` are of one model, or one each of two experts."""

    name: str
    task: str
    model: str  # BASE or STUDENT
    overrides: Overrides
    loras: tuple[str, ...] = ()
    is_main: bool = True  # the others show what a setting does to the distilled model
    lora_strength: float = 1.0
    reused: tuple[int, ...] = ()  # steps that a cache of steps would skip

    @property
    def experts(self) -> int:
        return max(1, len(self.loras))

    @property
    def plan(self) -> SamplerPlan:
        return make_plan(PRESETS["demo-4step"], self.overrides, self.experts)

    def reusing(self, denoisers: list[Denoiser]) -> list[Denoiser]:
        """For one walk along the plan, since a cache remembers the step before."""
        return [Reusing(one, self.reused) for one in denoisers] if self.reused else denoisers

    @property
    def forwards(self) -> int:
        """Clips that go through the transformer for each one made."""
        return self.plan.steps * (1 if self.plan.cfg == 1.0 else 2)


def all_rows(folder: Path, cfg: float) -> list[Row]:
    """Every sampler of the table, the first of each task being what the others are held against."""
    four = Overrides()
    experts_task = _task_of(folder / EXPERT_LORAS[0])
    rows = []
    for task in ("t2v", "i2v"):
        many = Overrides(steps=BASE_STEPS, cfg=cfg)
        rows += [
            Row(f"base, {BASE_STEPS} steps, CFG {cfg:g}", task, BASE, many),
            Row("base, 4 steps", task, BASE, four),
            Row("distilled, 4 steps", task, STUDENT, four),
        ]
        if task == "t2v":
            rows.append(Row("base + distill LoRA, 4 steps", task, BASE, four, (DISTILL_LORA,)))
        if task == experts_task:
            two = Overrides(boundary=BOUNDARY)
            rows.append(Row("base + two expert LoRAs, 4 steps", task, BASE, two, EXPERT_LORAS))
    changes = {
        "renoise, 4 steps": Overrides(solver="renoise"),
        f"list {list(LATE_LIST)}": Overrides(denoising_list=LATE_LIST),
        "shift 1, 4 steps": Overrides(shift=1.0),
        "shift 8, 4 steps": Overrides(shift=8.0),
        "CFG 3.5, 4 steps": Overrides(cfg=3.5),
        **{f"{steps} steps": Overrides(steps=steps) for steps in (2, 3, 8)},
    }
    rows += [
        Row(f"distilled, {name}", "t2v", STUDENT, overrides, is_main=False)
        for name, overrides in changes.items()
    ]
    return rows


def _task_of(path: Path) -> str:
    """What an expert's LoRA says it is for; image to video if it says nothing."""
    if not path.is_file():
        return "i2v"
    return open_checkpoint(path).metadata.get("lightx2v.task", "i2v")


def model_path(row: Row, folder: Path) -> Path | None:
    names = FILES[row.model, row.task]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def lora_path(name: str, folder: Path) -> Path:
    shipped = folder / SHIPPED_AS.get(name, name)
    return shipped if shipped.is_file() else folder / name


def missing_files(row: Row, folder: Path) -> list[str]:
    """What `folder` lacks for this row."""
    missing = [name for name in row.loras if not lora_path(name, folder).is_file()]
    if model_path(row, folder) is None:
        missing.insert(0, " or ".join(FILES[row.model, row.task]))
    return missing


def load_denoisers(
    row: Row, folder: Path, device: torch.device, dtype: torch.dtype, compiles: bool
) -> list[Denoiser]:
    """One, or an expert each, LoRAs put on by the product's own code."""
    path = model_path(row, folder)
    if path is None:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing_files(row, folder))}")
    denoisers = []
    for index in range(row.experts):
        loaded = load_transformer(path, dtype, device=device)
        if row.loras:
            (report,) = apply_loras(
                loaded.model, [(read_lora(lora_path(row.loras[index], folder)), row.lora_strength)]
            )
            print(f"  {report.describe()}", flush=True)
            if report.failed:
                raise SystemExit(f"{row.name}: part of {report.name} finds no place in {path.name}")
        loaded.residency.place(device)
        made = Denoiser(loaded.model, dtype, compiles)
        denoisers.append(made)
    return denoisers


class Reusing(Denoiser):
    """What EasyCache does to a step it skips: the input plus the last step's output minus its
    input. https://arxiv.org/abs/2507.02860"""

    def __init__(self, real: Denoiser, reused: tuple[int, ...]) -> None:
        self._real, self._reused, self._difference = real, reused, Tensor()
        self._last_sigma, self._step = 0.0, 0

    def guided(
        self,
        x_BCTHW: Tensor,
        sigma_B: Tensor,
        texts: tuple[TextStates, TextStates],
        image_BCTHW: Tensor | None,
        cfg: float,
    ) -> Tensor:
        sigma = float(sigma_B[0])
        self._step = 0 if sigma >= self._last_sigma else self._step + 1
        self._last_sigma = sigma
        if self._step in self._reused:
            return x_BCTHW + self._difference
        velocity = self._real.guided(x_BCTHW, sigma_B, texts, image_BCTHW, cfg)
        self._difference = velocity - x_BCTHW
        return velocity


def one_step(plan: SamplerPlan) -> SamplerPlan:
    """A plan with the same shapes of work, for warming up."""
    return replace(plan, sigmas=(plan.sigmas[0], 0.0), experts=plan.experts[:1])
