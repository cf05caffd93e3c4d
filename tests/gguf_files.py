"""GGUF files as ComfyUI-GGUF's converter lays them out, written by the package gguf."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from tests.ggml_blocks import random_blocks
from tests.unit.text.samples import hugging_face_tensors, spiece_model


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.startswith("blocks.") and name.endswith("weight") and tensor.ndim == 2


def blocks_like(tensor: Tensor, kind: str, seed: int) -> np.ndarray:
    """Random blocks in place of a matrix, (rows, bytes), of about the size of its numbers."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = random_blocks(kind, tensor.numel() // elements, seed, 0.02 / math.sqrt(elements))
    return blocks.reshape(tensor.shape[0], tensor.shape[1] // elements * nbytes)


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    kind_of: Callable[[str, Tensor], str],
    architecture: str = "wan",
    fields: Mapping[str, object] | None = None,
) -> dict[str, np.ndarray]:
    """Write `tensors`, those that `kind_of` gives a block type as random blocks; their numbers."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (fields or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, tuple: writer.add_array}
        add[type(value)](key, value)
    numbers = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        kind = gguf.GGMLQuantizationType[kind_of(name, tensor)]
        if kind.name in ("F32", "F16", "BF16"):
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
        else:
            data = blocks_like(tensor, kind.name, seed)
        numbers[name] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


def write_encoder(
    path: Path,
    kind: str = "F32",
    dim: int = 32,
    vocabulary: bool = True,
    model: bytes | None = None,
) -> None:
    """A tiny UMT5 encoder, named and with its vocabulary stored as llama.cpp's converter does.

    Names come from the package's own table of T5 encoders; the order of operations for the
    vocabulary is that of T5Model in convert_hf_to_gguf.py.
    """
    tensors = hugging_face_tensors(dim=dim, ffn_dim=64)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    writer = gguf.GGUFWriter(path, "t5encoder")
    if vocabulary:
        _add_vocabulary(writer, model or spiece_model(), len(tensors["shared.weight"]))
    for name, tensor in tensors.items():
        is_matrix = tensor.ndim == 2 and "bias" not in name
        type_ = gguf.GGMLQuantizationType[kind if is_matrix else "F32"]
        renamed = table.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(renamed, gguf.quants.quantize(tensor.numpy(), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, model: bytes, length: int) -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_proto=model)
    tokens = [f"[PAD{n}]" for n in range(length)]
    scores, types = [-10000.0] * length, [5] * length
    for n in range(pieces.vocab_size()):
        tokens[n], scores[n] = pieces.id_to_piece(n), pieces.get_score(n)
        flags = (pieces.is_unknown(n), pieces.is_control(n), False, pieces.is_unused(n))
        types[n] = 2 + flags.index(True) if any(flags) else 6 if pieces.is_byte(n) else 1
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    if charsmap := _charsmap(model):
        writer.add_precompiled_charsmap(charsmap)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(0)


def _charsmap(model: bytes) -> bytes:
    """normalizer_spec (field 3) . precompiled_charsmap (field 2) of a serialised SentencePiece."""
    return _messages(_messages(model)[3])[2]


def _messages(content: bytes) -> dict[int, bytes]:
    """Length-delimited fields of a protocol buffer by number; of repeated ones the last."""
    found, at = {}, 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(content):
        tag = varint()
        if tag & 7 == 2:
            length = varint()
            found[tag >> 3] = content[at : at + length]
            at += length
        elif tag & 7 == 0:
            varint()
        else:
            at += 4  # a float
    return found
