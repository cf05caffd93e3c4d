"""The SentencePiece model of the demo, learnt from its captions, and captions as id rows."""

from __future__ import annotations

import io
from collections.abc import Sequence
from random import Random

import torch
from torch import Generator, Tensor

from lightx2v_core.text.tokenizer import EOS, PAD

from .captions import caption, plain_prompt, stories
from .world import sample_scenes
from .worlds import PLAIN, World

MAX_PIECES = 512


def learn_pieces(seed: int, count: int = 6000, world: World = PLAIN) -> bytes:
    """The content of a spiece.model with T5's special ids (pad 0, end 1, unknown 2)."""
    from sentencepiece import SentencePieceTrainer

    told = stories(sample_scenes(count, Generator().manual_seed(seed), world))
    rng = Random(seed)
    corpus = [caption(story, rng) for story in told] + [plain_prompt(story) for story in told]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()-"
    corpus += [" ".join(letters), *letters] * 4
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=MAX_PIECES,
        hard_vocab_limit=False,
        model_type="bpe",  # whole words, since they are few
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",  # folds case
        pad_id=PAD,
        eos_id=EOS,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class CaptionRows:
    """Captions to rows of ids, as the product's tokenizer spells them."""

    def __init__(self, model: bytes, world: World = PLAIN) -> None:
        from sentencepiece import SentencePieceProcessor

        self._pieces = SentencePieceProcessor(model_proto=model)
        self.model = model
        self.tokens = world.text_tokens

    @property
    def size(self) -> int:
        return self._pieces.vocab_size()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """B x `tokens` int64: ids, EOS, padding."""
        rows = torch.full((len(captions), self.tokens), PAD, dtype=torch.int64)
        for row, ids in enumerate(self._pieces.encode(list(captions))):
            spelt = [*ids[: self.tokens - 2], EOS]  # one column of padding stays
            rows[row, : len(spelt)] = torch.tensor(spelt)
        return rows
