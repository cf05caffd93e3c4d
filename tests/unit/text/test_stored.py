"""A text encoder that keeps its matrices as the file holds them gives the states of one that does
not, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core.assemble import load_text_encoder
from lightx2v_core.errors import CheckpointError
from lightx2v_core.memory.files import Mapped
from lightx2v_core.memory.residency import Residency
from lightx2v_core.text.stored import StoredEmbedding, StoredLinear
from tests.unit.text.samples import official_tensors, spiece_tensor

PROMPTS = ["a red fox runs", "一只小狗 sleeps on the mat"]
E4M3 = torch.float8_e4m3fn


def written(path: Path, form: str) -> Path:
    """A small encoder as people publish it: float16 throughout, or linears in fp8."""
    tensors = official_tensors(torch.float16, dim=64) | {"spiece_model": spiece_tensor()}
    if form != "fp16":
        for name in [n for n in tensors if ".attn." in n or ".ffn." in n]:
            weight = tensors[name].float()
            rows = {"fp8-row": 1, "fp8": (0, 1), "fp8-plain": None}[form]
            if rows is None:
                tensors[name] = weight.to(E4M3)
                continue
            scale = weight.abs().amax(dim=rows, keepdim=form == "fp8-row") / 448.0
            tensors[name] = (weight / scale).to(E4M3)
            tensors[f"{name.removesuffix('weight')}scale_weight"] = scale
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["fp16", "fp8", "fp8-row", "fp8-plain"])
def test_states_are_the_same_to_the_bit_and_matrices_stay_mapped(tmp_path, form, dtype):
    path = written(tmp_path / "umt5.safetensors", form)
    expected = load_text_encoder(path, dtype=dtype).encode(PROMPTS)

    kept = load_text_encoder(path, dtype=dtype, as_stored=True)
    states = kept.encode(PROMPTS)

    linears = [module for module in kept.modules() if isinstance(module, StoredLinear)]
    mapped = Mapped()
    assert torch.equal(states, expected) and states.dtype == dtype == kept.dtype
    assert len(linears) == 7 * len(kept.blocks)
    assert all(mapped.holds(linear.stored) for linear in linears)
    assert isinstance(kept.transformer.shared, StoredEmbedding)
    largest = max(linear.stored.numel() for linear in linears)
    extra = dtype.itemsize + (8 if form in ("fp8", "fp8-row") else 0)
    assert kept.turning_bytes == largest * extra


def test_only_what_is_of_another_type_than_is_computed_in_is_turned(tmp_path):
    path = written(tmp_path / "umt5.safetensors", "fp16")

    encoder = load_text_encoder(path, as_stored=True)

    assert encoder.dtype == torch.float16 and encoder.turning_bytes > 0, (
        "the last linear is float32"
    )
    assert sum(isinstance(module, StoredLinear) for module in encoder.modules()) == len(
        encoder.blocks
    )


def test_codes_stream_block_by_block_to_the_same_states(tmp_path):
    path = written(tmp_path / "umt5.safetensors", "fp8")
    encoder = load_text_encoder(path, dtype=torch.float32, as_stored=True)
    expected = encoder.encode(PROMPTS)
    engine = Residency(encoder, [path])
    engine.hook(encoder.blocks)

    engine.place("cpu", engine.card_bytes(0))
    states = encoder.encode(PROMPTS)
    engine.release()

    assert torch.equal(states, expected)


@pytest.mark.parametrize("kind", ["fp16", "fp32"])
def test_the_table_of_tokens_stays_in_ram_and_a_prompt_finds_its_rows_there(tmp_path, kind):
    path = tmp_path / "umt5.safetensors"
    tensors = official_tensors(getattr(torch, f"float{kind[2:]}"), dim=64)
    save_file(tensors | {"spiece_model": spiece_tensor()}, path)
    encoder = load_text_encoder(path, dtype=torch.float32, as_stored=True)
    expected = encoder.encode(PROMPTS)
    table, home = encoder.transformer.shared, encoder.transformer.shared.weight
    whole, engine = Residency(encoder), Residency(encoder, [path], apart=[table])

    engine.place("meta")
    placed = {n: p.device.type for n, p in encoder.named_parameters(remove_duplicate=False)}
    where = encoder.device.type
    engine.release()

    assert whole.total_bytes - engine.total_bytes == home.nbytes
    assert {n for n, kind in placed.items() if kind == "cpu"} == {
        "transformer.shared.weight",
        "transformer.encoder.embed_tokens.weight",
    }
    assert where == "meta" and table.weight is home
    assert torch.equal(encoder.encode(PROMPTS), expected)


def test_a_matrix_of_the_wrong_shape_is_refused_as_ever(tmp_path):
    tensors = official_tensors(torch.float16, dim=64) | {"spiece_model": spiece_tensor()}
    tensors["blocks.0.attn.o.weight"] = tensors["blocks.0.attn.o.weight"][:-1].contiguous()
    save_file(tensors, tmp_path / "umt5.safetensors")

    with pytest.raises(CheckpointError, match="has shape"):
        load_text_encoder(tmp_path / "umt5.safetensors", dtype=torch.bfloat16, as_stored=True)
