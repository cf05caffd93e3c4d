"""The small UMT5 encoder: random start, official names, and states as the transformer sees them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.text.tokenizer import EOS, PAD
from lightx2v_core.text.umt5 import TextEncoder, build_text_encoder
from lightx2v_core.wan.config import TEXT_LEN

from .files import TEXT, read_weights, save_weights
from .sizes import Sizes
from .worlds import PLAIN, World

HEAD = 64
BUCKETS = 32
# Deviation of the biases by distance at the start. Small ones grow a thousandth a step, and until
# they are of the size of attention's scores no token knows its neighbours.
NEARNESS = 2.0
# From the names of transformers to the official ones.
NAMES = (
    (r"shared\.weight", "token_embedding.weight"),
    (r"encoder\.final_layer_norm\.weight", "norm.weight"),
    (r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight", r"blocks.\1.norm1.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight", r"blocks.\1.norm2.weight"),
    (
        r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
        r"blocks.\1.pos_embedding.embedding.weight",
    ),
    (
        r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight",
        r"blocks.\1.attn.\2.weight",
    ),
    (
        r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight",
        r"blocks.\1.ffn.gate.0.weight",
    ),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight", r"blocks.\1.ffn.fc1.weight"),
    (r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight", r"blocks.\1.ffn.fc2.weight"),
)


@dataclass(frozen=True, slots=True, eq=False)
class TextStates:
    """States of short rows, and the bias that lets their padding stand for all 512 positions."""

    states_BSE: Tensor
    bias_BS: Tensor

    def join(self, other: TextStates) -> TextStates:
        return TextStates(
            torch.cat((self.states_BSE, other.states_BSE)), torch.cat((self.bias_BS, other.bias_BS))
        )

    def replaced(self, is_other_B: Tensor, other: TextStates) -> TextStates:
        """`other`, a single row, where `is_other_B` says so."""
        return TextStates(
            torch.where(is_other_B[:, None, None], other.states_BSE, self.states_BSE),
            torch.where(is_other_B[:, None], other.bias_BS, self.bias_BS),
        )

    def expanded(self, count: int) -> TextStates:
        """The single row, `count` times."""
        return TextStates(self.states_BSE.expand(count, -1, -1), self.bias_BS.expand(count, -1))

    def half(self) -> TextStates:
        return TextStates(self.states_BSE.half(), self.bias_BS)

    def float(self) -> TextStates:
        return TextStates(self.states_BSE.float(), self.bias_BS)

    def __getitem__(self, rows: slice | Tensor) -> TextStates:
        return TextStates(self.states_BSE[rows], self.bias_BS[rows])


def encode_rows(transformer: nn.Module, ids_BS: Tensor) -> TextStates:
    """All padded positions are the same zero vector, so a few of them with a bias of
    log(how many each stands for) give exactly the attention over 512."""
    mask = ids_BS != PAD
    states = transformer(input_ids=ids_BS, attention_mask=mask.long()).last_hidden_state
    states = states.masked_fill(~mask[..., None], 0.0)
    used_B1 = mask.sum(dim=1, keepdim=True)
    weight = (TEXT_LEN - used_B1) / (ids_BS.shape[1] - used_B1)
    bias = torch.where(mask, torch.zeros_like(weight), weight.log())
    return TextStates(states, bias)


def empty_rows(count: int, device: torch.device, world: World = PLAIN) -> Tensor:
    """Ids of the empty caption, as CFG and caption dropout use it."""
    ids = torch.full((count, world.text_tokens), PAD, dtype=torch.int64, device=device)
    ids[:, 0] = EOS
    return ids


def new_encoder(sizes: Sizes, spiece_model: bytes, vocab_size: int, seed: int) -> TextEncoder:
    """Random weights, scaled as T5's are, since its attention divides by nothing."""
    rng = Generator().manual_seed(seed)
    dim, inner = sizes.text_dim, sizes.text_heads * HEAD

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=rng) * scale

    tensors = {
        "token_embedding.weight": normal(vocab_size, dim, 1.0),
        "norm.weight": torch.ones(dim),
        "spiece_model": bytes_tensor(spiece_model),
    }
    for index in range(sizes.text_layers):
        block = {
            "norm1.weight": torch.ones(dim),
            "norm2.weight": torch.ones(dim),
            "attn.q.weight": normal(inner, dim, (dim * HEAD) ** -0.5),
            "attn.k.weight": normal(inner, dim, dim**-0.5),
            "attn.v.weight": normal(inner, dim, dim**-0.5),
            "attn.o.weight": normal(dim, inner, inner**-0.5),
            "ffn.gate.0.weight": normal(sizes.text_ffn, dim, dim**-0.5),
            "ffn.fc1.weight": normal(sizes.text_ffn, dim, dim**-0.5),
            "ffn.fc2.weight": normal(dim, sizes.text_ffn, sizes.text_ffn**-0.5),
            "pos_embedding.embedding.weight": normal(BUCKETS, sizes.text_heads, NEARNESS),
        }
        tensors |= {f"blocks.{index}.{name}": tensor for name, tensor in block.items()}
    encoder = build_text_encoder(tensors, None, "a new text encoder", torch.float32)
    encoder.requires_grad_(True)
    return encoder


def read_encoder(path: Path) -> TextEncoder:
    return build_text_encoder(read_weights(path), None, path.name, torch.float32)


def save_encoder(folder: Path, transformer: nn.Module, spiece_model: bytes) -> None:
    tensors = official_tensors(transformer)
    tensors["spiece_model"] = bytes_tensor(spiece_model)
    save_weights(folder / TEXT, tensors)


def official_tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """The encoder's tensors under official names; the embedding's second name is left out."""
    tensors = {}
    for name, tensor in transformer.state_dict().items():
        for pattern, official in NAMES:
            if match := re.fullmatch(pattern, name):
                tensors[match.expand(official)] = tensor
    return tensors


def bytes_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
