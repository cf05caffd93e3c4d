"""Nothing grows: many runs that differ leave as many tensors and as much RAM as one."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.memory import main as benchmark
from benchmarks.memory import rss_anon
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.memory import ram
from lightx2v_core.memory.plan import WORKSPACE_BYTES
from lightx2v_core.pipeline import GenerateRequest, Pipeline

MB = 2**20


def census() -> int:
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)  # isinstance would ask a metaclass a million times
    return sum(type(thing) in kinds for thing in gc.get_objects())


def anonymous() -> int:
    ram.trim()
    return rss_anon()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_ten_runs_with_other_words_seeds_lora_strengths_and_sizes_leave_ram_flat(parts, tmp_path):
    """Streamed, with a LoRA. Bounds: as many tensors as after run 2, RAM within 16 MB of then."""
    made = Pipeline(parts, torch.device("cpu"))
    expert, sizes = made.experts[0], (VideoSize(16, 16, 5), VideoSize(32, 16, 5))
    width = expert.model.config.dim
    pair = {"lora_up.weight": torch.ones(width, 2) / 99, "lora_down.weight": torch.ones(2, width)}
    lora = tmp_path / "style.safetensors"
    save_file({f"diffusion_model.blocks.0.self_attn.q.{k}": v for k, v in pair.items()}, lora)
    made.vram_bytes = (
        WORKSPACE_BYTES + made.turns.activations(expert, sizes[1]) + expert.residency.card_bytes(1)
    )
    request = GenerateRequest("a red circle")
    tensors, memory, frames = [], [], []

    for run in range(10):
        made.set_loras([(lora, 0.1 * run)])
        changed = replace(request, prompt=f"{run} circles", size=sizes[run % 2], seed=run)
        frames.append(made.generate(changed).frames.float().mean())
        tensors.append(census() - len(frames))
        memory.append(anonymous())

    assert expert.residency.device is None and len(set(map(float, frames))) > 1
    assert max(tensors[2:]) <= tensors[1], tensors
    assert max(memory[2:]) - memory[1] < 16 * MB, [m // MB for m in memory]


def test_the_benchmark_runs_small_on_a_cpu_and_its_line_says_what_happened(tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    tiny = ["--tiny", "--device", "cpu", "--width", "64", "--height", "64", "--frames", "5"]
    budget = ["--budget-gb", "0.2785", "--scheme", "fp8", "--out", str(out)]

    code = benchmark([*tiny, *budget, "--folder", str(tmp_path)])

    line = json.loads(out.read_text("utf-8"))
    assert code == 0 and json.loads(capsys.readouterr().out) == line
    assert line["equal"] is True
    assert "resident 6/6 blocks" in line["resident"]["line"]
    assert "resident 6/6 blocks" not in line["streamed"]["line"], line["streamed"]["line"]
    assert line["streamed"]["ram_peak"] > 0 or os.name == "nt"
    assert list(tmp_path.iterdir()) == [out], "the model file is gone"
