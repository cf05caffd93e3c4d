"""Small random model files under official names, written by whichever Python imports this."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CORPUS = [
    "a red circle moving right on a dark background",
    "a blue square moves up and a green triangle turns slowly to the left",
    "the quick brown fox jumps over the lazy dog while seven wizards vex kittens",
]


def spiece_model(vocab_size: int = 48) -> bytes:
    """A SentencePiece model with UMT5's special ids."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=written,
        vocab_size=vocab_size,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return written.getvalue()


def umt5_tensors(dim: int = 64, seed: int = 5) -> dict[str, Tensor]:
    """A two-block UMT5 encoder with its tokenizer, named as in Comfy-Org's files."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    vocab, heads, inner, ffn = 48, 2, 64, 128
    tensors = {
        "shared.weight": randn(vocab, dim) * dim**0.5,
        "encoder.final_layer_norm.weight": torch.ones(dim),
    }
    for n in range(2):
        block = f"encoder.block.{n}.layer."
        for name, shape in {
            "0.SelfAttention.q": (inner, dim),
            "0.SelfAttention.k": (inner, dim),
            "0.SelfAttention.v": (inner, dim),
            "0.SelfAttention.o": (dim, inner),
            "0.SelfAttention.relative_attention_bias": (32, heads),
            "1.DenseReluDense.wi_0": (ffn, dim),
            "1.DenseReluDense.wi_1": (ffn, dim),
            "1.DenseReluDense.wo": (dim, ffn),
        }.items():
            tensors[f"{block}{name}.weight"] = randn(*shape)
        for layer in (0, 1):
            tensors[f"{block}{layer}.layer_norm.weight"] = torch.ones(dim)
    tensors["spiece_model"] = torch.frombuffer(bytearray(spiece_model()), dtype=torch.uint8)
    return tensors


def write(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> Path:
    contiguous = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt", **metadata})
    return path


def write_gguf(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of the blocks in Q8_0, the rest in F32; returns the numbers they stand for."""
    meant, entries, chunks, offset = dict(tensors), b"", b"", 0
    for name, tensor in tensors.items():
        kind, data = 0, tensor.float().contiguous().numpy().tobytes()
        if name.startswith("blocks.") and name.endswith("weight") and tensor.ndim == 2:
            rows = tensor.reshape(-1, 32)
            scale = (rows.abs().amax(dim=1, keepdim=True) / 127).half()
            codes = (rows / scale.float()).round().clamp(-127, 127).to(torch.int8)
            meant[name] = (codes.float() * scale.float()).reshape(tensor.shape)
            kind = 8
            data = (
                torch.cat((scale.view(torch.uint8), codes.view(torch.uint8)), 1).numpy().tobytes()
            )
        axes = tensor.shape[::-1]
        entries += struct.pack("<Q", len(name)) + name.encode()
        entries += struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)
        chunks += data + bytes(-len(data) % 32)
        offset = len(chunks)
    field = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 3) + b"wan"
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + field + entries
    path.write_bytes(header + bytes(-len(header) % 32) + chunks)
    return meant
