"""Our VAE in native nodes and our decode node inside a real ComfyUI; and what it registers."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from inside import (
    DEVICE,
    WORK,
    Heard,
    check,
    gc,
    host_nodes,
    main,
    pack,
    relative,
    run,
    sentence,
)

import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_management as mm
import comfy.sd
import comfy.taesd.taehv
import comfy.utils
import folder_paths
import torch
import locale_checks  # noqa: F401
import node_checks  # noqa: F401 - each registers its checks
import preview_checks  # noqa: F401
import text_checks  # noqa: F401
import tiny_vae_checks  # noqa: F401
from small_codecs import (
    CLIP_FRAMES,
    LATENT,
    VAE_WEIGHTS,
    close,
    encode,
    native_vae,
    our_clip,
    our_vae,
    wan_vae,
)


@check
def the_latent_border_has_the_hosts_own_statistics() -> None:
    native = comfy.latent_formats.Wan21()
    latent = LATENT["samples"]
    torch.testing.assert_close(wan_vae.normalise(latent), native.process_in(latent))
    torch.testing.assert_close(wan_vae.denormalise(latent), native.process_out(latent))


@check
def vae_encode_gives_the_raw_mean_of_the_native_vae() -> str:
    ours, theirs = (
        host_nodes.VAEEncode().encode(vae, CLIP_FRAMES)[0] for vae in (our_vae(), native_vae())
    )
    return close(ours["samples"], theirs["samples"])


@check
def a_picture_with_grey_frames_encodes_as_with_the_native_vae_without_computing_each() -> str:
    clip = torch.full((33, 32, 32, 3), 0.5)
    clip[0] = CLIP_FRAMES[0, :32, :32]
    ours, theirs = (vae.encode(clip) for vae in (our_vae(), native_vae()))
    stills = pack("lightx2v_core.wan.vae_pieces").find_stills
    seen = clip.permute(3, 0, 1, 2)[None] * 2.0 - 1.0
    assert stills(seen) == [(1, 33)]
    return close(ours, theirs)


@cache
def decoded(load: Callable[[], object]) -> torch.Tensor:
    """LATENT by the native node and the VAE that `load` gives."""
    return host_nodes.VAEDecode().decode(load(), LATENT)[0]


@check
def vae_decode_gives_the_pixels_of_the_native_vae() -> str:
    ours, theirs = decoded(our_vae), decoded(native_vae)
    assert ours.shape == (9, 64, 64, 3)
    assert float(ours.min()) >= 0.0 and float(ours.max()) <= 1.0
    return close(ours, theirs)


@check
def odd_picture_sides_are_cropped_as_by_the_native_vae() -> str:
    frames = torch.rand(5, 70, 66, 3, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        host_nodes.VAEEncode().encode(vae, frames)[0] for vae in (our_vae(), native_vae())
    )
    return close(ours["samples"], theirs["samples"])


@check
def tiled_vae_nodes_equal_the_native_vae() -> str:
    latent = {"samples": torch.randn(1, 16, 3, 10, 10, generator=torch.Generator().manual_seed(2))}
    decoded = [
        host_nodes.VAEDecodeTiled().decode(vae, latent, 64, 16, 8, 4)[0]
        for vae in (our_vae(), native_vae())
    ]
    encoded = [
        host_nodes.VAEEncodeTiled().encode(vae, CLIP_FRAMES, 64, 16, 8, 4)[0]["samples"]
        for vae in (our_vae(), native_vae())
    ]
    return f"{close(*decoded)}, {close(*encoded)}"


@check
def decode_video_equals_vae_decode_on_both_vaes() -> None:
    for load in (our_vae, native_vae):
        frames = run("LightX2VDecodeVideo", latent=LATENT, vae=load())[0]
        assert torch.equal(frames, decoded(load))


class Tight:
    """A VAE object of the host whose decoder runs out of memory a number of times."""

    def __init__(self, vae: object, failures: int) -> None:
        self.vae, self.left, self.calls = vae, failures, []
        self.decode = vae.first_stage_model.decode
        vae.first_stage_model.decode = self

    def __call__(self, samples: torch.Tensor, **options: object) -> torch.Tensor:
        self.calls.append(tuple(samples.shape[2:]))
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("no room on this card")
        return self.decode(samples, **options)


@check
def short_memory_unloads_others_first_and_tiles_last() -> str:
    other = our_clip()
    encode(other)
    latent = {"samples": torch.randn(1, 16, 2, 12, 12, generator=torch.Generator().manual_seed(3))}
    decode = pack("nodes.decode")
    decode.TILE, decode.OVERLAP = 64, 16
    whole = run("LightX2VDecodeVideo", latent=latent, vae=our_vae())[0]

    retry = Tight(our_vae(), 1)
    with Heard() as heard:
        again = run("LightX2VDecodeVideo", latent=latent, vae=retry.vae)[0]
    assert retry.calls == [(2, 12, 12)] * 2, retry.calls
    assert torch.equal(again, whole)
    on_device = [entry.model for entry in mm.current_loaded_models if entry.device == DEVICE]
    assert other.patcher not in on_device
    assert any("other models unloaded" in line for line in heard.lines), heard.lines

    tiles = Tight(our_vae(), 2)
    tiled = run("LightX2VDecodeVideo", latent=latent, vae=tiles.vae)[0]
    assert tiles.calls[:2] == [(2, 12, 12)] * 2 and tiles.calls[2][1:] == (8, 8), tiles.calls
    assert tiled.shape == whole.shape
    return f"tiled differs by {relative(tiled, whole):.1e}"


@check
def a_failed_decode_saves_the_latent_and_names_the_file() -> str:
    tight = Tight(our_vae(), 99)
    told = sentence(lambda: run("LightX2VDecodeVideo", latent=LATENT, vae=tight.vae))
    assert told.startswith("OutOfMemoryError"), told
    path = Path(told.partition("saved as ")[2].partition(":")[0])
    assert path.is_file() and path.is_relative_to(folder_paths.get_output_directory()), told
    copied = WORK / "input" / path.name
    copied.write_bytes(path.read_bytes())
    read = host_nodes.NODE_CLASS_MAPPINGS.get("LoadLatent") or host_nodes.LoadLatent
    assert torch.equal(read().load(path.name)[0]["samples"], LATENT["samples"])
    return told


@check
def an_interrupted_decode_saves_nothing() -> None:
    before = set((WORK / "output").rglob("*.latent"))
    mm.interrupt_current_processing(True)
    told = sentence(lambda: run("LightX2VDecodeVideo", latent=LATENT, vae=our_vae()))
    assert told.startswith("InterruptProcessingException"), told
    assert set((WORK / "output").rglob("*.latent")) == before


@check
def a_latent_with_nan_is_a_sentence_and_not_black_frames() -> None:
    bad = {"samples": LATENT["samples"] * float("nan")}
    told = sentence(lambda: run("LightX2VDecodeVideo", latent=bad, vae=our_vae()))
    assert "NaN" in told, told


@check
def vae_sizes_are_true_and_free_empties_it() -> None:
    vae = our_vae()
    host_nodes.VAEDecode().decode(vae, LATENT)
    size = sum(t.nbytes for t in VAE_WEIGHTS.values())
    assert vae.patcher.model_size() == vae.patcher.loaded_size() == vae.model_size() == size
    mm.unload_all_models()
    assert vae.patcher.loaded_size() == 0
    assert torch.equal(host_nodes.VAEDecode().decode(vae, LATENT)[0], decoded(our_vae))


@check
def nothing_of_ours_stays_behind_when_the_last_reference_goes() -> None:
    import weakref

    vae, clip = our_vae(), our_clip()
    encode(clip)
    host_nodes.VAEDecode().decode(vae, LATENT)
    alive = [weakref.ref(vae.first_stage_model), weakref.ref(clip.cond_stage_model)]
    del vae, clip
    gc.collect()
    mm.cleanup_models()
    assert [ref() for ref in alive] == [None, None]


if __name__ == "__main__":
    main()
