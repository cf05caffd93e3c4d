"""Small UMT5 encoders and SentencePiece models, made on the spot."""

from __future__ import annotations

import io
import math
from functools import cache

import torch
from torch import Tensor

from lightx2v_core.text.tokenizer import PromptTokenizer
from lightx2v_core.text.umt5 import TextEncoder, build_text_encoder

SENTENCES = (
    "a red fox runs over the hill",
    "a small dog sleeps on the mat, and nobody wakes it",
    "the sea shines at night; a boat waits",
    "红色的狐狸在雪地里奔跑",
    "一只小狗在窗边睡觉。",
    "emoji 😀 and fire 🔥 in a prompt",
    "café naïve Ünïcode 2.2",
)


@cache
def spiece_model() -> bytes:
    """A unigram model with the ids of UMT5: pad 0, end 1, unknown 2, no begin."""
    return _train(pad_id=0, eos_id=1, unk_id=2)


@cache
def foreign_spiece_model() -> bytes:
    """One with the ids of another family."""
    return _train(pad_id=3, eos_id=2, unk_id=0)


def _train(**special_ids: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
        **special_ids,
    )
    return model.getvalue()


def tokenizer() -> PromptTokenizer:
    return PromptTokenizer.from_sentencepiece(spiece_model(), "spiece.model")


def spiece_tensor() -> Tensor:
    return torch.frombuffer(bytearray(spiece_model()), dtype=torch.uint8)


def official_shapes(
    dim: int = 32, heads: int = 4, ffn_dim: int = 48, layers: int = 2, vocab: int = 300
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the official .pth has them; heads are 64 wide at full size, 16 here."""
    inner = heads * (64 if dim == 4096 else 16)
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocab, dim)}
    for block in (f"blocks.{layer}." for layer in range(layers)):
        shapes |= {
            f"{block}norm1.weight": (dim,),
            f"{block}attn.q.weight": (inner, dim),
            f"{block}attn.k.weight": (inner, dim),
            f"{block}attn.v.weight": (inner, dim),
            f"{block}attn.o.weight": (dim, inner),
            f"{block}norm2.weight": (dim,),
            f"{block}ffn.gate.0.weight": (ffn_dim, dim),
            f"{block}ffn.fc1.weight": (ffn_dim, dim),
            f"{block}ffn.fc2.weight": (dim, ffn_dim),
            f"{block}pos_embedding.embedding.weight": (32, heads),
        }
    return shapes | {"norm.weight": (dim,)}


def official_tensors(dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return (1.0 + 0.1 * noise).to(dtype)
        is_table = "embedding" in name
        return (noise if is_table else noise / math.sqrt(shape[1])).to(dtype)

    return {name: draw(name, shape) for name, shape in official_shapes(**sizes).items()}


def hugging_face_tensors(prefix: str = "", **sizes: int) -> dict[str, Tensor]:
    """The same weights under the names of Hugging Face, written out by hand."""
    parts = {
        "norm1": "0.layer_norm",
        "attn.q": "0.SelfAttention.q",
        "attn.k": "0.SelfAttention.k",
        "attn.v": "0.SelfAttention.v",
        "attn.o": "0.SelfAttention.o",
        "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
        "norm2": "1.layer_norm",
        "ffn.gate.0": "1.DenseReluDense.wi_0",
        "ffn.fc1": "1.DenseReluDense.wi_1",
        "ffn.fc2": "1.DenseReluDense.wo",
    }
    whole = {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
    }
    renamed = {}
    for name, tensor in official_tensors(**sizes).items():
        if name in whole:
            renamed[prefix + whole[name]] = tensor
            continue
        _, block, part = name.removesuffix(".weight").split(".", 2)
        renamed[f"{prefix}encoder.block.{block}.layer.{parts[part]}.weight"] = tensor
    return renamed


def tiny_encoder(dtype: torch.dtype = torch.float32) -> TextEncoder:
    return build_text_encoder(official_tensors(dtype), tokenizer(), "tiny.pth")
