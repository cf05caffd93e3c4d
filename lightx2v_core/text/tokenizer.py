"""Prompts to UMT5 token ids, from a SentencePiece model or a tokenizer.json. Cleans nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CapabilityError, CheckpointError

MAX_TOKENS = 512
PAD, EOS = 0, 1
SPIECE_MODEL = "spiece_model"
SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_FILES = (*SENTENCEPIECE_FILES, TOKENIZER_JSON)
# Below the encoder's folder; the official release keeps its tokenizer in the first.
TOKENIZER_FOLDERS = ("google/umt5-xxl", "umt5-xxl", "tokenizer", ".")
# Beside it, for layouts with one folder per component.
SIBLING_FOLDERS = ("google/umt5-xxl", "tokenizer")


@dataclass(frozen=True, slots=True, eq=False)
class PromptTokenizer:
    """Spells prompts in pieces, ends each with EOS and pads it."""

    spell: Callable[[str], list[int]]  # without EOS
    vocab_size: int
    origin: str  # the file it came from, for messages

    @classmethod
    def from_sentencepiece(cls, model: bytes, origin: str) -> PromptTokenizer:
        """`model` is the content of a spiece.model file."""
        _require("sentencepiece")
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise CheckpointError(
                f"{origin} is not a SentencePiece model ({len(model)} bytes); "
                "give the spiece.model of google/umt5-xxl"
            ) from error
        _check_specials(pieces.pad_id(), pieces.eos_id(), origin)
        return cls(pieces.encode, pieces.vocab_size(), origin)

    @classmethod
    def from_tokenizer_json(cls, path: Path) -> PromptTokenizer:
        """The other form in which google/umt5-xxl is published."""
        _require("tokenizers")
        from tokenizers import Tokenizer

        content = path.read_text("utf-8", errors="replace")
        if not content.lstrip().startswith("{") or '"model"' not in content:
            raise CheckpointError(
                f"{path} is not a tokenizer of the tokenizers package; "
                "give the tokenizer.json of google/umt5-xxl"
            )
        tokenizer = Tokenizer.from_str(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_specials(tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>"), str(path))
        return cls(
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            tokenizer.get_vocab_size(),
            str(path),
        )

    @classmethod
    def from_path(cls, path: Path) -> PromptTokenizer:
        """A SentencePiece model, or a tokenizer.json."""
        if path.suffix == ".json":
            return cls.from_tokenizer_json(path)
        return cls.from_sentencepiece(path.read_bytes(), str(path))

    def __call__(
        self, prompts: Sequence[str], max_length: int = MAX_TOKENS
    ) -> tuple[Tensor, Tensor]:
        """Ids and mask, both BS int64 with S = max_length; a long prompt is cut before its EOS."""
        ids_BS = torch.full((len(prompts), max_length), PAD, dtype=torch.int64)
        mask_BS = torch.zeros_like(ids_BS)
        for row, prompt in enumerate(prompts):
            ids = [*self.spell(prompt)[: max_length - 1], EOS]
            ids_BS[row, : len(ids)] = torch.tensor(ids)
            mask_BS[row, : len(ids)] = 1
        return ids_BS, mask_BS


def read_tokenizer(
    encoder_path: Path, tensors: Mapping[str, Tensor], given: Path | None = None
) -> PromptTokenizer:
    """The tokenizer of one encoder: `given`, else embedded in its tensors, else a file near it."""
    if given is None and _spiece_models(tensors):
        return embedded_tokenizer(tensors, encoder_path.name)
    return PromptTokenizer.from_path(find_tokenizer(encoder_path, given))


def embedded_tokenizer(tensors: Mapping[str, Tensor], source: str) -> PromptTokenizer:
    """From the uint8 tensor `spiece_model` that text encoder files for ComfyUI carry."""
    names = _spiece_models(tensors)
    if not names:
        raise CheckpointError(
            f"{source} embeds no tokenizer (a tensor {SPIECE_MODEL}); give one by its path"
        )
    model = tensors[names[0]].to("cpu", torch.uint8).contiguous().numpy().tobytes()
    return PromptTokenizer.from_sentencepiece(model, f"{names[0]} in {source}")


def find_tokenizer(encoder_path: Path, given: Path | None = None) -> Path:
    """A tokenizer file: `given` itself or in that folder, else in or beside the encoder's."""
    if given is not None and given.is_file():
        return given
    if given is not None:
        folders = [given / name for name in TOKENIZER_FOLDERS]
    else:
        home = encoder_path if encoder_path.is_dir() else encoder_path.parent
        folders = [home / name for name in TOKENIZER_FOLDERS]
        folders += [home.parent / name for name in SIBLING_FOLDERS]
    for folder in folders:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    looked_in = ", ".join(str(folder) for folder in folders)
    raise CheckpointError(
        f"no UMT5 tokenizer for {encoder_path.name}: it embeds none, and {looked_in} hold none of "
        f"{', '.join(TOKENIZER_FILES)}; put spiece.model of google/umt5-xxl beside it, "
        "or use an encoder file with the tensor spiece_model"
    )


def _spiece_models(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.rpartition(".")[2] == SPIECE_MODEL]


def _check_specials(pad: int | None, eos: int | None, origin: str) -> None:
    if (pad, eos) != (PAD, EOS):
        raise CheckpointError(
            f"{origin} has pad id {pad} and end id {eos}, UMT5 has {PAD} and {EOS}; "
            "give the tokenizer of google/umt5-xxl"
        )


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise CapabilityError(
            f"the tokenizer needs the package {package}, which is not installed; "
            f"run: pip install {package}"
        )
