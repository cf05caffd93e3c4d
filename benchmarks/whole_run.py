"""Whole videos under budgets of card memory and RAM, beside the same with everything resident.

    python -m benchmarks.whole_run --folder DIR --vram-gb 6 8 12 16 24 --out lines.jsonl
    python -m benchmarks.whole_run --folder DIR --keep --two-experts --write-only
    python -m benchmarks.whole_run --folder DIR --keep --two-experts --vram-gb 8 --ram-gb 16

Prompt and picture to frames on the host through the pipeline: UMT5-XXL, CLIP (not with
`--two-experts`, which is Wan 2.2's pair), VAE encode, four steps, VAE decode; files of the real
shapes with random weights, written to `--folder` first. One process makes the resident videos and
those under each budget. A JSON line after each video tells seconds of each stage, the ratio of a
step to resident, the peak that PyTorch had allocated in any video so far, page-locked bytes, and
whether the frames are the same; the last line of a budget counts. Each budget begins with nothing
on the card: its first video places weights and page-locks what streams, and what is reported from
the second on (`settled`) is what every later video takes. With `--cap` PyTorch gets no more than
the budget, gaps included.

RAM is looked at every 50 ms from the loading on: RssAnon and what PyTorch's page-locked allocator
holds. With `--ram-gb` the budgets come first, and lines without resident are written as soon as
there is a video. The limit is a control group where one can be made, else what the planner is told
(`generate --ram-gb`); pages of mapped files, which the system may drop, count in the first alone.
Call it with `--write-only` before: writing takes RAM of its own. `--tiny` tries it, on a CPU too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path

import torch

from lightx2v_core.device import select_device
from lightx2v_core.memory.ram import limit_to
from lightx2v_core.pipeline import Pipeline, Result

from .end_to_end import TINY_FAMILY, make
from .forward import read_size
from .lines import Line, about, add_out, cap, emit, reset_peak
from .memory import AnonymousMemory
from .random_parts import FAMILY, write_experts, write_parts

# A group of our own below the root of either version, and the file that takes the limit.
GROUPS = (
    (Path("/sys/fs/cgroup/lightx2v"), "memory.max"),
    (Path("/sys/fs/cgroup/memory/lightx2v"), "memory.limit_in_bytes"),
)


@dataclass(frozen=True, eq=False)
class Video:
    """One of them: which prompt and picture it was made from, and what it took."""

    number: int
    seconds: float
    result: Result


@dataclass(frozen=True, eq=False)
class Videos:
    """Made one after another under one budget so far; the first `untimed` warm up, and are told
    as long as there is no other."""

    all: list[Video]
    untimed: int
    reserved: int
    ram_peak: int
    pinned: int

    @property
    def is_settled(self) -> bool:
        return len(self.all) > self.untimed

    @property
    def timed(self) -> list[Video]:
        return self.all[self.untimed :] or self.all[-1:]

    @property
    def stages(self) -> dict[str, float]:
        timed = [video.result.seconds for video in self.timed]
        return {k: round(statistics.median(s[k] for s in timed), 4) for k in timed[0]}

    @property
    def seconds(self) -> float:
        return statistics.median(video.seconds for video in self.timed)

    @property
    def step_seconds(self) -> float:
        """Sampling for each step, with placing the weights."""
        return self.stages["sampling"] / self.all[0].result.plan.steps

    @property
    def peak(self) -> int:
        return max(video.result.peak_bytes for video in self.all)

    def told(self) -> Line:
        return {
            "seconds": round(self.seconds, 4),
            "seconds_per_step": round(self.step_seconds, 4),
            "stages": self.stages,
            "first_video_seconds": round(self.all[0].seconds, 3),
            "videos": [
                {"seconds": round(video.seconds, 3), "peak": video.result.peak_bytes}
                | {name: round(spent, 3) for name, spent in video.result.seconds.items()}
                for video in self.all
            ],
            "peak_allocated": self.peak,
            "peak_reserved": self.reserved,
            "ram_peak": self.ram_peak,
            "pinned": self.pinned,
            # Of the last video that placed anything.
            "placed": next((list(v.result.memory) for v in self.all[::-1] if v.result.memory), []),
        }


class Course:
    """Videos of one pipeline, each of another prompt and picture than the one before, since what
    did not change is not encoded again."""

    def __init__(
        self, pipeline: Pipeline, options: argparse.Namespace, memory: AnonymousMemory
    ) -> None:
        self._pipeline, self._options, self._memory = pipeline, options, memory
        self._turns = count()

    @property
    def samples(self) -> int:
        return self._memory.samples

    def begin_again(self) -> None:
        """The next videos are of the first prompts and pictures once more."""
        self._turns = count()

    def run(self, budget_gb: float | None, untimed: int, timed: int) -> Iterator[Videos]:
        """All so far after each video."""
        pipeline, reserved, videos = self._pipeline, 0, []
        pipeline.turns.release(0)
        pipeline.vram_bytes = None if budget_gb is None else int(budget_gb * 1e9)
        reset_peak(pipeline.device)
        cap(pipeline.device, pipeline.vram_bytes if self._options.cap else None)
        for _ in range(untimed + timed):
            number = next(self._turns) % 2
            video = Video(number, *make(pipeline, self._options.size, number))
            videos.append(video)
            if pipeline.device.type == "cuda":
                reserved = max(reserved, torch.cuda.max_memory_reserved(pipeline.device))
            told = {name: round(spent, 2) for name, spent in video.result.seconds.items()}
            under = "resident" if budget_gb is None else f"{budget_gb:g} GB"
            print(f"{under}: {video.seconds:.2f} s {told}", file=sys.stderr, flush=True)
            ram_peak, pinned = self._memory.peak, pipeline.pinned_bytes
            yield Videos(list(videos), untimed, reserved, ram_peak, pinned)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.keep and options.folder is None:
        parser.error("--keep needs the --folder that is kept")
    device = select_device(options.device)
    family = TINY_FAMILY if options.tiny else FAMILY
    if options.keep:
        options.folder.mkdir(parents=True, exist_ok=True)
    with folder_for(options) as folder:
        write = write_experts if options.two_experts else write_parts
        parts = write(Path(folder), family, options.scheme, device, sync=False)
        if options.write_only:
            return 0
        held_by = None
        if options.ram_gb is not None:
            named = (getattr(parts, field.name) for field in fields(parts))
            if not options.warm:
                forget_pages(path for path in named if path is not None)
            held_by = hold_ram(int(options.ram_gb * 1e9), GROUPS if options.group else ())
        try:
            with AnonymousMemory() as memory:
                course = Course(Pipeline(parts, device, options.attention), options, memory)
                run = beside_resident if held_by is None else within_ram
                lines = run(course, options)
                for line in lines:
                    emit([line | {"ram_held_by": held_by} | about(device)], options.out)
        finally:
            limit_to(None)
    return 0


def folder_for(options: argparse.Namespace) -> AbstractContextManager[Path | str]:
    """The one that is kept, or one for a while."""
    if options.keep:
        return nullcontext(options.folder)
    return tempfile.TemporaryDirectory(dir=options.folder, prefix="lightx2v-")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--folder", type=Path, help="where the files are written for a while")
    add("--keep", action="store_true", help="leave the files in --folder, and take what is there")
    add("--write-only", action="store_true", help="write the files and run nothing")
    add("--scheme", choices=("bf16", "fp8", "int8"), default="fp8")
    add("--two-experts", action="store_true", help="Wan 2.2's, two steps each")
    add("--attention", default="auto")
    add("--size", type=read_size, default=read_size("480p"), help="480p, 720p or like 832x480x81")
    add("--vram-gb", type=float, nargs="+", default=[8.0])
    add(
        "--cap",
        action="store_true",
        help="PyTorch gets no more of the card than the budget, gaps included",
    )
    add("--ram-gb", type=float, help="at most this much RAM, page-locked included")
    add("--warm", action="store_true", help="with --ram-gb: keep what the system has of the files")
    add("--no-group", dest="group", action="store_false", help="let the planner hold the RAM")
    add("--videos", type=int, default=1, help="that are timed under each budget, after one")
    add("--device", default="auto")
    add("--tiny", action="store_true", help="small models, to try the script")
    add_out(parser)
    return parser


def beside_resident(course: Course, options: argparse.Namespace) -> Iterator[Line]:
    """Two resident videos warm up."""
    *_, resident = course.run(None, 2, options.videos)
    for budget in options.vram_gb:
        for videos in course.run(budget, 1, options.videos):
            yield line_of(options, budget, videos, resident)


def within_ram(course: Course, options: argparse.Namespace) -> Iterator[Line]:
    """The budgets first, while RAM is short, each told at once; then the limit is lifted, and
    they are told again beside resident."""
    told: dict[float, tuple[Videos, Line]] = {}
    for budget in options.vram_gb:
        for videos in course.run(budget, 1, options.videos):
            kept: Line = {"ram_gb": options.ram_gb, "ram_samples": course.samples}
            kept["cold_files"] = not options.warm
            kept["within_ram"] = videos.ram_peak <= options.ram_gb * 1e9
            told[budget] = videos, kept
            yield line_of(options, budget, videos, None) | kept
    limit_to(None)
    course.begin_again()
    *_, resident = course.run(None, 1, 1)
    for budget, (videos, kept) in told.items():
        yield line_of(options, budget, videos, resident) | kept


def line_of(
    options: argparse.Namespace, budget_gb: float, videos: Videos, resident: Videos | None
) -> Line:
    size, experts = options.size, 2 if options.two_experts else 1
    line: Line = {
        "case": "whole_run",
        "scheme": options.scheme,
        "experts": experts,
        "attention": options.attention,
        "size": [size.width, size.height, size.frames],
        "capped": options.cap,
        "budget_gb": budget_gb,
        "streamed": videos.told(),
        "within_budget": videos.peak <= budget_gb * 1e9,
        "settled": videos.is_settled,
    }
    if resident is None:
        return line
    expected = {video.number: video.result.frames for video in resident.all}
    return line | {
        "resident": resident.told(),
        "ratio": videos.step_seconds / resident.step_seconds,
        "whole_ratio": videos.seconds / resident.seconds,
        "equal": all(torch.equal(v.result.frames, expected[v.number]) for v in videos.all),
        "most_different": max(
            int((v.result.frames.int() - expected[v.number].int()).abs().max()) for v in videos.all
        ),
    }


def forget_pages(files: Iterable[Path]) -> None:
    """What the system keeps of `files` in RAM, so that they are read from the disk again."""
    for path in files if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hold_ram(nbytes: int, groups: Sequence[tuple[Path, str]]) -> str:
    """Who holds this process to `nbytes` from now on. The planner is told in each case: a group
    does not count what the process had before."""
    limit_to(nbytes)
    for group, limit in groups:
        try:
            group.mkdir(exist_ok=True)
            if not (group / "cgroup.procs").exists():  # an ordinary folder
                group.rmdir()
                continue
            (group / limit).write_text(str(nbytes))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            print(f"{group}: {error}", file=sys.stderr)
        else:
            return f"control group, {limit}"
    return "planner"


if __name__ == "__main__":
    raise SystemExit(main())
