"""How hard a world is for few steps: samples by the exact denoiser of finite sets of its clips.

For N clips x_i with weights w_i the mean of the clean clip given x = (1 - s) x_i + s noise is known:
the average of the x_i by softmax(log w_i - |x - (1 - s) x_i|^2 / (2 s^2)). Euler steps with it are what
a network without any error would do, https://arxiv.org/abs/2206.00364 (appendix B.3). For each prompt
the set holds clips that fit its caption and differ in all that it leaves open: start, exact size and
speed, tints, phases. The unguided mean has the same clips among N of any kind.

Clips are small and stretched until two of one caption are as far apart as their latents in the
shipped VAE: noise then hides as much of them as in training.

What it shows: what the number of steps and guidance alone cost in this world, before any network
errs. What it does not: a finite set memorises, so the last step snaps to one clip, or to a blend
of few, where a network blurs and invents; the scores are an upper bound for a network's, above all
at four steps. That two such scores differ is evidence for a hard world; that they agree proves
little. Nor does it say anything of unseen combinations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lightx2v_core.assemble import load_vae
from lightx2v_core.presets import demo_path

from .denoising import STUDENT_SIGMAS, path_sigmas
from .judge import judge
from .world import WIDE, WORLDS, Scenes, World, render, sample_alike, sample_scenes

SIDE, FRAMES = 48, 5
SEED = 80_001
STEPS = 50
CFG = 4.0
CAPTION_SHARE = 1 / 64  # of all clips that fit one caption: what the unguided mean knows of it
CALIBRATION_CLIPS = 4


@dataclass(frozen=True, slots=True, eq=False)
class ClipSet:
    """Clips as rows of numbers, and the logarithm of how common each is."""

    clips_ND: Tensor
    energy_N: Tensor
    log_share_N: Tensor

    @classmethod
    def of(cls, clips_ND: Tensor, share: float = 1.0) -> ClipSet:
        count = len(clips_ND)
        log_share = torch.full((count,), share / count).log()
        return cls(clips_ND, clips_ND.square().sum(dim=1), log_share)

    def logits(self, x_BD: Tensor, sigma: float) -> Tensor:
        """B x N, up to what all clips share."""
        keep = 1 - sigma
        match = keep * (x_BD @ self.clips_ND.T) - 0.5 * keep**2 * self.energy_N
        return match / sigma**2 + self.log_share_N


def denoised(x_BD: Tensor, sigma: float, sets: Sequence[ClipSet]) -> Tensor:
    """Mean of the clean clip over all `sets` together; sigma > 0."""
    weights = torch.cat([some.logits(x_BD, sigma) for some in sets], dim=1).softmax(dim=1)
    parts = weights.split([len(some.clips_ND) for some in sets], dim=1)
    return sum(
        (part @ some.clips_ND for part, some in zip(parts, sets, strict=True)),
        torch.zeros_like(x_BD),
    )


def euler(
    noise_BD: Tensor, fitting: ClipSet, others: ClipSet, sigmas: Sequence[float], cfg: float = 1.0
) -> Tensor:
    """Samples for one caption. `others` and a share of `fitting` are what no caption knows."""
    rare = ClipSet(
        fitting.clips_ND,
        fitting.energy_N,
        fitting.log_share_N + torch.tensor(CAPTION_SHARE).log(),
    )
    x = noise_BD
    for sigma, to in zip(sigmas[:-1], sigmas[1:], strict=True):
        clean = denoised(x, sigma, (fitting,))
        if cfg != 1.0:
            unguided = denoised(x, sigma, (rare, others))
            clean = unguided + cfg * (clean - unguided)
        x = clean + (to / sigma) * (x - clean)
    return x


def fitting_scenes(scene: Scenes, count: int, rng: Generator, world: World) -> Scenes:
    """Clips that a caption of `scene` may belong to, wrongly told ones among them."""
    if world.slip_share == 0:
        return sample_alike(scene, count, rng, world)
    raise NotImplementedError


def rows(scenes: Scenes, gain: float) -> Tensor:
    parts = [render(scenes[i : i + 64], SIDE, SIDE, FRAMES) for i in range(0, len(scenes), 64)]
    return gain * torch.cat(parts).flatten(1)


@torch.no_grad()
def latent_gain(world: World) -> float:
    """What small clips are multiplied with to be as far apart as latents of whole ones are."""
    rng = Generator().manual_seed(SEED)
    vae = load_vae(demo_path("vae"))
    ratios = []
    for row in range(CALIBRATION_CLIPS):
        pair = sample_alike(sample_scenes(1, rng, world), 2, rng, world)
        latent = vae.encode(render(pair, 128, 128, 17))
        small = rows(pair, 1.0)
        ratios.append((latent[0] - latent[1]).norm() / (small[0] - small[1]).norm())
    return float(torch.stack(ratios).mean())


@torch.no_grad()
def examine(world: World, clips: int, prompts: int, gain: float) -> dict[str, dict[str, float]]:
    """Scores by the judge of every sampler, on the same prompts and noise; `truth` is real clips."""
    rng = Generator().manual_seed(SEED)
    asked = sample_scenes(prompts, rng, world)
    others = ClipSet.of(rows(sample_scenes(clips, rng, world), gain), 1 - CAPTION_SHARE)
    samplers = {
        f"base, {STEPS} steps, cfg {CFG:g}": (path_sigmas(STEPS), CFG),
        f"base, {STEPS} steps, no cfg": (path_sigmas(STEPS), 1.0),
        "base, 4 steps, no cfg": (STUDENT_SIGMAS, 1.0),
    }
    made: dict[str, list[Tensor]] = {name: [] for name in ("truth", *samplers)}
    for row in range(prompts):
        fitting = ClipSet.of(rows(fitting_scenes(asked[row : row + 1], clips, rng, world), gain))
        noise = torch.randn(1, fitting.clips_ND.shape[1], generator=rng)
        made["truth"].append(fitting.clips_ND[:1])
        for name, (sigmas, cfg) in samplers.items():
            made[name].append(euler(noise, fitting, others, sigmas, cfg))
    results = {}
    truth = torch.cat(made["truth"])
    for name, parts in made.items():
        pixels = (torch.cat(parts) / gain).unflatten(1, (3, FRAMES, SIDE, SIDE))
        results[name] = judge(pixels, asked).scores()
        edges = pixels.diff(dim=-1).abs().mean()
        results[name]["sharpness"] = 100 * float(edges / (truth / gain).unflatten(1, (3, FRAMES, SIDE, SIDE)).diff(dim=-1).abs().mean())
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.exact", description=__doc__)
    parser.add_argument("--world", choices=WORLDS, default=WIDE.name)
    parser.add_argument("--clips", type=int, default=2048, help="that fit each prompt")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--gain", type=float, help="instead of measuring it with the shipped VAE")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    world = WORLDS[options.world]
    gain = latent_gain(world) if options.gain is None else options.gain
    print(f"world {world.name}, gain {gain:.2f}")
    for name, scores in examine(world, options.clips, options.prompts, gain).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in scores.items()))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
