"""The vocabulary that llama.cpp copies into GGUF files, back into the SentencePiece model it was.

https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from ..errors import CheckpointError

UNIGRAM, BYTE_PIECE = 1, 6  # TrainerSpec.ModelType; SentencePiece.Type, which GGUF shares
# What decides how text is cut: its metadata key and the number of NormalizerSpec's field.
NORMALIZER_FIELDS = (("add_space_prefix", 3), ("remove_extra_whitespaces", 4))


def spiece_model(
    fields: Callable[[str], object], arrays: Callable[[str], Sequence | None], source: str
) -> bytes | None:
    """The content of a spiece.model, None where the file embeds no Unigram vocabulary.

    `fields` and `arrays` give metadata of the file by key, None where it has none. Raises
    CheckpointError for a vocabulary whose parts do not fit together.
    """

    def array(key: str) -> Sequence | None:
        return arrays(f"tokenizer.ggml.{key}")

    tokens, scores, types = array("tokens"), array("scores"), array("token_type")
    if fields("tokenizer.ggml.model") != "t5" or tokens is None or scores is None or types is None:
        return None
    if not len(tokens) == len(scores) == len(types):
        raise CheckpointError(
            f"{source} embeds a damaged tokenizer: {len(tokens)} tokens, {len(scores)} scores and "
            f"{len(types)} types; download it again or name a tokenizer"
        )
    pieces = b"".join(
        _message(1, _text(1, token) + _float(2, score) + _number(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    trainer = _number(3, UNIGRAM) + _number(4, len(tokens))
    trainer += _number(35, int(BYTE_PIECE in types))  # byte_fallback
    normalizer = b""
    if charsmap := array("precompiled_charsmap"):
        normalizer += _message(2, bytes(value & 255 for value in charsmap))
    for key, number in NORMALIZER_FIELDS:
        value = fields(f"tokenizer.ggml.{key}")
        normalizer += _number(number, 1 if value is None else int(bool(value)))
    ids = (("unknown_token_id", 40), ("eos_token_id", 42), ("padding_token_id", 43))
    for key, number in ids:
        value = fields(f"tokenizer.ggml.{key}")
        if isinstance(value, int):
            trainer += _number(number, value)
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _varint(number: int) -> bytes:
    """Seven bits a byte, lowest first; negative numbers as 64-bit two's complement."""
    number &= 2**64 - 1
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    return bytes([*written, number])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())
