"""What a run took: a line on the node, and in the metadata of every file saved from it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..lightx2v_core.datatypes import SamplerPlan
from ..lightx2v_core.sampling.schedule import stage_names

FILE_KEY = "lightx2v"  # beside ComfyUI's own "workflow" and "prompt"
NEARLY_FULL = 0.97  # of the card


class Watch:
    """Seconds of each stage, those of its steps alone, and the most the card held meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.stages: list[float] = []
        self.steps: list[float] = []
        self._card = device if device.type == "cuda" else None
        if self._card is not None:
            torch.cuda.reset_peak_memory_stats(self._card)

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Around everything, loading the model included."""
        started = time.perf_counter()
        yield
        self.stages.append(time.perf_counter() - started)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.steps.append(time.perf_counter() - started)

    def describe(self, plan: SamplerPlan) -> str:
        """One line: stages, loading, seconds a step, peak."""
        names = stage_names(plan)
        stages = ", ".join(
            f"{names[expert]} {seconds:.1f} s"
            for (expert, _), seconds in zip(plan.stages(), self.stages, strict=True)
        )
        loading = sum(self.stages) - sum(self.steps)
        each = sum(self.steps) / plan.steps
        return f"done: {stages}, {loading:.1f} s of it loading; {each:.2f} s/step{self.peak()}"

    def peak(self) -> str:
        if self._card is None:
            return ""
        most = torch.cuda.max_memory_allocated(self._card)
        total = torch.cuda.get_device_properties(self._card).total_memory
        return describe_peak(most, total, sys.platform == "win32")


def describe_peak(most: int, total: int, windows: bool) -> str:
    """Of the card's memory, in bytes; on Windows a full card goes on in RAM and becomes slow."""
    line = f"; peak {most / 1e9:.2f} of {total / 1e9:.2f} GB ({most / total:.0%})"
    if windows and most > NEARLY_FULL * total:
        line += ": Windows moves what is too much into RAM, which is slow; use fewer frames"
    return line


def note_for_files(extra_pnginfo: dict | None, **facts: str) -> None:
    """Into what ComfyUI hands to all nodes of this run, and its save nodes write into their files.

    Nothing where the graph was posted without a workflow, or the node's result came from the cache.
    """
    if isinstance(extra_pnginfo, dict):
        extra_pnginfo[FILE_KEY] = {**extra_pnginfo.get(FILE_KEY, {}), **facts}
