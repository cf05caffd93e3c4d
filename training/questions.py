"""What every sampler of the table is asked: prompts, several noises each, and their first frames.

Axes besides those of the core: P prompts, S seeds of a prompt. Clip i belongs to prompt i // S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.wan.vae import WanVae

from .again import draw_again
from .bank import condition_mask, picture_latents, with_mask
from .captions import plain_prompt, stories
from .context import Context
from .measures import Reference, clip_features
from .text import TextStates, empty_rows, encode_rows
from .vocabulary import CaptionRows
from .world import Scenes, sample_scenes
from .worlds import PLAIN, Split, World

SCENE_SEED = 70_003  # no training and no other exam draws its clips from these
NOISE_SEED, AGAIN_SEED = 70_004, 70_005


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Scenes and states are per prompt, noise per clip. Noise waits on the CPU."""

    scenes: Scenes
    prompts: list[str]
    texts: tuple[TextStates, TextStates]
    noise_BCTHW: Tensor
    seeds: int
    first_PCHW: Tensor
    image_PCTHW: Tensor | None

    def __len__(self) -> int:
        return len(self.prompts) * self.seeds

    def prompt_rows(self, start: int, stop: int) -> Tensor:
        """The prompt of each clip from `start` to `stop`."""
        return torch.arange(start, min(stop, len(self))) // self.seeds

    def first(self, prompts: int) -> Questions:
        """Only the first prompts, with all their seeds."""
        return Questions(
            self.scenes[:prompts],
            self.prompts[:prompts],
            (self.texts[0][:prompts], self.texts[1][:prompts]),
            self.noise_BCTHW[: prompts * self.seeds],
            self.seeds,
            self.first_PCHW[:prompts],
            None if self.image_PCTHW is None else self.image_PCTHW[:prompts],
        )


@torch.no_grad()
def ask(
    context: Context, scenes: Scenes, seeds: int, rows: CaptionRows, text: nn.Module
) -> Questions:
    """Text-to-video questions about `scenes`; the noise of a clip is the same for every sampler."""
    count = len(scenes)
    prompts = [plain_prompt(story) for story in stories(scenes)]
    ids = rows(prompts).to(context.device)
    texts = (
        encode_rows(text, ids),
        encode_rows(text, empty_rows(count, context.device, context.world)),
    )
    rng = Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(count * seeds, *context.sizes.latent_shape, generator=rng)
    scenes = scenes.to(context.device)
    parts = parts_of(context, scenes)
    first = torch.cat(context.each(lambda part: context.render(part)[:, :, 0], parts))
    return Questions(scenes, prompts, texts, noise, seeds, first, None)


@torch.no_grad()
def with_first_frames(context: Context, questions: Questions, vae: WanVae) -> Questions:
    """The same questions with the first frame given."""

    def picture(part: Scenes) -> Tensor:
        return picture_latents(context, vae, context.render(part).to(context.dtype))

    latents = context.each(picture, parts_of(context, questions.scenes))
    image = with_mask(torch.cat(latents).float(), condition_mask(context))
    return replace(questions, image_PCTHW=image)


def parts_of(context: Context, scenes: Scenes) -> list[Scenes]:
    step = context.sizes.chunk
    return [scenes[start : start + step] for start in range(0, len(scenes), step)]


def unseen_scenes(count: int, world: World = PLAIN, split: Split = "train") -> Scenes:
    """The scenes of the table."""
    return sample_scenes(count, Generator().manual_seed(SCENE_SEED), world, split)


@dataclass(frozen=True, slots=True, eq=False)
class RealClips:
    """Rendered clips of the table's captions: what samplers are compared with."""

    features_PSD: Tensor  # S draws of each caption
    reference: Reference
    floors: dict[str, float]  # Fréchet distances that no sampler can be expected to beat

    def spread(self, prompts: int) -> float:
        """How far apart two renders of one of the first captions are."""
        return self.reference.spread(self.features_PSD[:prompts])


@torch.no_grad()
def real_clips(context: Context, asked: Questions, vae: WanVae, least: int) -> RealClips:
    """At least `least` rendered clips. The floors are of as many as each sampler makes; the one
    through the VAE takes a GPU."""
    draws = max(2, -(-least // len(asked.prompts)))
    rng = Generator().manual_seed(AGAIN_SEED)

    def features(clip_of: Callable[[Tensor], Tensor]) -> Tensor:
        drawn = draw_again(asked.scenes, rng, context.world).to(context.device)

        def of(part: Scenes) -> Tensor:
            return clip_features(clip_of(context.render(part)), context.world)

        return torch.cat(context.each(of, parts_of(context, drawn)))

    def through_vae(pixels: Tensor) -> Tensor:
        return context.decode(vae, context.encode(vae, pixels.to(context.dtype)))

    stacked = torch.stack([features(lambda pixels: pixels) for _ in range(draws)], dim=1)
    reference, floors = Reference.of(stacked.flatten(0, 1)), {}
    ways = {"rendered anew": lambda pixels: pixels, "rendered anew, through the VAE": through_vae}
    for name, way in ways.items():
        if way is not through_vae or context.device.type == "cuda":
            made = torch.cat([features(way) for _ in range(asked.seeds)])
            floors[name] = reference.distance(made)
    return RealClips(stacked, reference, floors)
