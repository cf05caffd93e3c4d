"""Look at a family of demo files on a CPU, through the product itself, and let the judge score it.

`python -m training.quick` takes a minute or two. `--start-picture` writes a picture that the
image-to-video demo can begin with, and says what its clip shows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor

from lightx2v_core.assemble import Parts
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.presets import DEMO_FOLDER

from .captions import plain_prompt, stories
from .family import add_world, world_of
from .files import STUDENTS, TEXT, VAE
from .judge import faithful_share, judge
from .sheets import save_sheet
from .world import make_scene, render, sample_scenes
from .worlds import World

SEED = 70_002


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.quick", description=__doc__)
    parser.add_argument("--folder", type=Path, default=DEMO_FOLDER, help="where the demo files are")
    parser.add_argument("--clips", type=int, default=8, help="for each task")
    add_world(parser)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--sheet", type=Path, default=Path("out/quick.png"))
    parser.add_argument("--start-picture", type=Path, help="write this PNG and do nothing else")
    parser.add_argument("--scene", type=int, metavar="SEED", help="of it; none: the red circle")
    options = parser.parse_args(arguments)
    world = world_of(options.folder, options.world)
    if options.start_picture is not None:
        save_start_picture(options.start_picture, options.side, world, options.scene)
        return
    options.sheet.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Tensor] = {}
    for task in STUDENTS:
        size = VideoSize(options.side, options.side, options.frames)
        rows |= look(options.folder, task, options.clips, size, world)
    save_sheet(rows, options.sheet)
    print(f"see {options.sheet}")


def look(folder: Path, task: str, clips: int, size: VideoSize, world: World) -> dict[str, Tensor]:
    """Scores on the screen, clips under their prompts."""
    parts = Parts(folder / STUDENTS[task], folder / VAE, folder / TEXT)
    pipeline = Pipeline(parts, torch.device("cpu"))
    scenes = sample_scenes(clips, Generator().manual_seed(SEED), world, world.exam_split)
    truth = render(scenes, size.height, size.width, size.frames)
    prompts = [plain_prompt(story) for story in stories(scenes)]
    made, started = [], time.monotonic()
    for index, prompt in enumerate(prompts):
        image = truth[index, :, 0] if task == "i2v" else None
        result = pipeline.generate(GenerateRequest(prompt, image=image, size=size, seed=index))
        made.append(result.frames.permute(3, 0, 1, 2).float() / 127.5 - 1)  # FHWC -> CFHW
    pixels = torch.stack(made)
    scores = judge(pixels, scenes, world).scores()
    if task == "i2v":
        scores["first_frame"], scores["first_frame_psnr"] = faithful_share(pixels, truth[:, :, 0])
    words = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
    seconds = (time.monotonic() - started) / clips
    print(f"{task}: {words}; {seconds:.1f} s a clip", flush=True)
    return {f"{task}: {prompt}": clip for prompt, clip in zip(prompts, made, strict=True)}


def save_start_picture(path: Path, side: int, world: World, seed: int | None) -> None:
    """The first frame of a clip that no training saw, of a red circle that moves right without a
    seed; the prompt of the clip goes to the screen."""
    from PIL import Image

    scene = make_scene("red", "circle", "right")
    if seed is not None:
        scene = sample_scenes(1, Generator().manual_seed(seed), world, world.exam_split)
    picture = render(scene, side, side, 2)[0, :, 0]
    levels = ((picture + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(levels.contiguous().numpy()).save(path)
    print(plain_prompt(stories(scene)[0]))


if __name__ == "__main__":
    main()
