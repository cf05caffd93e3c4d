"""Files written in 8 bits: read back by our loader and by the safetensors library."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightx2v_core.assemble import load_text_encoder, load_transformer
from lightx2v_core.checkpoint.convert import quantise_file
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.cli import main
from lightx2v_core.errors import CheckpointError, RequestError
from lightx2v_core.quant.quantise import WRITTEN
from tests.conftest import relative_error, tiny_inputs, tiny_model
from tests.unit.text.samples import hugging_face_tensors, official_tensors, spiece_tensor

SCHEMES = {"fp8": "fp8-row", "fp8-tensor": "fp8-tensor", "int8": "int8-row"}
# Half a step of the grid over the largest value: 1/16 of a value's binade, 1/254 of the row.
WEIGHT_ERRORS = {"fp8": 0.04, "fp8-tensor": 0.04, "int8": 0.01}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {k: v.to(torch.bfloat16) for k, v in tiny_model().state_dict().items()}
    prefixed = {f"model.diffusion_model.{k}": v for k, v in tensors.items()}
    save_file(prefixed, tmp_path / "wan2.1_t2v_lightx2v_4step.safetensors")
    return tmp_path / "wan2.1_t2v_lightx2v_4step.safetensors"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_file_is_detected_smaller_and_near_its_source(source, tmp_path, scheme):
    target = tmp_path / "new" / "q.safetensors"

    quantise_file(source, target, scheme)

    loaded, plain = load_transformer(target), load_transformer(source)
    assert (loaded.info.scheme, loaded.info.layout) == (SCHEMES[scheme], "official")
    assert target.stat().st_size < 0.75 * source.stat().st_size
    weight = loaded.model.blocks[1].ffn[0].dequantise(torch.float32)
    assert relative_error(weight, plain.model.blocks[1].ffn[0].weight) < WEIGHT_ERRORS[scheme]
    inputs = tiny_inputs(plain.model.config, batch=1)
    with torch.inference_mode():
        assert relative_error(loaded.model(**inputs), plain.model(**inputs)) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [official_tensors, hugging_face_tensors])
def test_a_text_encoder_is_written_with_codes_in_its_linears_alone(tmp_path, scheme, make):
    tensors = {name: tensor.bfloat16() for name, tensor in make().items()}
    save_file(tensors | {"spiece_model": spiece_tensor()}, tmp_path / "umt5.safetensors")

    quantise_file(tmp_path / "umt5.safetensors", tmp_path / "q.safetensors", scheme)

    headers = open_checkpoint(tmp_path / "q.safetensors").headers
    codes = {name for name, header in headers.items() if header.dtype in ("I8", "F8_E4M3")}
    codes.discard("scaled_fp8")
    assert len(codes) == 2 * 7, "q k v o, gate, fc1, fc2 of two blocks"
    assert not any("pos_embedding" in name or "relative" in name for name in codes)
    encoders = [load_text_encoder(tmp_path / f"{n}.safetensors") for n in ("umt5", "q")]
    plain, packed = (encoder.encode(["a red fox"]) for encoder in encoders)
    assert 0 < relative_error(packed, plain) < 0.1
    with pytest.raises(CheckpointError, match="text encoder, .* give a Wan transformer in"):
        quantise_file(tmp_path / "umt5.safetensors", tmp_path / "q.gguf", "gguf-Q8_0")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_safetensors_library_reads_what_was_written(source, tmp_path, scheme):
    quantise_file(source, tmp_path / "q.safetensors", scheme)

    with safe_open(tmp_path / "q.safetensors", framework="pt") as file:
        names = set(file.keys())
        codes = file.get_tensor("blocks.0.self_attn.q.weight")
        scale = file.get_tensor(f"blocks.0.self_attn.q.{WRITTEN[scheme].scale_leaf}")
        norm = file.get_tensor("blocks.0.norm3.weight")
        metadata = file.metadata()

    assert codes.dtype == WRITTEN[scheme].dtype
    assert scale.dtype == torch.float32
    assert tuple(scale.shape) == ((256, 1) if WRITTEN[scheme].by_row else ())
    assert norm.dtype == torch.bfloat16
    assert ("scaled_fp8" in names) == (scheme == "fp8-tensor")
    assert metadata == {"lightx2v.quantised": scheme}


def test_rows_of_zeros_stay_zeros():
    codes, scale = WRITTEN["fp8"].quantise(torch.zeros(4, 8))

    assert torch.equal(codes.float() * scale, torch.zeros(4, 8))


def test_the_largest_value_of_each_row_is_exact_but_for_its_scale():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))

    for scheme in WRITTEN.values():
        codes, scale = scheme.quantise(weight)
        largest = (codes.float() * scale).abs().amax()
        torch.testing.assert_close(largest, weight.abs().amax(), rtol=1e-6, atol=0)


def test_a_target_that_exists_is_left_alone(source, tmp_path):
    (tmp_path / "q.safetensors").write_bytes(b"mine")

    with pytest.raises(RequestError, match="exists already; remove it or choose another name"):
        quantise_file(source, tmp_path / "q.safetensors", "fp8")

    assert (tmp_path / "q.safetensors").read_bytes() == b"mine"


def test_what_cannot_be_quantised_is_refused(source, tmp_path):
    quantise_file(source, tmp_path / "q.safetensors", "fp8")
    save_file({"decoder.middle.0.residual.0.gamma": torch.ones(4)}, tmp_path / "vae.safetensors")

    with pytest.raises(
        CheckpointError, match="fp8-row, .* give a Wan transformer or UMT5 encoder in"
    ):
        quantise_file(tmp_path / "q.safetensors", tmp_path / "r.safetensors", "int8")
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is vae"):
        quantise_file(tmp_path / "vae.safetensors", tmp_path / "r.safetensors", "int8")
    with pytest.raises(RequestError, match="'fp4' cannot be written; use fp8, fp8-tensor, int8"):
        quantise_file(source, tmp_path / "r.safetensors", "fp4")
    with pytest.raises(RequestError, match=r"r\.safetensors must end in \.gguf"):
        quantise_file(source, tmp_path / "r.safetensors", "gguf-Q8_0")


@pytest.mark.parametrize(("scheme", "name"), [("fp8", "q.safetensors"), ("gguf-Q8_0", "q.gguf")])
def test_an_exception_on_the_way_leaves_nothing_half_written(source, tmp_path, scheme, name):
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise_file(source, tmp_path / "new" / name, scheme, stop)

    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(("scheme", "name"), [("fp8", "q.safetensors"), ("gguf-Q8_0", "q.gguf")])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(source, tmp_path, scheme, name):
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tiny)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(
            CheckpointError, match=r"could not be written \(.*it needs \d\.\d+ MB: free"
        ):
            quantise_file(source, tiny / name, scheme)

        assert list(tiny.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tiny)], check=True)


def test_the_command_writes_and_tells_the_size(source, tmp_path, capsys):
    target = tmp_path / "q.safetensors"

    code = main(["quantize", str(source), str(target), "--scheme", "int8"])

    assert code == 0
    assert "q.safetensors: int8, 0.00 GB" in capsys.readouterr().out
    assert load_transformer(target).info.scheme == "int8-row"
