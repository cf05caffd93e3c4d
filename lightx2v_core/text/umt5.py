"""The UMT5 text encoder of Wan, around the one in transformers. Reads no files.

Sizes come from the shapes of the tensors; names may be those of the official release
(`blocks.0.attn.q.weight`), of Hugging Face (`encoder.block.0.layer.0.SelfAttention.q.weight`) or of
llama.cpp (`enc.blk.0.attn_q.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, preview
from ..ops.placing import place
from ..quant.dequantise import CODES, Codes, with_codes
from .clean import clean_prompt
from .stored import StoredEmbedding, StoredLinear, turned
from .tokenizer import EOS, PAD, SPIECE_MODEL, PromptTokenizer, embedded_tokenizer

if TYPE_CHECKING:
    from transformers import UMT5Config, UMT5EncoderModel

WHAT = "UMT5 text encoder"
TIED_EMBEDDING = "encoder.embed_tokens.weight"
BLOCK = re.compile(r"encoder\.block\.(\d+)\.")
# Last parts of names that are no weights: the tokenizer, and the mark of scaled fp8.
NOT_WEIGHTS = (SPIECE_MODEL, "scaled_fp8")

Names = tuple[tuple[str, str], ...]
# (pattern, replacement) from official names to those of transformers.
OFFICIAL_NAMES = (
    (r"token_embedding\.weight", "shared.weight"),
    (r"norm\.weight", "encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (
        r"blocks\.(\d+)\.attn\.([qkvo])\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
    ),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (
        r"blocks\.(\d+)\.ffn\.gate\.0\.weight",
        r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    ),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)

# The same from llama.cpp's names: MODEL_TENSORS of T5ENCODER in gguf-py/gguf/constants.py.
LLAMA_CPP_NAMES = (
    (r"token_embd\.weight", "shared.weight"),
    (r"enc\.output_norm\.weight", "encoder.final_layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.attn_norm\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.ffn_norm\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (
        r"enc\.blk\.(\d+)\.attn_([qkvo])\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
    ),
    (
        r"enc\.blk\.(\d+)\.attn_rel_b\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (
        r"enc\.blk\.(\d+)\.ffn_gate\.weight",
        r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    ),
    (
        r"enc\.blk\.(\d+)\.ffn_up\.weight",
        r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight",
    ),
    (
        r"enc\.blk\.(\d+)\.ffn_down\.weight",
        r"encoder.block.\1.layer.1.DenseReluDense.wo.weight",
    ),
)
# Of the first block's bias table: (name, how the names of that layout become transformers'). Every
# block of UMT5 has one; the names also tell it from the text half of Wan's CLIP file.
BIAS_TABLES: tuple[tuple[str, Names], ...] = (
    ("blocks.0.pos_embedding.embedding.weight", OFFICIAL_NAMES),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", ()),
    ("enc.blk.0.attn_rel_b.weight", LLAMA_CPP_NAMES),
)


class Stranger(NamedTuple):
    """A file that people give in place of a UMT5 encoder, told by the end of one name."""

    suffix: str
    is_what: str
    advice: str


STRANGERS = (
    Stranger(
        "cross_attn.k.weight",
        "a Wan transformer",
        "load it as the model and give umt5_xxl as the text encoder",
    ),
    Stranger(
        "visual.patch_embedding.weight",
        "the CLIP image encoder",
        "load it as CLIP vision and give umt5_xxl as the text encoder",
    ),
    Stranger(
        "vision_model.embeddings.patch_embedding.weight",
        "a CLIP image encoder",
        "load it as CLIP vision and give umt5_xxl as the text encoder",
    ),
    Stranger(
        "text_model.embeddings.token_embedding.weight",
        "a CLIP text encoder",
        "Wan needs umt5_xxl",
    ),
    Stranger("decoder.conv1.weight", "a VAE", "Wan needs umt5_xxl as its text encoder"),
    Stranger("model.embed_tokens.weight", "a language model", "Wan needs umt5_xxl"),
)


class TextEncoder(nn.Module):
    """Prompts to text states. `encode` is `tokenize` followed by `encode_ids`."""

    def __init__(self, transformer: UMT5EncoderModel, tokenizer: PromptTokenizer) -> None:
        super().__init__()
        self.transformer = transformer
        self.tokenizer = tokenizer

    @property
    def text_dim(self) -> int:
        return self.transformer.shared.embedding_dim

    @property
    def device(self) -> torch.device:
        """Where it computes; the table of the tokens may stay elsewhere."""
        return self.transformer.encoder.final_layer_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        table = self.transformer.shared
        return getattr(table, "dtype", table.weight.dtype)

    @property
    def turning_bytes(self) -> int:
        """What turning the largest matrix that is kept as stored takes for a moment."""
        kept = (module for module in self.modules() if isinstance(module, StoredLinear))
        return max((layer.turning_bytes for layer in kept), default=0)

    @property
    def bytes(self) -> int:
        """Memory of the weights; the embedding, reachable by two names, counts once."""
        return sum(weight.nbytes for weight in (*self.parameters(), *self.buffers()))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.encoder.block

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """States BSE with S = 512: one per token including EOS, then zeros."""
        return self.encode_ids(*self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, both (B, 512), of the cleaned prompts."""
        return self.tokenizer([clean_prompt(prompt) for prompt in prompts])

    @torch.no_grad()
    def encode_ids(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """States BSE as long as the ids, zero wherever the mask is; padding is on the right.

        Only the columns that some prompt uses are computed: padding is masked in attention, so
        what is left out changes nothing.
        """
        length = ids_BS.shape[1]
        used = int(mask_BS.sum(dim=1).max())
        table = self.transformer.shared
        # Of its rows a prompt needs no more than 512, 4 MB of 2.1 GB: they travel, not the table.
        rows_BSE = table(ids_BS[:, :used].to(table.weight.device)).to(self.device)
        mask = mask_BS[:, :used].to(self.device)
        states = self.transformer(inputs_embeds=rows_BSE, attention_mask=mask).last_hidden_state
        states = states.masked_fill(mask[..., None] == 0, 0.0)
        return F.pad(states, (0, 0, 0, length - used))


def build_text_encoder(
    tensors: Mapping[str, Tensor],
    tokenizer: PromptTokenizer | None,
    source: str,
    dtype: torch.dtype | None = None,
    as_stored: bool = False,
) -> TextEncoder:
    """From the tensors of a file named `source`; they are used as they are where dtype agrees.

    No tokenizer means the one the tensors embed; no dtype means that of the file's linears, or
    bfloat16 for codes. `as_stored` turns matrices of another type at every use, not now: the same
    numbers, with the file mapped.
    """
    found = _transformers_weights(tensors, source)
    weights = {k: v.codes if isinstance(v, Codes) else v for k, v in found.items()}
    if tokenizer is None:
        tokenizer = embedded_tokenizer(tensors, source)
    config = _make_config(weights, source)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{tokenizer.origin} knows {tokenizer.vocab_size} tokens, {source} only "
            f"{config.vocab_size}; give the tokenizer that belongs to this encoder"
        )
    transformer = _build_transformer(config)
    first = weights["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype
    dtype = dtype or (torch.bfloat16 if first in CODES else first)
    kept = _keep_stored(transformer, found, dtype) if as_stored else {}
    cast = kept | {name: turned(w, _dtype_of(name, dtype)) for name, w in found.items()}
    place(transformer, cast | {TIED_EMBEDDING: cast["shared.weight"]}, source, WHAT)
    return TextEncoder(transformer, tokenizer)


def check_text_encoder(names: Iterable[str], source: str) -> None:
    """Raise CheckpointError for a file of another kind, before its tensors are read."""
    _detect_layout(names, source)


def _transformers_weights(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor | Codes]:
    """The tensors of the encoder by their names in transformers; what is unknown keeps its own."""
    prefix, names = _detect_layout(tensors, source)
    # With a prefix the file holds other models too, which are not ours to judge.
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and name.rpartition(".")[2] not in NOT_WEIGHTS
    }
    weights = {
        _transformers_name(name, names): tensor
        for name, tensor in with_codes(own, source, WHAT).items()
    }
    # One table under two names; files hold either or both.
    embedding = weights.pop(TIED_EMBEDDING, None)
    if embedding is not None:
        weights.setdefault("shared.weight", embedding)
    is_shared_bias = "encoder.block.1.layer.0.SelfAttention.q.weight" in weights and (
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" not in weights
    )
    if is_shared_bias and names is not OFFICIAL_NAMES:
        raise CheckpointError(
            f"{source} is a T5 v1.1 text encoder such as T5-XXL, with one position bias for all "
            "blocks; Wan needs umt5_xxl"
        )
    return weights


