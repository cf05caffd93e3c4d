"""Stage `text`: the text encoder, taught on captions alone to tell what they say. Fits a CPU.

Each attribute has a query that looks over the token states and names it, as the transformer's
cross-attention will. What is learnt for that is kept, the queries are not.
"""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .captions import caption, stories
from .context import Context
from .fitting import Recipe, fit
from .progress import Clock
from .text import encode_rows, new_encoder, save_encoder
from .vocabulary import CaptionRows, learn_pieces
from .world import SHAPES, sample_scenes
from .worlds import COLORS, DIRECTIONS, SIZES, SPEEDS, TONES

RECIPE = Recipe(lr=1e-3, warmup=50, decay=0.98)
# Attribute and how much it counts: what captions leave out at times counts less.
ATTRIBUTES = {
    "shape": (len(SHAPES), 1.0),
    "color": (len(COLORS), 1.0),
    "direction": (len(DIRECTIONS), 1.0),
    "size": (len(SIZES), 0.3),
    "speed": (len(SPEEDS), 0.3),
    "tone": (len(TONES), 0.3),
}


class Reader(nn.Module):
    """One attention query and one linear for each attribute."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), dim) / dim**0.5)
        self.answers = nn.ModuleList(nn.Linear(dim, size) for size, _ in ATTRIBUTES.values())

    def forward(self, states_BSE: Tensor, mask_BS: Tensor) -> list[Tensor]:
        scores = torch.einsum("ae,bse->bas", self.queries, states_BSE)
        weights = scores.masked_fill(~mask_BS[:, None], float("-inf")).softmax(dim=-1)
        heard = weights @ states_BSE  # B A E
        return [answer(heard[:, i]) for i, answer in enumerate(self.answers)]


def train_text(context: Context, minutes: float) -> None:
    """The vocabulary from the captions, then the encoder."""
    clock, sizes = Clock(minutes), context.sizes
    rows = CaptionRows(learn_pieces(context.seed))
    encoder = new_encoder(sizes, rows.model, rows.size, context.seed).to(context.device)
    torch.manual_seed(context.seed)
    reader = Reader(sizes.text_dim).to(context.device)
    rng, words = Generator().manual_seed(context.seed + 6000), Random(context.seed + 6000)
    last: list[float] = []

    def loss_at(_fraction: float) -> Tensor:
        scenes = sample_scenes(sizes.text_batch, rng)
        ids = rows([caption(story, words) for story in stories(scenes)]).to(context.device)
        states = encode_rows(encoder.transformer, ids).states_BSE
        told = reader(states, ids != 0)
        loss, right = states.new_zeros(()), []
        for (name, (_, weight)), logits in zip(ATTRIBUTES.items(), told, strict=True):
            field = scenes.tone_B if name == "tone" else getattr(scenes, f"{name}_BO")[:, 0]
            wanted = field.to(context.device)
            loss = loss + weight * F.cross_entropy(logits, wanted)
            right.append(float((logits.argmax(dim=-1) == wanted).float().mean()))
        last[:] = right
        return loss

    def save(averages: list[nn.Module]) -> None:
        save_encoder(context.out, averages[0], rows.model)

    modules = [encoder.transformer, reader]
    fit("text", modules, loss_at, RECIPE, clock, context.journal, save)
    shares = {name: round(100 * share, 1) for name, share in zip(ATTRIBUTES, last, strict=True)}
    context.journal.note("text told", **shares)
