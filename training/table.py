"""The table of samplers: what the base reaches in 50 guided steps and what is left of it in four.

    python -m training.table --folder DIR --out OUT              500 prompts x 3 seeds, for a GPU
    python -m training.table --folder DIR --out OUT --quick      48 prompts x 1 seed, for a CPU
    python -m training.table --out OUT --misuse                  what the product warns of

Every row gets the same prompts and noise. Seconds are of the denoiser alone. Rows whose files are
missing are left out. Writes table.md, table.json, scores.png, bars.png and sheet.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import torch
from torch import Generator, Tensor

from lightx2v_core.presets import DEMO_FOLDER
from lightx2v_core.wan.vae import WanVae

from .context import Context
from .denoising import Denoiser, follow_plan
from .family import add_world, world_of
from .files import TEXT, VAE, find, read_vae, read_weights
from .judge import judge
from .measures import clip_features, clip_scores, first_frame_psnr
from .misuse import misuse_rows
from .progress import Journal, release_memory
from .questions import (
    Questions,
    RealClips,
    ask,
    real_clips,
    unseen_scenes,
    with_first_frames,
)
from .reporting import About, Made, report, summarise
from .run import set_kernels
from .samplers import Row, all_rows, load_denoisers, missing_files, one_step
from .sheets import save_sheet
from .sizes import DEMO, SMOKE, Sizes
from .text import TextStates, read_encoder
from .verdicts import write_verdicts
from .vocabulary import CaptionRows
from .worlds import Split, World

RENOISE_SEED = 70_006
QUICK_PROMPTS = 48
REAL_CLIPS, QUICK_REAL_CLIPS = 4000, 200  # rendered ones that stand for the world
GPU_CHUNK, CPU_CHUNK = 64, 1  # clips that are decoded and judged together
CPU_BATCH = 4  # clips a CPU's caches hold in the transformer
SHEET_CLIPS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What all rows share."""

    context: Context
    folder: Path
    vae: WanVae
    questions: dict[str, Questions]  # by task
    real: RealClips
    compiles: bool


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    rows = list(available_rows(options))
    world = world_of(options.folder, options.world)
    if options.split not in (None, "train") and not world.holds_out:
        parser.error(f"--split {options.split}: the {world.name} world holds nothing out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.quick:
        device = torch.device("cpu")
    options.workers = share_threads(device)
    if device.type == "cuda" or options.compile:
        set_kernels(device)
    prompts = options.prompts or (QUICK_PROMPTS if options.quick else 500)
    seeds = options.seeds or (1 if options.quick else 3)
    options.out.mkdir(parents=True, exist_ok=True)
    bench = prepare(options, device, (prompts, seeds))
    about = About(device_name(bench.context), words_for(prompts, world, options.split), seeds)
    print_estimate(bench, rows)
    results: list[tuple[Row, Made]] = []
    strips: dict[str, Tensor] = {}
    for row in rows:
        made, clips = run_row(bench, row, bench.questions[row.task])
        results.append((row, made))
        strips |= {f"{row.task} {row.name} ({i})": clip for i, clip in enumerate(clips)}
        # After every row, so that a run which is cut off leaves what it had.
        lines = summarise(results, bench.real)
        report(options.out, about, lines, bench.real.floors)
        if options.misuse and len(results) > 1:
            write_verdicts(options.out, about.device, results, bench.real)
        release_memory(device)
    save_sheet(strips, options.out / "sheet.png")
    print((options.out / "table.md").read_text("utf-8"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=DEMO_FOLDER, help="where the weights are")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="on the CPU, with wide intervals")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--seeds", type=int, help="noises of each prompt")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance of the base")
    parser.add_argument("--tasks", nargs="+", choices=("t2v", "i2v"), default=("t2v", "i2v"))
    parser.add_argument("--main-rows", action="store_true", help="leave out the settings")
    parser.add_argument("--misuse", action="store_true", help="rows of settings that are warned of")
    parser.add_argument("--only", nargs="+", help="those rows alone, by name")
    parser.add_argument("--side", type=int, help="of clips that are not as trained")
    parser.add_argument("--frames", type=int, help="of clips that are not as trained")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--batch", type=int, help="clips in the transformer together, all rows")
    add_world(parser, with_split=True)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, as of training.run")
    return parser


