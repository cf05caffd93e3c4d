"""Stage `package`: the four files side by side, read as the product reads them, and scored."""

from __future__ import annotations

import json
import shutil

import torch
from torch import Tensor

from lightx2v_core.assemble import load_text_encoder, load_transformer, load_vae
from lightx2v_core.datatypes import VideoSize

from .context import Context
from .denoising import STUDENT_SIGMAS, Denoiser, path_sigmas
from .exam import load_judges, make_exam, note_scores, show_clips, sit_exam
from .family import METRICS
from .files import STUDENTS, TEACHERS, TEXT, VAE, find, read_transformer
from .progress import Clock
from .sheets import save_sheet

LIMIT_BYTES = 30_000_000


def package(context: Context, minutes: float) -> None:
    """Copies what an earlier command made; skips what the time does not allow."""
    clock = Clock(minutes)
    names = [VAE, TEXT, *STUDENTS.values()]
    sizes = {}
    for name in names:
        found = find(name, context.out, context.source)
        if found != context.out / name:
            shutil.copyfile(found, context.out / name)
        sizes[name] = (context.out / name).stat().st_size
    check_files(context)
    rows = {}
    for task in STUDENTS:
        if not clock.is_over:
            rows |= compare(context, task)
    if rows:
        save_sheet(rows, context.out / "sheet.png")
    context.scores["bytes"] = {**sizes, "all": sum(sizes.values()), "limit": LIMIT_BYTES}
    text = json.dumps({"world": context.world.name, **context.scores}, indent=1)
    (context.out / METRICS).write_text(text + "\n", "utf-8")
    context.journal.note("package", bytes=sum(sizes.values()), limit=LIMIT_BYTES)


@torch.no_grad()
def check_files(context: Context) -> None:
    """Each file through the product's loader."""
    load_vae(context.out / VAE)
    load_text_encoder(context.out / TEXT).encode(["a red circle"])
    size = VideoSize(context.sizes.side, context.sizes.side, context.sizes.frames)
    for task, name in STUDENTS.items():
        loaded = load_transformer(context.out / name)
        channels = loaded.model.config.in_dim
        x = torch.zeros(size.latent_shape(channels))
        text = torch.zeros(1, 512, context.sizes.text_dim)
        velocity = loaded.model(x, torch.tensor([937.5]), text)
        context.journal.note(f"file {task}", summary=loaded.summary, out=str(tuple(velocity.shape)))


@torch.no_grad()
def compare(context: Context, task: str) -> dict[str, Tensor]:
    """Teacher in many steps, teacher in four, student in four, on the same prompts and noise."""
    vae, text = load_judges(context)
    exam = make_exam(context, task, context.sizes.exam_clips, vae, text)
    steps = context.sizes.teacher_steps
    rows = (
        (TEACHERS[task], f"teacher, {steps} steps", path_sigmas(steps), context.cfg),
        (TEACHERS[task], "teacher, 4 steps", STUDENT_SIGMAS, 1.0),
        (STUDENTS[task], "student, 4 steps", STUDENT_SIGMAS, 1.0),
    )
    clips = {}
    for file, name, sigmas, cfg in rows:
        path = find(file, context.out, context.source)
        model = read_transformer(path, context.sizes, task == "i2v").to(context.device).eval()
        denoiser = Denoiser(model, context.dtype)
        scores, pixels = sit_exam(context, exam, denoiser, vae, sigmas, cfg)
        note_scores(context, f"{task} {name}", scores)
        clips[name] = pixels
    return show_clips(context, task, exam, clips, f"sheet_{task}.png")