def _detect_layout(stored: Iterable[str], source: str) -> tuple[str, Names]:
    """The prefix of the encoder's names, and how the rest of them become those of transformers."""
    stored = list(stored)
    for table, names in BIAS_TABLES:
        for name in stored:
            if name == table or name.endswith(f".{table}"):
                return name.removesuffix(table), names
    for suffix, is_what, advice in STRANGERS:
        if any(name.endswith(suffix) for name in stored):
            raise CheckpointError(f"{source} is {is_what}, not a {WHAT}; {advice}")
    raise CheckpointError(
        f"{source} is not a {WHAT}: it holds {preview(stored) or 'nothing'}; give umt5_xxl"
    )


def _transformers_name(stored: str, names: Names) -> str:
    for pattern, name in names:
        if match := re.fullmatch(pattern, stored):
            return match.expand(name)
    return stored


def _make_config(weights: Mapping[str, Tensor], source: str) -> UMT5Config:
    from transformers import UMT5Config

    attention = "encoder.block.0.layer.0.SelfAttention."
    bias_name = f"{attention}relative_attention_bias.weight"
    gate_name = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    needed = ("shared.weight", f"{attention}q.weight", bias_name, gate_name)
    if missing := [name for name in needed if name not in weights]:
        raise CheckpointError(
            f"{source} is not a whole {WHAT}: it lacks {preview(missing)}; download the file again"
        )
    (vocab_size, dim), (inner_dim, _), (buckets, heads), (ffn_dim, _) = (
        weights[name].shape for name in needed
    )
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=inner_dim // heads,
        d_ff=ffn_dim,
        num_layers=1 + max(int(match[1]) for name in weights if (match := BLOCK.match(name))),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,  # beyond it all distances share a bucket
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )


