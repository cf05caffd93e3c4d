"""The same video whatever ComfyUI is started with, and nothing that grows; registered by
inprocess_memory.

`--cpu` shuts out `--lowvram` and `--novram` (the three exclude each other), and turns VRAM states
off. So the states are set by hand here, on a card that is faked (SmallCard); the caches are real.
"""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import os

from inside import Heard, check

import comfy.model_management as mm
import torch
from graph_runs import Queue, anonymous, image_to_video, text_to_video
from small_card import SmallCard
from small_models import FILES

EXPERT_BYTES = sum(t.nbytes for t in FILES["a14b"].values())
RUNS = int(os.environ.get("LIGHTX2V_RUNS", "5"))


STATES = {"LOW_VRAM": 0.7, "NO_VRAM": 2.0}  # room for so many experts


def loads(heard: Heard) -> int:
    """How often LoadModel ran."""
    return sum("memory: ours" in line for line in heard.lines)


@check
def low_and_no_vram_give_the_same_video_bit_for_bit() -> str:
    whole = Queue().run(image_to_video())
    held = {}
    for state, room in STATES.items():
        with SmallCard(room * EXPERT_BYTES, mm.VRAMState[state]), Heard() as heard:
            assert torch.equal(Queue().run(image_to_video()), whole), state
        held[state] = [
            line.partition("resident ")[2][:3] for line in heard.lines if "HostWan: res" in line
        ]
    assert held["LOW_VRAM"] == held["NO_VRAM"] == ["0/2", "0/2"], held
    return str(held)


@check
def without_a_cache_every_run_loads_again_and_gives_the_same_video() -> None:
    cached, bare = Queue(), Queue("NONE")
    with Heard() as heard:
        whole = cached.run(text_to_video(strength=0.7))
        assert loads(heard) == 1
        again = [bare.run(text_to_video(strength=0.7)) for _ in range(2)]
    assert loads(heard) == 3
    assert all(torch.equal(frames, whole) for frames in again)


@check
def comfyuis_own_memory_gives_the_same_video_under_every_state() -> str:
    stock = Queue().run(text_to_video(strength=0.7, memory="comfyui"))
    error = float((stock - Queue().run(text_to_video(strength=0.7))).abs().max())
    assert error < 1e-4, error
    for state, room in STATES.items():
        with SmallCard(room * EXPERT_BYTES, mm.VRAMState[state]):
            frames = Queue().run(text_to_video(strength=0.7, memory="comfyui"))
            assert torch.equal(frames, stock), state
    return f"{error:.1e}"


@check
def runs_that_differ_in_everything_leave_ram_flat_and_load_nothing_again() -> str:
    """LIGHTX2V_RUNS=20 makes more of them. Within 2 % of run 2; after /free, of the first /free."""
    queue = Queue()
    queue.run(text_to_video(strength=0.5))
    queue.free()
    baseline, memory, seen = anonymous(), [], set()
    with Heard() as heard:
        for run in range(RUNS):
            size = {"width": 32 + 16 * (run % 3), "height": 32, "frames": 9 - 4 * (run % 2)}
            graph = text_to_video(f"{run} circles", run, 0.1 * run, size)
            seen.add(float(queue.run(graph).mean()))
            memory.append(anonymous())
    assert len(seen) == RUNS
    assert loads(heard) == 1, heard.lines
    growth = max(memory[2:]) / memory[1] - 1
    assert growth < 0.02, [m >> 20 for m in memory]
    queue.free()
    left = anonymous() / baseline - 1
    assert left < 0.02, (left, baseline)
    return f"{RUNS} runs: {memory[1] >> 20} MB, growth {growth:.2%}; after /free {left:.2%}"
