"""Stage `text`: the text encoder, taught on captions alone to tell what they say. Fits a CPU.

It goes on from one of an earlier command, of the same world, where there is one.

Each attribute has a query that looks over the token states and names it, as the transformer's
cross-attention will; where there are pairs, those of both objects and who is in front. There each
colour has queries too: what is that colour's shape, direction, texture? Asked only for the first
and the second object, an encoder stayed at chance for pairs, and a video model trained on it gave
each object the other's shape and direction. What is learnt for that is kept, the queries are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lightx2v_core.text.umt5 import TextEncoder

from .bank import caption_rows
from .captions import caption, stories
from .context import Context
from .files import TEXT
from .fitting import Recipe, fit
from .outlines import SHAPES, TEXTURES
from .progress import Clock
from .text import encode_rows, new_encoder, read_encoder, save_encoder
from .vocabulary import CaptionRows
from .world import Scenes, sample_scenes
from .worlds import COLORS, DIRECTIONS, ORDERS, SIZES, SPEEDS, TONES, World

RECIPE = Recipe(lr=1e-3, warmup=50, decay=0.98)
NOT_ASKED = -1


@dataclass(frozen=True, slots=True)
class Attribute:
    """What is asked of a caption, and how much it counts: what captions leave out at times counts
    less."""

    field: str  # of `Scenes`
    thing: int | None  # which object's
    answers: int
    weight: float = 1.0
    by_color: bool = False  # asked of the object of a colour, not of the first or the second

    @property
    def name(self) -> str:
        name = f"{'second ' if self.thing else ''}{self.field.split('_')[0]}"
        return f"{name} by colour" if self.by_color else name

    def wanted(self, scenes: Scenes) -> Tensor:
        """B: the right answer, NOT_ASKED where there is no such object."""
        values = getattr(scenes, self.field)
        if self.thing is None:
            return values
        return values[:, self.thing].masked_fill(scenes.count_B <= self.thing, NOT_ASKED)


def attributes_of(world: World) -> list[Attribute]:
    """Those in which captions of the world differ."""

    def of_thing(thing: int) -> list[Attribute]:
        attributes = [
            Attribute("shape_BO", thing, len(SHAPES)),
            Attribute("color_BO", thing, len(COLORS)),
            Attribute("direction_BO", thing, len(DIRECTIONS)),
            Attribute("size_BO", thing, len(SIZES), 0.3),
            Attribute("speed_BO", thing, len(SPEEDS), 0.3),
        ]
        if world.texture_share > 0:
            attributes.append(Attribute("texture_BO", thing, len(TEXTURES)))
        return attributes

    attributes = [*of_thing(0), Attribute("tone_B", None, len(TONES), 0.3)]
    if world.pair_share > 0:
        attributes += [Attribute("count_B", None, 3), *of_thing(1)]
        attributes += [
            replace(attribute, by_color=True)
            for thing in (0, 1)
            for attribute in of_thing(thing)
            if attribute.field != "color_BO"
        ]
    if world.crossing_share > 0:
        attributes.append(Attribute("order_B", None, len(ORDERS)))
    return attributes


class Reader(nn.Module):
    """One attention query, or one for each colour, and one linear for each attribute."""

    def __init__(self, dim: int, attributes: Sequence[Attribute]) -> None:
        super().__init__()
        self.attributes = list(attributes)
        counts = [len(COLORS) if one.by_color else 1 for one in attributes]
        self.queries = nn.ParameterList(torch.randn(n, dim) / dim**0.5 for n in counts)
        self.answers = nn.ModuleList(nn.Linear(dim, one.answers) for one in attributes)

    def forward(self, states_BSE: Tensor, mask_BS: Tensor, color_BO: Tensor) -> list[Tensor]:
        queries = [
            queries[color_BO[:, one.thing]] if one.by_color else queries.expand(len(mask_BS), -1)
            for one, queries in zip(self.attributes, self.queries, strict=True)
        ]
        scores = torch.stack(queries, dim=1) @ states_BSE.mT  # B A S
        weights = scores.masked_fill(~mask_BS[:, None], float("-inf")).softmax(dim=-1)
        heard = weights @ states_BSE  # B A E
        return [answer(heard[:, i]) for i, answer in enumerate(self.answers)]


def start_encoder(context: Context, rows: CaptionRows) -> TextEncoder:
    """That of an earlier command, else a new one."""
    for folder in (context.out, context.source):
        if folder is not None and (folder / TEXT).is_file():
            return read_encoder(folder / TEXT).requires_grad_(True)
    return new_encoder(context.sizes, rows.model, rows.size, context.seed)


def train_text(context: Context, minutes: float) -> None:
    """The vocabulary from the captions, then the encoder; or on from an earlier command's."""
    clock, sizes, world = Clock(minutes), context.sizes, context.world
    attributes = attributes_of(world)
    rows = caption_rows(context)
    encoder = start_encoder(context, rows).to(context.device)
    torch.manual_seed(context.seed)
    reader = Reader(sizes.text_dim, attributes).to(context.device)
    rng, words = Generator().manual_seed(context.draws + 6000), Random(context.draws + 6000)
    last: list[float] = []

    def loss_at(_fraction: float) -> Tensor:
        scenes = sample_scenes(sizes.text_batch, rng, world)
        ids = rows([caption(story, words) for story in stories(scenes)]).to(context.device)
        states = encode_rows(encoder.transformer, ids).states_BSE
        told = reader(states, ids != 0, scenes.color_BO.to(context.device))
        loss, right = states.new_zeros(()), []
        for attribute, logits in zip(attributes, told, strict=True):
            wanted = attribute.wanted(scenes).to(context.device)
            is_asked = wanted != NOT_ASKED
            total = F.cross_entropy(logits, wanted, ignore_index=NOT_ASKED, reduction="sum")
            loss = loss + attribute.weight * total / is_asked.sum().clamp_min(1)
            right.append(float((logits.argmax(dim=-1) == wanted)[is_asked].float().mean()))
        last[:] = right
        return loss

    def save(averages: list[nn.Module]) -> None:
        save_encoder(context.out, averages[0], rows.model)

    modules = [encoder.transformer, reader]
    fit("text", modules, loss_at, RECIPE, clock, context.journal, save)
    told = zip(attributes, last, strict=True)
    shares = {one.name: round(100 * share, 1) for one, share in told if not math.isnan(share)}
    context.journal.note("text told", **shares)
