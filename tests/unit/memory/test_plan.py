from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import CapabilityError
from lightx2v_core.memory import plan
from lightx2v_core.memory.codec import CHUNKS, latents_at_once
from lightx2v_core.memory.plan import (
    WORKSPACE_BYTES,
    Job,
    activation_bytes,
    card_room,
    cheaper,
    place_within,
    vae_bytes,
    video_tokens,
    with_one_retry,
)
from lightx2v_core.memory.residency import Residency
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.rope import rotary_table
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import VARIANTS, fill, tiny_inputs

WAN_14B = WanConfig(dim=5120, ffn_dim=13824, num_layers=40)
CPU = torch.device("cpu")


def peak_bytes(run) -> int:
    """The most that was allocated at once on the CPU while `run` ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@torch.inference_mode()
@pytest.mark.parametrize(
    ("changes", "dtype", "batch"),
    [
        ({}, torch.bfloat16, 1),
        ({"ffn_dim": 2048}, torch.float32, 1),
        ({"clip_tokens": 257, "in_dim": 36}, torch.float32, 2),
    ],
)
def test_the_count_holds_what_a_forward_really_allocates(changes, dtype, batch):
    """Above the truth, so that a plan holds, and not far above, so that little is wasted."""
    config = replace(VARIANTS["t2v"], num_layers=1, **changes)
    model = WanModel(config).to(dtype)
    model.compute_dtype = dtype
    inputs = tiny_inputs(config, batch)
    inputs["x_BCTHW"] = torch.zeros(batch, config.in_dim, 4, 32, 32)
    tokens = 4 * 16 * 16
    rotary_table.cache_clear()  # the first forward of a size makes its table

    allocated = peak_bytes(lambda: model(**inputs))

    counted = activation_bytes(config, tokens, dtype.itemsize, batch)
    # Latents in and out, counted with room to spare, are much of a model this narrow.
    assert allocated <= counted <= 1.6 * allocated, f"{allocated} allocated, {counted} counted"


@torch.inference_mode()
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_count_for_the_vae_holds_what_it_really_allocates(direction):
    vae, size = WanVae(VaeConfig(8, 8)), VideoSize(64, 64, 9)
    pixels, latent = torch.zeros(1, 3, 9, 64, 64), torch.zeros(size.latent_shape())

    allocated = peak_bytes(lambda: getattr(vae, direction)(pixels if "en" in direction else latent))

    counted = vae_bytes(8, size, 4) + (pixels.nbytes if direction == "decode" else 0)
    # One count for both; decoding takes more.
    most = (1.6 if direction == "encode" else 1.1) * allocated
    assert allocated <= counted <= most, f"{allocated} allocated, {counted} counted"


def test_the_vae_takes_as_many_latent_frames_at_once_as_fit():
    vae, size = WanVae(VaeConfig(8, 8)), VideoSize(64, 64, 9)
    bytes_of = {latents: vae_bytes(8, size, 4, latents) + WORKSPACE_BYTES for latents in (1, 2, 4)}
    needed = [bytes_of[1], 2 * bytes_of[2], 2 * bytes_of[4]]

    def chosen(room, **choices):
        return latents_at_once(vae, size, room, **choices)

    assert needed == sorted(set(needed))
    assert [chosen(room, choices=CHUNKS) for room in needed] == [1, 2, 4]
    assert [chosen(room - 1, choices=CHUNKS) for room in needed] == [0, 1, 2]
    assert [chosen(room) for room in needed] == [1, 1, 1], "a CPU gains nothing by more"
    assert chosen(None) == latents_at_once(object(), size, 0) == 1


def test_the_vae_never_takes_more_at_once_than_keeps_a_card_busy():
    vae, sizes = WanVae(VaeConfig(8, 8)), [(208, 128), (416, 240), (480, 416), (832, 480)]
    sizes = [*sizes, (1280, 720)]

    chosen = [
        latents_at_once(vae, VideoSize(width, height, 81), 1e12, choices=CHUNKS)
        for width, height in sizes
    ]
    most = max(
        vae_bytes(96, VideoSize(width, height, 81), 2, latents)
        for (width, height), latents in zip(sizes[:4], chosen, strict=False)
    )

    assert chosen == [4, 4, 2, 1, 1]
    assert most == vae_bytes(96, VideoSize(832, 480, 81), 2, 1), "nothing smaller takes more"


def test_activations_grow_with_every_size():
    def counted(width=832, height=480, frames=81, **changes):
        tokens = video_tokens(VideoSize(width, height, frames))
        asked = {"itemsize": 2, "batch": 1, "quantised": False, **changes}
        dims = {k: asked.pop(k) for k in ("dim", "ffn_dim", "in_dim", "clip_tokens") if k in asked}
        return activation_bytes(replace(WAN_14B, **dims), tokens, **asked)

    least = counted()
    grown = [
        *(counted(width=w) for w in (848, 1280)),
        *(counted(height=h) for h in (496, 720)),
        *(counted(frames=f) for f in (85, 121)),
        *(counted(**c) for c in ({"dim": 6144}, {"in_dim": 36}, {"clip_tokens": 257})),
        *(counted(**c) for c in ({"itemsize": 4}, {"batch": 2}, {"ffn_dim": 20000})),
    ]
    kernels = [counted(one_pass=True), counted(one_pass=True, width=1280, height=720)]

    sizes = [counted(16 * a, 16 * b, 4 * c + 1) for a in (1, 30) for b in (1, 30) for c in (0, 20)]
    assert all(more > least for more in grown)
    assert kernels[0] < 0.85 * least and kernels[0] < kernels[1]
    assert counted(quantised=True) >= least
    assert sizes == sorted(sizes) or all(s > 0 for s in sizes)
    assert counted(batch=2) <= 2 * least


def test_the_14b_figures_are_below_what_comfyui_asks_for():
    at_480p, at_720p = (
        activation_bytes(WAN_14B, video_tokens(size), 2) / 2**30
        for size in (VideoSize(832, 480, 81), VideoSize(1280, 720, 81))
    )

    assert 4.0 < at_480p < 4.5 < 5.9
    assert 9.0 < at_720p < 10.3 < 13.6


def engine_of(blocks: int = 4) -> tuple[WanModel, Residency]:
    model = fill(WanModel(replace(VARIANTS["t2v"], dim=128, ffn_dim=192, num_layers=blocks)))
    engine = Residency(model)
    model.run_block = engine.run_block
    return model, engine


@pytest.mark.parametrize("resident", [0, 1, 4])
def test_as_many_blocks_stay_as_fit_beside_the_activations(resident, caplog):
    _, engine = engine_of()
    room = engine.card_bytes(resident) + 1000 + WORKSPACE_BYTES

    with caplog.at_level("INFO"):
        place_within(engine, CPU, room, Job("model", 1000))

    assert engine.resident == resident
    assert engine.loaded_bytes + 1000 + WORKSPACE_BYTES <= room
    assert f"model: resident {resident}/4 blocks, " in caplog.text
    assert "GB pinned, 0.00 GB from file" in caplog.text


def test_what_cannot_fit_is_refused_with_numbers_before_it_is_loaded():
    _, engine = engine_of()

    with pytest.raises(
        CapabilityError,
        match=r"big needs 2\.3 GB on cpu \(0\.0 GB of weights .* 2\.0 GB of activations\) and "
        r"1\.0 GB may be used; use 41 frames",
    ):
        place_within(engine, CPU, 1e9, Job("big", 2 * 10**9, "use 41 frames"))

    assert engine.device is None


def test_advice_names_the_first_frames_and_sides_that_fit():
    size = VideoSize(832, 480, 81)
    limit = activation_bytes(WAN_14B, video_tokens(size), 2) * 0.6

    def fits(s: VideoSize) -> bool:
        return activation_bytes(WAN_14B, video_tokens(s), 2) <= limit

    advice = cheaper(size, fits, "an fp8 file")

    frames, sides, other = advice.split("; or ")
    count = int(frames.split()[0])
    width, height = map(int, sides.split()[0].split("x"))
    assert other == "an fp8 file"
    assert count % 4 == 1 and fits(replace(size, frames=count))
    assert not fits(replace(size, frames=count + 4))
    assert width % 16 == height % 16 == 0 and fits(VideoSize(width, height, 81))


def test_without_a_card_the_limit_is_the_room():
    assert card_room(CPU) is None
    assert card_room(CPU, 5e9) == 5e9


class Card:
    """Runs out of memory the first `times` times it is asked."""

    def __init__(self, times: int) -> None:
        self.left, self.calls = times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise torch.cuda.OutOfMemoryError("tried to allocate 2 GiB")
        return "result"


def test_one_out_of_memory_error_is_survived_with_fewer_blocks(caplog, monkeypatch):
    monkeypatch.setattr(plan, "LEAST_SHRINK", 1)
    _, engine = engine_of()
    engine.place("cpu")
    card = Card(1)

    assert with_one_retry(engine, card) == "result"

    assert card.calls == 2 and engine.resident < 4
    assert "GB of weights given back, this step once more: resident" in caplog.text


def test_the_second_one_escapes_as_it_is_with_advice_in_the_log(caplog):
    _, engine = engine_of()
    engine.place("cpu")
    card = Card(9)

    with pytest.raises(torch.cuda.OutOfMemoryError, match="tried to allocate"):
        with_one_retry(engine, card, lambda: "41 frames in place of 81")

    assert card.calls == 2
    assert "out of memory again; 41 frames in place of 81" in caplog.text


def test_ram_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(plan, "available_bytes", lambda: 3 * 10**9)

    plan.check_ram(3 * 10**9, "model")
    with pytest.raises(CapabilityError, match=r"model needs 14\.2 GB of RAM and 3\.0 GB are free"):
        plan.check_ram(int(14.2e9), "model")