def share_threads(device: torch.device) -> int:
    """How many clips a CPU samples or decodes at once, each in one thread; see `Context.each`."""
    if device.type != "cpu":
        return 1
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    return workers


def available_rows(options: argparse.Namespace) -> list[Row]:
    """Those asked for whose files are there; the others by name on the screen."""
    rows = []
    wanted = misuse_rows() if options.misuse else all_rows(options.folder, options.cfg)
    for row in wanted:
        if row.task not in options.tasks or (options.main_rows and not row.is_main):
            continue
        if options.only and row.name not in options.only:
            continue
        if missing := missing_files(row, options.folder):
            print(f"left out: {row.task} {row.name}: no {', '.join(missing)} in {options.folder}")
        else:
            rows.append(row)
    if not rows:
        raise SystemExit(f"{options.folder} holds no model this table knows")
    return rows


def prepare(options: argparse.Namespace, device: torch.device, counts: tuple[int, int]) -> Bench:
    """Prompts, their states and first frames, and the rendered clips of the same captions."""
    sizes: Sizes = SMOKE if options.smoke else DEMO
    is_cpu = device.type == "cpu"
    sizes = replace(
        sizes,
        side=options.side or sizes.side,
        frames=options.frames or sizes.frames,
        chunk=CPU_CHUNK if is_cpu else GPU_CHUNK,
        teacher_batch=options.batch or (CPU_BATCH if is_cpu else sizes.teacher_batch),
    )
    world, journal = world_of(options.folder, options.world), Journal(options.out)
    context = Context(sizes, options.out, options.folder, device, 0, journal, world=world)
    context.workers = options.workers
    vae = read_vae(find(VAE, options.folder, DEMO_FOLDER)).to(device, context.dtype)
    text_path = find(TEXT, options.folder, DEMO_FOLDER)
    words = CaptionRows(read_weights(text_path)["spiece_model"].numpy().tobytes(), world)
    text = read_encoder(text_path).to(device).transformer
    scenes = unseen_scenes(counts[0], world, options.split or world.exam_split)
    questions = {"t2v": ask(context, scenes, counts[1], words, text)}
    if "i2v" in options.tasks:
        questions["i2v"] = with_first_frames(context, questions["t2v"], vae)
    least = QUICK_REAL_CLIPS if is_cpu else REAL_CLIPS
    real = real_clips(context, questions["t2v"], vae, least)
    return Bench(context, options.folder, vae, questions, real, options.compile)


@torch.no_grad()
def run_row(bench: Bench, row: Row, questions: Questions) -> tuple[Made, list[Tensor]]:
    """What the sampler made, measured clip by clip, and a few of the clips."""
    context, plan = bench.context, row.plan
    denoisers = load_denoisers(row, bench.folder, context.device, context.dtype, bench.compiles)
    parts = even_parts(len(questions), context.sizes.teacher_batch)
    for start, stop in {stop - start: (start, stop) for start, stop in parts}.values():
        warm_up(denoisers, row, inputs_of(context, questions, start, stop))

    def walk(part: tuple[int, int]) -> tuple[Tensor, float]:
        inputs = inputs_of(context, questions, *part)
        rng = Generator().manual_seed(RENOISE_SEED + part[0])
        started = clock(context.device)
        latent = follow_plan(row.reusing(denoisers), plan, *inputs, rng)
        return latent, clock(context.device) - started

    latents, seconds = zip(*context.each(walk, parts), strict=True)
    made, clips = measure(bench, torch.cat(latents), questions)
    made = replace(made, seconds=sum(seconds), plan=plan)
    print(
        f"{row.task} {row.name}: {100 * made.scores['all'].mean():.1f}, {made.seconds:.2f} s",
        flush=True,
    )
    return made, clips


Inputs = tuple[Tensor, tuple[TextStates, TextStates], Tensor | None]


def inputs_of(context: Context, questions: Questions, start: int, stop: int) -> Inputs:
    """Noise, states with and without words, and first frames of some clips."""
    prompt_rows = questions.prompt_rows(start, stop).to(context.device)
    texts = (questions.texts[0][prompt_rows], questions.texts[1][prompt_rows])
    image = questions.image_PCTHW
    noise = questions.noise_BCTHW[start:stop].to(context.device)
    return noise, texts, None if image is None else image[prompt_rows]


