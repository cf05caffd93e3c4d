"""Two experts where RAM is short, inside a real ComfyUI; registered by inprocess_memory."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

from dataclasses import replace

from inside import WORK, check, fill, pack

import torch
from graph_runs import Queue, anonymous, image_to_video
from small_files import write
from small_models import VARIANTS, config_of, distill, image_cond, ours, wan_model


@check
def of_two_experts_the_first_leaves_ram_though_the_hosts_cache_holds_it() -> str:
    """bf16 files, cast to float32 on a CPU: their blocks lie in RAM. Measured before each step."""
    config = replace(VARIANTS["a14b"], dim=512, ffn_dim=1536, num_layers=4)
    assert isinstance(config, config_of)
    weights = {k: v.bfloat16() for k, v in fill(wan_model(config)).state_dict().items()}
    for noise in ("high", "low"):
        write(WORK / f"models/diffusion_models/large_{noise}_noise_wan2.2.safetensors", weights)
    del weights
    denoise, bridge = pack("nodes.denoise"), pack("nodes.bridge")
    first, second = (ours(f"large_{noise}_noise_wan2.2") for noise in ("high", "low"))
    engine = first.model.engine
    size, rss = sum(engine.block_bytes), []
    forward = bridge.HostTransformer.forward

    def measured(self: torch.nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        rss.append(anonymous())
        return forward(self, *args, **kwargs)

    bridge.HostTransformer.forward = measured
    is_short, denoise.is_ram_short = denoise.is_ram_short, lambda _bytes: True
    try:
        frames = [
            distill(first, image_cond(), model_low_noise=second)[0]["samples"] for _ in range(2)
        ]
    finally:
        denoise.is_ram_short, bridge.HostTransformer.forward = is_short, forward
    assert torch.equal(*frames)
    high, low = rss[:2], rss[2:4]
    left = 1 - (max(high) - min(low)) / size
    assert left < 0.01, (left, [r >> 20 for r in rss])
    assert engine.pinned_bytes == 0 and engine.loaded_bytes == 0
    assert max(rss[4:6]) - max(high) < 0.01 * size, "it came back, once"
    return f"{left:.2%} of {size / 1e6:.0f} MB left; MB at each step {[r >> 20 for r in rss]}"


@check
def where_both_experts_fit_both_stay() -> None:
    queue = Queue()
    denoise = pack("nodes.denoise")
    is_short, denoise.is_ram_short = denoise.is_ram_short, lambda _bytes: False
    try:
        queue.run(image_to_video())
    finally:
        denoise.is_ram_short = is_short
    high = "HostWan"
    loaded = [e.model for e in pack("nodes.bridge").mm.current_loaded_models]
    experts = [m for m in loaded if type(m.model).__name__ == high]
    assert len(experts) == 2 and all(m.loaded_size() == m.model_size() for m in experts)