def _build_transformer(config: UMT5Config) -> UMT5EncoderModel:
    from transformers import UMT5EncoderModel

    with torch.device("meta"):
        transformer = UMT5EncoderModel(config)
    transformer.set_input_embeddings(transformer.shared)
    return transformer


def _keep_stored(
    transformer: UMT5EncoderModel, found: dict[str, Tensor | Codes], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Put in layers that turn their matrix at every use, for those of another type; takes their
    weights out of `found` and returns them by their new names. Wrong shapes are left in it."""
    kept: dict[str, Tensor] = {}
    for name, module in list(transformer.named_modules()):
        weight, wanted = found.get(f"{name}.weight"), _dtype_of(f"{name}.weight", dtype)
        stored = weight.codes if isinstance(weight, Codes) else weight
        if weight is None or stored is None or stored.shape != module.weight.shape:
            continue
        if isinstance(weight, Tensor) and weight.dtype == wanted:
            continue
        if isinstance(module, nn.Linear):
            layer = StoredLinear(weight, wanted)
            parent, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(parent), leaf, layer)
            kept |= {f"{name}.{part}": tensor for part, tensor in layer.named_buffers()}
            del found[f"{name}.weight"]
        elif module is transformer.shared and stored.dtype not in CODES:
            transformer.set_input_embeddings(StoredEmbedding(stored, wanted))
            kept[f"{name}.weight"] = stored
            del found[f"{name}.weight"]
    return kept


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The last linear of a feed-forward overflows in float16; transformers keeps it in float32."""
    return torch.float32 if dtype == torch.float16 and name.endswith(".wo.weight") else dtype