def warm_up(denoisers: list[Denoiser], row: Row, inputs: Inputs) -> None:
    """One step of each expert at this batch, so that no row pays for what is done once."""
    for denoiser in denoisers:
        follow_plan([denoiser], one_step(row.plan), *inputs, Generator())


def even_parts(count: int, most: int) -> list[tuple[int, int]]:
    """Bounds of as few parts as `most` allows, none more than one longer than another."""
    parts = -(-count // most)
    edges = [count * index // parts for index in range(parts + 1)]
    return list(pairwise(edges))


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(bench: Bench, latents: Tensor, questions: Questions) -> tuple[Made, list[Tensor]]:
    """Decode and judge some clips at a time; only the first few are kept."""
    context, step = bench.context, bench.context.sizes.chunk

    def look(start: int) -> tuple[dict[str, Tensor], Tensor, list[Tensor], list[Tensor]]:
        prompt_rows = questions.prompt_rows(start, start + step).to(context.device)
        pixels = context.decode(bench.vae, latents[start : start + step])
        first_frames = []
        if questions.image_PCTHW is not None:
            first_frames.append(first_frame_psnr(pixels, questions.first_PCHW[prompt_rows]))
        return (
            clip_scores(judge(pixels, questions.scenes[prompt_rows], context.world)),
            clip_features(pixels, context.world),
            first_frames,
            [clip.cpu() for clip in pixels[: max(0, SHEET_CLIPS - start)]],
        )

    seen = context.each(look, range(0, len(latents), step))
    scores, features, frames, shown = zip(*seen, strict=True)
    first_frames, clips = list(chain(*frames)), list(chain(*shown))
    by_prompt = (-1, questions.seeds)
    joined = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
    made = Made(
        scores={name: values.unflatten(0, by_prompt) for name, values in joined.items()},
        features_PSD=torch.cat(features).unflatten(0, by_prompt),
        first_frame_PS=torch.cat(first_frames).unflatten(0, by_prompt) if first_frames else None,
    )
    return made, clips


def print_estimate(bench: Bench, rows: list[Row]) -> None:
    """Times one forward and one decode and multiplies."""
    context, questions = bench.context, bench.questions[rows[0].task]
    some = questions.first(max(1, context.sizes.chunk // questions.seeds))
    row = replace(rows[0], overrides=replace(rows[0].overrides, steps=1, cfg=1.0), loras=())
    denoisers = load_denoisers(row, bench.folder, context.device, context.dtype, False)
    prompt_rows = some.prompt_rows(0, len(some)).to(context.device)
    texts = (some.texts[0][prompt_rows], some.texts[1][prompt_rows])
    image = None if some.image_PCTHW is None else some.image_PCTHW[prompt_rows]
    noise = some.noise_BCTHW.to(context.device)
    for _ in range(2):  # the second is timed
        started = clock(context.device)
        latent = follow_plan(denoisers, row.plan, noise, texts, image, Generator())
        forward = (clock(context.device) - started) / len(some)
    started = clock(context.device)
    measure(bench, latent, some)
    decode = (clock(context.device) - started) / len(some)
    clips = len(questions)
    total = clips * sum(one.forwards * forward + decode for one in rows) / context.workers
    print(
        f"{len(rows)} rows, {len(rows) * clips} clips, {device_name(context)}: "
        f"{1000 * forward:.1f} ms a forward and {1000 * decode:.0f} ms to decode and judge each, "
        f"about {total / 60:.1f} minutes",
        flush=True,
    )


def words_for(prompts: int, world: World, split: Split | None) -> str:
    """Such as "500 held-out prompts of the wide world"."""
    kind = {"train": "", "held-out": "held-out ", "all": "seen and held-out "}
    return f"{prompts} {kind[split or world.exam_split]}prompts of the {world.name} world"


def device_name(context: Context) -> str:
    if context.device.type == "cuda":
        return torch.cuda.get_device_name(context.device)
    return f"CPU, {context.workers} threads"


if __name__ == "__main__":
    main()
