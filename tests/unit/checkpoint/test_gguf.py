"""GGUF transformers: read as they are, loaded with their blocks, or refused in words."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lightx2v_core.assemble import load_clip_vision, load_text_encoder, load_transformer
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.gguf import TYPES
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.errors import CapabilityError, CheckpointError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import LoraFile, Pair
from lightx2v_core.memory.residency import Residency
from lightx2v_core.memory.transport import DirectTransport, HostBlock
from lightx2v_core.quant.ggml import BLOCK_TYPES, GgmlLinear
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from tests.conftest import fill, tiny_inputs
from tests.gguf_files import is_linear, write_gguf
from tests.headers.reconstruct import reconstruct

CONFIG = WanConfig(dim=256, ffn_dim=512, num_layers=1, text_dim=64)
WEIGHTS = fill(WanModel(CONFIG)).state_dict()
GGUF_14B_BYTES = 9_000_000_000


def all_in(kind: str):
    return lambda name, tensor: kind if is_linear(name, tensor) else "F32"


def mixed(name: str, tensor: Tensor) -> str:
    """As the *_K_M files are: several block types, half-precision matrices, the rest in F32."""
    if not is_linear(name, tensor):
        return "BF16" if tensor.ndim == 2 else "F32"
    return "Q6_K" if ".v." in name else "F16" if "blocks.0.ffn.2" in name else "Q4_K"


def plain_model(numbers: dict[str, np.ndarray]) -> WanModel:
    with torch.device("meta"):
        model = WanModel(CONFIG)
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in numbers.items()}, assign=True)
    return model.eval()


@torch.inference_mode()
def run(model: WanModel) -> Tensor:
    return model(**tiny_inputs(model.config, batch=1))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_file_of_each_type_runs_as_its_dequantised_weights_bit_for_bit(tmp_path, kind):
    numbers = write_gguf(tmp_path / "wan2.1_t2v.gguf", WEIGHTS, all_in(kind))

    loaded = load_transformer(tmp_path / "wan2.1_t2v.gguf")

    assert (loaded.info.scheme, loaded.info.task, loaded.info.refusal) == (
        f"gguf-{kind}",
        "t2v",
        None,
    )
    assert torch.equal(run(loaded.model), run(plain_model(numbers)))


def test_a_mixed_file_is_named_by_what_most_of_it_is_and_each_linear_keeps_its_own(tmp_path):
    numbers = write_gguf(tmp_path / "wan2.1_t2v_Q4_K_M.gguf", WEIGHTS, mixed)

    loaded = load_transformer(tmp_path / "wan2.1_t2v_Q4_K_M.gguf")

    block = loaded.model.blocks[0]
    assert loaded.info.scheme == "gguf-Q4_K"
    assert (block.self_attn.q.block_type, block.self_attn.v.block_type) == ("Q4_K", "Q6_K")
    assert not isinstance(block.ffn[2], GgmlLinear)
    assert torch.equal(run(loaded.model), run(plain_model(numbers)))


def test_the_blocks_stay_blocks_of_the_mapped_file(tmp_path):
    path = tmp_path / "q.gguf"
    write_gguf(path, WEIGHTS, all_in("Q4_K"))

    loaded = load_transformer(path, dtype=torch.bfloat16)

    weights = [m.weight for m in loaded.model.modules() if isinstance(m, GgmlLinear)]
    assert len(weights) == sum(is_linear(k, v) for k, v in WEIGHTS.items())
    assert {w.untyped_storage().nbytes() for w in weights} == {path.stat().st_size}
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    assert loaded.residency.total_bytes < 0.5 * sum(v.nbytes for v in WEIGHTS.values())


def test_blocks_that_stream_compute_what_resident_ones_do(tmp_path):
    write_gguf(tmp_path / "q.gguf", WEIGHTS, all_in("Q4_K"))
    loaded = load_transformer(tmp_path / "q.gguf")
    whole, fetched = run(loaded.model), []

    class Recorder(DirectTransport):
        def start(self, slot: int, source: HostBlock, target: Tensor) -> None:
            super().start(slot, source, target)
            fetched.extend(tensor.dtype for tensor in source.tensors)

    engine = Residency(loaded.model, make_transport=lambda _device: Recorder())
    loaded.model.run_block = engine.run_block
    engine.place("cpu", budget_bytes=1)

    assert engine.resident == 0
    assert torch.equal(run(loaded.model), whole)
    assert fetched.count(torch.uint8) >= sum(is_linear(k, v) for k, v in WEIGHTS.items())


def test_a_lora_adds_what_it_adds_to_the_dequantised_weights_and_can_be_taken_off(tmp_path):
    numbers = write_gguf(tmp_path / "q.gguf", WEIGHTS, all_in("Q5_K"))
    quantised, plain = load_transformer(tmp_path / "q.gguf").model, plain_model(numbers)
    before = run(quantised)
    generator = torch.Generator().manual_seed(4)
    down, up = torch.randn(8, 256, generator=generator), torch.randn(512, 8, generator=generator)
    pair = Pair(up_MR=up * 0.1, down_RK=down * 0.1, alpha=None)
    difference = 0.1 * torch.randn(256, 512, generator=generator)
    differences = {
        ("blocks.0.ffn.2", "weight"): difference,
        ("blocks.0.norm3", "bias"): torch.ones(256),
    }
    lora = LoraFile("lora", {"blocks.0.ffn.0": pair}, differences, ())

    reports = [apply_loras(model, [(lora, 0.7)]) for model in (quantised, plain)]

    assert reports[0] == reports[1]
    assert reports[0][0].matched == 3
    assert torch.equal(run(quantised), run(plain))
    assert not torch.equal(run(quantised), before)
    apply_loras(quantised, [])
    assert torch.equal(run(quantised), before)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_patch_embedding_may_be_stored_in_another_shape(tmp_path, kind):
    """ComfyUI-GGUF's own field; ggml's tools take four axes at most."""
    name = "patch_embedding.weight"
    shape = tuple(WEIGHTS[name].shape)
    flat = WEIGHTS | {name: WEIGHTS[name].reshape(-1, 64)}
    original = {f"comfy.gguf.orig_shape.{name}": shape}

    numbers = write_gguf(
        tmp_path / "q.gguf",
        flat,
        lambda n, t: kind if n == name else all_in("Q4_0")(n, t),
        fields=original,
    )

    loaded = load_transformer(tmp_path / "q.gguf").model
    expected = plain_model(numbers | {name: numbers[name].reshape(shape)})
    assert loaded.patch_embedding.weight.shape == shape
    assert torch.equal(run(loaded), run(expected))


def test_matrices_outside_the_blocks_and_vectors_may_be_in_blocks_too(tmp_path):
    def kind_of(name: str, tensor: Tensor) -> str:
        return "Q8_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else "F32"

    numbers = write_gguf(tmp_path / "q.gguf", WEIGHTS, kind_of)
    loaded = load_transformer(tmp_path / "q.gguf").model

    assert isinstance(loaded.text_embedding[0], GgmlLinear)
    assert torch.equal(run(loaded), run(plain_model(numbers)))


def test_a_prefix_and_a_foreign_architecture_do_not_matter(tmp_path):
    prefixed = {f"model.diffusion_model.{k}": v for k, v in WEIGHTS.items()}
    write_gguf(
        tmp_path / "q.gguf",
        prefixed,
        lambda n, t: all_in("Q8_0")(n.removeprefix("model.diffusion_model."), t),
        architecture="pig",
    )

    info = load_transformer(tmp_path / "q.gguf").info

    assert (info.layout, info.scheme) == ("comfy", "gguf-Q8_0")


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_a_file_without_blocks_is_plain(tmp_path, kind):
    write_gguf(tmp_path / "q.gguf", WEIGHTS, all_in(kind))

    info = load_transformer(tmp_path / "q.gguf").info

    assert info.scheme == {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}[kind]


def write_14b(path: Path) -> None:
    """The header of a 14B file, reconstructed, over weights that take no room on the disk."""
    writer = gguf.GGUFWriter(path, "wan")
    for name, (shape, _) in reconstruct("wan2.1_i2v_14b").items():
        is_block = name.startswith("blocks.") and name.endswith("weight") and len(shape) == 2
        kind = "Q4_K" if is_block else "BF16" if len(shape) == 2 else "F32"
        kind = "Q6_K" if is_block and ".v." in name else kind
        elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        count = int(np.prod(shape)) // elements * nbytes
        writer.add_tensor_info(name, shape, None, count, gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        file.truncate(GGUF_14B_BYTES + 3_000_000_000)


def test_a_14b_header_is_detected_and_fills_the_model_strictly(tmp_path):
    path = tmp_path / "wan2.1-i2v-14b-480p-Q4_K_M.gguf"
    write_14b(path)

    loaded = load_transformer(path, dtype=torch.bfloat16)

    info = loaded.info
    assert (info.family, info.task, info.size, info.scheme) == (
        "wan2.1",
        "i2v",
        "14B",
        "gguf-Q4_K",
    )
    assert info.tensors == 1303
    assert 9e9 < info.bytes < 12e9
    assert loaded.model.blocks[39].ffn[2].weight.shape == (5120, 13824 // 256 * 144)


def test_type_numbers_are_those_of_the_package():
    theirs = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}

    assert theirs == TYPES


# ---------------------------------------------------------------- files that are not what they say


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(
    fields: tuple[bytes, ...] = (),
    entries: tuple[bytes, ...] = (),
    version: int = 3,
    tensors: int | None = None,
) -> bytes:
    counts = struct.pack("<QQ", len(entries) if tensors is None else tensors, len(fields))
    return b"GGUF" + struct.pack("<I", version) + counts + b"".join(fields) + b"".join(entries)


def entry(name: str, axes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sides = struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
    return text(name) + sides + struct.pack("<IQ", kind, offset)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + content


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


BAD = {
    "empty": (b"", "holds 0 bytes; download it again"),
    "short": (b"GGUF" + bytes(8), "holds 12 bytes"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n" + bytes(40), "Git-LFS pointer"),
    "page": (b"<!doctype html><html></html>" + bytes(40), "a web page"),
    "magic": (b"GGJT" + bytes(60), "not a GGUF file"),
    "version 1": (header(version=1) + bytes(40), "version 1 GGUF file"),
    "big-endian": (header(version=3 << 24) + bytes(40), "a big-endian GGUF file"),
    "tensors": (header(tensors=2**60) + bytes(40), f"claims {2**60} tensors"),
    "array": (header((array("a", 0, 2**60),)), f"claims {2**60} values"),
    "strings": (header((array("a", 8, 2**59),)), f"claims {2**59} values"),
    "string": (header((array("a", 8, 1, struct.pack("<Q", 2**63)),)), "does not end within"),
    "nested": (header((array("a", 9, 1, bytes(12)),)), "array of unknown type 9"),
    "value": (header((text("a") + struct.pack("<IQQ", 77, 0, 0),)), "value of unknown type 77"),
    "key": (header((struct.pack("<Q", 2**40) + bytes(20),)), "bytes for the name of a field"),
    "twice": (header((number("a", 1), number("a", 1))), "holds the field a twice"),
    "alignment": (header((number("general.alignment", 24),)), "alignment is 24"),
    "split": (header((number("split.count", 3),)), "one of 3 parts .* --merge"),
    "name": (header((), (struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc" + bytes(24),)), "is not text"),
    "axes": (header((), (entry("a", (1,) * 9),)) + bytes(64), "claims 9 axes"),
    "axis": (header((), (entry("a", (0, 4)),)) + bytes(64), "an axis of length 0"),
    "length": (header((), (entry("a", (2**62, 2**62)),)) + bytes(64), "is incomplete"),
    "cut": (header((), (entry("a", (400,)),)) + bytes(64), "is incomplete: .* MB of"),
    "type": (header((), (entry("a", (32,), 99),)) + bytes(64), "a type of number 99"),
    "Q8_1": (header((), (entry("a", (32,), 9),)) + bytes(64), "type Q8_1, which this version"),
    "rows": (header((), (entry("a", (33, 32), 2),)) + bytes(2048), "no whole blocks of Q4_0"),
    "offset": (
        header((), (entry("a", (8,)), entry("b", (8,), offset=16))) + bytes(256),
        "sizes for b contradict",
    ),
    "tensor twice": (
        header((), (entry("a", (8,)), entry("a", (8,), offset=32))) + bytes(256),
        "holds the tensor a twice",
    ),
    "shape": (
        header(
            (array("comfy.gguf.orig_shape.a", 5, 2, struct.pack("<ii", 3, 3)),),
            (entry("a", (8,)),),
        )
        + bytes(256),
        "two shapes of a contradict",
    ),
    "negative": (
        header(
            (array("comfy.gguf.orig_shape.a", 5, 2, struct.pack("<ii", -2, -4)),),
            (entry("a", (8,)),),
        )
        + bytes(256),
        "two shapes of a contradict",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_gets_a_sentence(tmp_path, case):
    content, words = BAD[case]
    (tmp_path / "bad.gguf").write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"bad\.gguf.*{words}"):
        open_checkpoint(tmp_path / "bad.gguf")


def test_half_a_download_says_how_much_is_there(tmp_path):
    write_gguf(tmp_path / "q.gguf", WEIGHTS, all_in("Q8_0"))
    content = (tmp_path / "q.gguf").read_bytes()
    (tmp_path / "q.gguf").write_bytes(content[: len(content) * 2 // 3])

    with pytest.raises(CheckpointError, match=r"is incomplete: \d.* of \d.* weights are there"):
        load_transformer(tmp_path / "q.gguf")


def test_a_conversion_without_its_last_step_is_named(tmp_path):
    without = {k: v for k, v in WEIGHTS.items() if k != "patch_embedding.weight"}
    write_gguf(tmp_path / "q.gguf", without, all_in("Q8_0"))

    with pytest.raises(CheckpointError, match=r"lacks patch_embedding\.weight.*fix_5d_tensors"):
        load_transformer(tmp_path / "q.gguf")


def test_a_matrix_of_another_shape_is_refused_even_if_it_has_as_many_blocks(tmp_path):
    name = "blocks.0.ffn.0.weight"
    write_gguf(tmp_path / "q.gguf", WEIGHTS | {name: WEIGHTS[name].T.contiguous()}, all_in("Q8_0"))

    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.0\.weight has shape"):
        load_transformer(tmp_path / "q.gguf")


def test_a_transformer_is_refused_as_text_or_image_encoder_before_it_is_read(tmp_path):
    write_gguf(tmp_path / "q.gguf", WEIGHTS, all_in("Q8_0"))

    with pytest.raises(CheckpointError, match="is a Wan transformer, not a UMT5"):
        load_text_encoder(tmp_path / "q.gguf")
    with pytest.raises(CheckpointError, match="CLIP vision is not read from GGUF"):
        load_clip_vision(tmp_path / "q.gguf")


def test_without_the_package_a_file_is_detected_and_only_grids_are_missed(tmp_path, monkeypatch):
    from lightx2v_core.quant.ggml_grids import grid

    write_gguf(tmp_path / "k.gguf", WEIGHTS, all_in("Q4_K"))
    write_gguf(tmp_path / "iq.gguf", WEIGHTS, all_in("IQ2_XS"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    grid.cache_clear()

    assert detect(open_checkpoint(tmp_path / "iq.gguf")).scheme == "gguf-IQ2_XS"
    assert torch.isfinite(run(load_transformer(tmp_path / "k.gguf").model)).all()
    with pytest.raises(CapabilityError, match="IQ2_XS needs the package gguf"):
        load_transformer(tmp_path / "iq.gguf")
