"""Samples for prompts no training saw, scored by the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.wan.vae import WanVae

from .bank import caption_rows, condition_mask, picture_latents, with_mask
from .captions import plain_prompt, stories
from .context import Context
from .denoising import STUDENT_SIGMAS, Denoiser, generate, path_sigmas
from .files import TEACHERS, TEXT, find, read_transformer
from .judge import faithful_share, judge
from .sheets import save_sheet
from .text import TextStates, empty_rows, encode_rows, read_encoder
from .world import Scenes, sample_scenes

EXAM_SEED, VALIDATION_SEED = 70_001, 70_011
TRIED_CFG = (1.0, 2.0, 3.0, 4.0)
QUICK_CLIPS = 64
SHEET_CLIPS = 6


@dataclass(frozen=True, slots=True, eq=False)
class Exam:
    """Questions: scenes, their prompts as states, their first frames, one noise for each."""

    scenes: Scenes
    prompts: list[str]
    texts: tuple[TextStates, TextStates]
    image_BCTHW: Tensor | None
    pixels_BCFHW: Tensor
    noise_BCTHW: Tensor

    def __getitem__(self, rows: slice) -> Exam:
        return Exam(
            self.scenes[rows],
            self.prompts[rows],
            (self.texts[0][rows], self.texts[1][rows]),
            None if self.image_BCTHW is None else self.image_BCTHW[rows],
            self.pixels_BCFHW[rows],
            self.noise_BCTHW[rows],
        )


@torch.no_grad()
def make_exam(
    context: Context,
    task: str,
    count: int,
    vae: WanVae,
    text: nn.Module,
    seed: int = EXAM_SEED,
) -> Exam:
    """The same questions every time it is called with the same count.

    With another seed they are for choosing among models, so nothing held out is asked.
    """
    world = context.world
    split = world.exam_split if seed == EXAM_SEED else "train"
    scenes = sample_scenes(count, Generator().manual_seed(seed), world, split).to(context.device)
    pixels = context.render(scenes)
    prompts = [plain_prompt(story) for story in stories(scenes)]
    ids = caption_rows(context)(prompts).to(context.device)
    texts = (
        encode_rows(text, ids),
        encode_rows(text, empty_rows(count, context.device, context.world)),
    )
    image = None
    if task == "i2v":
        picture = picture_latents(context, vae, pixels.to(context.dtype))
        image = with_mask(picture, condition_mask(context))
    noise = torch.randn(count, *context.sizes.latent_shape, generator=Generator().manual_seed(7))
    return Exam(scenes, prompts, texts, image, pixels, noise.to(context.device))


@torch.no_grad()
def sit_exam(
    context: Context,
    exam: Exam,
    denoiser: Denoiser,
    vae: WanVae,
    sigmas: Sequence[float] = STUDENT_SIGMAS,
    cfg: float = 1.0,
) -> tuple[dict[str, float], Tensor]:
    """(scores in percent, clips BCFHW). `std` is that of the latents: 1 in the world itself."""
    clips, deviations = [], []
    for start in range(0, len(exam.prompts), context.sizes.teacher_batch):
        part = exam[start : start + context.sizes.teacher_batch]
        latent = generate(denoiser, part.noise_BCTHW, part.texts, part.image_BCTHW, sigmas, cfg)
        clips.append(context.decode(vae, latent))
        deviations.append(float(latent.std()))
    pixels = torch.cat(clips)
    scores = judge(pixels, exam.scenes, context.world, 2 * context.sizes.chunk).scores()
    scores["std"] = sum(deviations) / len(deviations)
    if exam.image_BCTHW is not None:
        share, decibels = faithful_share(pixels, exam.pixels_BCFHW[:, :, 0])
        scores |= {"first_frame": share, "first_frame_psnr": decibels}
    return scores, pixels


def load_judges(context: Context) -> tuple[WanVae, nn.Module]:
    """The VAE and the text encoder as they are on disk."""
    vae = context.load_vae()
    text = read_encoder(find(TEXT, context.out, context.source)).to(context.device)
    return vae, text.transformer


@torch.no_grad()
def examine_teacher(context: Context, task: str, count: int = QUICK_CLIPS) -> float:
    """Many steps at several guidances, then the student's four without; the best guidance."""
    path = find(TEACHERS[task], context.out, context.source)
    model = read_transformer(path, context.sizes, task == "i2v").to(context.device)
    denoiser = Denoiser(model.eval(), context.dtype)
    vae, text = load_judges(context)
    exam = make_exam(context, task, min(count, context.sizes.exam_clips), vae, text)
    many = path_sigmas(context.sizes.teacher_steps)
    clips, best = {}, (-1.0, context.cfg)
    steps = context.sizes.teacher_steps
    runs = [(f"teacher, {steps} steps, cfg {cfg:g}", many, cfg) for cfg in TRIED_CFG]
    runs.append(("teacher, 4 steps", STUDENT_SIGMAS, 1.0))
    for name, sigmas, cfg in runs:
        scores, clips[name] = sit_exam(context, exam, denoiser, vae, sigmas, cfg)
        note_scores(context, f"{task} {name}", scores)
        if sigmas is many and cfg > 1.0:
            best = max(best, (scores["all"], cfg))
    show_clips(context, task, exam, clips, f"sheet_teacher_{task}.png")
    return best[1]


def note_scores(context: Context, name: str, scores: dict[str, float]) -> None:
    context.scores[name] = {key: round(value, 2) for key, value in scores.items()}
    context.journal.note(name, **context.scores[name])


def show_clips(
    context: Context, task: str, exam: Exam, clips: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Some clips of each sampler below the rendered truth, as a sheet and as its rows."""
    rows = {}
    for index in range(min(SHEET_CLIPS, len(exam.prompts))):
        rows[f"{task} truth: {exam.prompts[index]}"] = exam.pixels_BCFHW[index]
        for sampler, pixels in clips.items():
            rows[f"{task} {sampler} ({index})"] = pixels[index]
    save_sheet(rows, context.out / name)
    return rows
