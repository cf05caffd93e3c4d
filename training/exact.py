"""How hard a world is for few steps: samples by the exact denoiser of finite sets of its clips.

For N clips x_i with weights w_i the mean of the clean clip given x = (1 - s) x_i + s noise is
known: the average of the x_i by softmax(log w_i - |x - (1 - s) x_i|^2 / (2 s^2)). Euler steps with
it are what a network without any error would do, https://arxiv.org/abs/2206.00364 (appendix B.3).
For each prompt the set holds clips that fit its caption and differ in all that it leaves open:
start, exact size and speed, tints, phases. The unguided mean has the same clips among others.

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
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Generator, Tensor

from lightx2v_core.assemble import load_vae
from lightx2v_core.presets import demo_path

from .denoising import STUDENT_SIGMAS, path_sigmas
from .judge import judge
from .measures import Reference, clip_features
from .world import Scenes, render, sample_alike, sample_scenes
from .worlds import COLORS, DIRECTIONS, PLAIN, WORLDS, World

SIDE, FRAMES = 48, 5
SEED = 80_001
STEPS = 50
CFG = 4.0
CAPTION_SHARE = 1 / 64  # of all clips that fit one caption: what the unguided mean knows of it
CALIBRATION_CLIPS = 4
REAL_CLIPS = 8  # for each prompt, what samples are held against


@dataclass(frozen=True, slots=True, eq=False)
class ClipSet:
    """Clips as rows of numbers, the logarithm of how common each is, and their products.

    Every state of a sampler is some of the noise plus some of each clip, so that a step needs no
    more than the products of all clips with each other and with the noise.
    """

    clips_ND: Tensor
    log_share_N: Tensor
    products_NN: Tensor

    @classmethod
    def of(cls, clips_ND: Tensor, share: float = 1.0) -> ClipSet:
        count = len(clips_ND)
        log_share = torch.full((count,), share / count).log()
        return cls(clips_ND, log_share, clips_ND @ clips_ND.T)

    def within(self, others: ClipSet, log_share_N: Tensor) -> ClipSet:
        """This set as the first of all clips, as common there as `log_share_N` says."""
        between = self.clips_ND @ others.clips_ND.T
        rest = log_share_N.logsumexp(dim=0).exp().neg().log1p()
        return ClipSet(
            torch.cat((self.clips_ND, others.clips_ND)),
            torch.cat((log_share_N, others.log_share_N + rest)),
            torch.cat(
                (
                    torch.cat((self.products_NN, between), dim=1),
                    torch.cat((between.T, others.products_NN), dim=1),
                )
            ),
        )

    def weights(self, match_BN: Tensor, sigma: float) -> Tensor:
        """Posterior weights of the clips for states of which `match_BN` are the products."""
        keep = 1 - sigma
        logits = keep * match_BN - 0.5 * keep**2 * self.products_NN.diagonal()
        return (logits / sigma**2 + self.log_share_N).softmax(dim=1)


def euler(
    noise_BD: Tensor, known: ClipSet, fitting: int, sigmas: Sequence[float], cfg: float = 1.0
) -> Tensor:
    """Samples B D for one caption, which the first `fitting` clips of `known` fit."""
    clips_ND = known.clips_ND[:fitting]
    mine = ClipSet(clips_ND, torch.zeros(fitting), known.products_NN[:fitting, :fitting])
    heard_BN = noise_BD @ known.clips_ND.T
    noise_left, held_BN = 1.0, torch.zeros_like(heard_BN)
    for sigma, to in pairwise(sigmas):
        match_BN = noise_left * heard_BN + held_BN @ known.products_NN
        clean_BN = torch.zeros_like(held_BN)
        clean_BN[:, :fitting] = mine.weights(match_BN[:, :fitting], sigma)
        if cfg != 1.0:
            unguided_BN = known.weights(match_BN, sigma)
            clean_BN = unguided_BN + cfg * (clean_BN - unguided_BN)
        # x = clean + to / sigma * (x - clean), in shares of noise and clips.
        held_BN = clean_BN + (to / sigma) * (held_BN - clean_BN)
        noise_left *= to / sigma
    return noise_left * noise_BD + held_BN @ known.clips_ND


def commonness(fitting: Scenes, asked: Scenes, world: World) -> Tensor:
    """N: logarithm of how common each clip is, captions aside.

    Drawn for a caption, wrongly told clips are rarer than they are in the world, by as much as
    that caption is unlikelier for them than for a right one. Guidance lives on the difference.
    """
    limits = {"color": len(COLORS), "shape": world.shapes, "direction": len(DIRECTIONS)}
    result = torch.full((len(fitting),), CAPTION_SHARE / len(fitting)).log()
    if world.slip_share > 0:
        count = int(asked.count_B)
        for name, limit in limits.items():
            pair = (getattr(scenes, f"{name}_BO")[:, :count] for scenes in (fitting, asked))
            wrong_N = torch.ne(*pair).sum(dim=1)
            chance = world.slip_share / limit
            result = result + wrong_N * math.log((1 - world.slip_share + chance) / chance)
    # However many wrong clips were drawn, others are the greater part.
    return result - (result.logsumexp(dim=0) - math.log(0.5)).clamp_min(0)


def rows(scenes: Scenes, gain: float) -> Tensor:
    parts = [render(scenes[i : i + 64], SIDE, SIDE, FRAMES) for i in range(0, len(scenes), 64)]
    return gain * torch.cat(parts).flatten(1)


@torch.no_grad()
def latent_gain(world: World) -> float:
    """What small clips are multiplied with to be as far apart as latents of whole ones are."""
    rng = Generator().manual_seed(SEED)
    vae = load_vae(demo_path("vae"))
    ratios = []
    for _ in range(CALIBRATION_CLIPS):
        pair = sample_alike(sample_scenes(1, rng, world), 2, rng, world)
        latent = vae.encode(render(pair, 128, 128, 17))
        small = rows(pair, 1.0)
        ratios.append((latent[0] - latent[1]).norm() / (small[0] - small[1]).norm())
    return float(torch.stack(ratios).mean())


@torch.no_grad()
def examine(world: World, clips: int, prompts: int, gain: float) -> dict[str, dict[str, float]]:
    """Scores of every sampler by the judge, on the same prompts and noise; `truth` is clips.

    `sharpness` is that of edges, in percent of the truth's; `frechet` the distance of features
    to those of other clips of the same captions, of which the truth's own is the floor.
    """
    rng = Generator().manual_seed(SEED)
    asked = sample_scenes(prompts, rng, world)
    others = ClipSet.of(rows(sample_scenes(clips, rng, world), gain))
    samplers = {
        f"base, {STEPS} steps, cfg {CFG:g}": (path_sigmas(STEPS), CFG),
        f"base, {STEPS} steps, no cfg": (path_sigmas(STEPS), 1.0),
        "base, 4 steps, no cfg": (STUDENT_SIGMAS, 1.0),
    }
    made: dict[str, list[Tensor]] = {name: [] for name in ("truth", *samplers)}
    real = []
    for row in range(prompts):
        fitting = sample_alike(asked[row : row + 1], clips, rng, world)
        log_share = commonness(fitting, asked[row : row + 1], world)
        known = ClipSet.of(rows(fitting, gain)).within(others, log_share)
        noise = torch.randn(1, known.clips_ND.shape[1], generator=rng)
        made["truth"].append(known.clips_ND[:1])
        real.append(known.clips_ND[1 : 1 + REAL_CLIPS])
        for name, (sigmas, cfg) in samplers.items():
            made[name].append(euler(noise, known, clips, sigmas, cfg))
    pixels = {name: as_clips(parts, gain) for name, parts in made.items()}
    reference = Reference.of(clip_features(as_clips(real, gain), world))
    edges = pixels["truth"].diff(dim=-1).abs().mean()
    return {
        name: judge(clip, asked, world).scores()
        | {
            "sharpness": 100 * float(clip.diff(dim=-1).abs().mean() / edges),
            "frechet": reference.distance(clip_features(clip, world)),
        }
        for name, clip in pixels.items()
    }


def as_clips(rows_ND: list[Tensor], gain: float) -> Tensor:
    """BCFHW."""
    return (torch.cat(rows_ND) / gain).unflatten(1, (3, FRAMES, SIDE, SIDE))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.exact", description=__doc__)
    parser.add_argument("--world", choices=WORLDS, default=PLAIN.name)
    parser.add_argument("--clips", type=int, default=512, help="that fit each prompt")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--slips", type=float, help="share of words that captions tell wrong")
    parser.add_argument("--gain", type=float, help="instead of measuring it with the shipped VAE")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    world = WORLDS[options.world]
    if options.slips is not None:
        world = replace(world, slip_share=options.slips)
    gain = latent_gain(world) if options.gain is None else options.gain
    print(f"world {world.name}, gain {gain:.2f}")
    for name, scores in examine(world, options.clips, options.prompts, gain).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in scores.items()))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
