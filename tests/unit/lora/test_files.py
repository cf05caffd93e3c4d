"""LoRA files in every naming, against weights merged by the formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v_core.assemble import load_transformer
from lightx2v_core.checkpoint.layouts import to_diffusers
from lightx2v_core.errors import CheckpointError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.wan.model import WanModel
from tests.conftest import relative_error, tiny_inputs, tiny_model
from tests.tolerances import FLOAT32_PARITY

RANK, ALPHA, STRENGTH = 8, 1.0, 0.7
LAYERS = ("blocks.0.self_attn.q", "blocks.1.ffn.0", "text_embedding.0")
WEIGHTS = tiny_model().state_dict()


def matrices() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(6)

    def randn(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    shapes = {layer: WEIGHTS[f"{layer}.weight"].shape for layer in LAYERS}
    return {layer: (randn(m, RANK), randn(RANK, k)) for layer, (m, k) in shapes.items()}


def differences() -> dict[str, Tensor]:
    """Official tensor name -> what is added, in the forms of the published files."""
    generator = torch.Generator().manual_seed(7)
    names = (
        "blocks.0.norm3.weight",
        "blocks.0.self_attn.q.bias",
        "blocks.1.modulation",
        "head.modulation",
        "head.head.weight",
        "patch_embedding.weight",
    )
    return {n: 0.1 * torch.randn(WEIGHTS[n].shape, generator=generator) for n in names}


LEAVES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}


def published() -> dict[str, Tensor]:
    """As LightX2V's extractor writes them."""
    tensors = {}
    for layer, (up, down) in matrices().items():
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = up
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = down
    for name, difference in differences().items():
        stem, _, leaf = name.rpartition(".")
        tensors[f"diffusion_model.{stem}.{LEAVES[leaf]}"] = difference
    return tensors


def spelled(prefix: str, up: str, down: str, layer=lambda name: name, alpha: bool = False) -> dict:
    tensors = {}
    for name, matrix in matrices().items():
        stem = prefix + layer(name)
        tensors |= dict(zip((stem + up, stem + down), matrix, strict=True))
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return tensors


def diffusers_layer(name: str) -> str:
    return to_diffusers(f"{name}.weight").removesuffix(".weight")


DIALECTS = {
    "lightx2v": spelled("diffusion_model.", ".lora_up.weight", ".lora_down.weight"),
    "peft": spelled("base_model.model.", ".lora_B.weight", ".lora_A.weight"),
    "peft, default": spelled("", ".lora_B.default.weight", ".lora_A.default.weight"),
    "diffusers": spelled("transformer.", ".lora_B.weight", ".lora_A.weight", diffusers_layer),
    "bare": spelled("", ".lora_up.weight", ".lora_down.weight"),
    "without suffix": spelled("diffusion_model.", ".lora_B", ".lora_A"),
    "old diffusers": spelled("unet.", "_lora.up.weight", "_lora.down.weight"),
    "kohya": spelled(
        "lora_unet_", ".lora_up.weight", ".lora_down.weight", lambda n: n.replace(".", "_")
    ),
}


def written(folder: Path, tensors: dict[str, Tensor], name: str = "lora.safetensors") -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)
    return folder / name


def merged(scale: float, with_differences: bool = False) -> WanModel:
    model = tiny_model()
    state = model.state_dict()
    for layer, (up, down) in matrices().items():
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + scale * (up @ down)
    if with_differences:
        for name, difference in differences().items():
            state[name] = state[name] + scale * difference
    model.load_state_dict(state)
    return model


@torch.inference_mode()
def run(model: WanModel) -> Tensor:
    return model(**tiny_inputs(model.config, batch=1))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_naming_equals_the_merged_weights(tmp_path, dialect):
    model, lora = tiny_model(), read_lora(written(tmp_path, DIALECTS[dialect]))

    (report,) = apply_loras(model, [(lora, STRENGTH)])

    assert (report.matched, report.failed, report.ranks) == (3, (), (RANK,))
    assert relative_error(run(model), run(merged(STRENGTH))) <= FLOAT32_PARITY


def test_differences_of_weight_bias_and_modulation_take_the_strength_too(tmp_path):
    model, lora = tiny_model(), read_lora(written(tmp_path, published()))

    (report,) = apply_loras(model, [(lora, STRENGTH)])

    assert report.matched == len(LAYERS) + len(differences())
    assert relative_error(run(model), run(merged(STRENGTH, True))) <= FLOAT32_PARITY


def test_alpha_over_rank_scales_and_is_told(tmp_path):
    tensors = spelled("diffusion_model.", ".lora_up.weight", ".lora_down.weight", alpha=True)
    model, lora = tiny_model(), read_lora(written(tmp_path, tensors))

    (report,) = apply_loras(model, [(lora, 1.0)])

    assert relative_error(run(model), run(merged(ALPHA / RANK))) <= FLOAT32_PARITY
    assert "rank 8, effective strength 1 x 0.125" in report.describe()


def test_strength_zero_is_no_lora_bit_for_bit(tmp_path):
    model, lora = tiny_model(), read_lora(written(tmp_path, published()))

    apply_loras(model, [(lora, 0.0)])

    assert torch.equal(run(model), run(tiny_model()))


def test_removing_restores_bit_for_bit_after_ten_strengths(tmp_path):
    model, lora = tiny_model(), read_lora(written(tmp_path, published()))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}

    for step in range(10):
        apply_loras(model, [(lora, step / 10)])
    apply_loras(model, [])

    assert torch.equal(run(model), run(tiny_model()))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_two_loras_add_up_in_any_order(tmp_path):
    first = read_lora(written(tmp_path, published(), "a.safetensors"))
    second = read_lora(written(tmp_path, DIALECTS["peft"], "b.safetensors"))
    one, other = tiny_model(), tiny_model()

    apply_loras(one, [(first, 0.4), (second, 0.3)])
    apply_loras(other, [(second, 0.3), (first, 0.4)])

    assert relative_error(run(one), run(other)) <= FLOAT32_PARITY
    assert relative_error(run(one), run(merged(0.7))) > FLOAT32_PARITY, "the differences count"


def test_image_layers_on_a_model_without_them_are_harmless_and_others_are_not(tmp_path):
    tensors = published() | {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(256, 4),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(4, 256),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(256),
        "diffusion_model.blocks.77.ffn.0.diff_b": torch.ones(512),
    }

    (report,) = apply_loras(tiny_model(), [(read_lora(written(tmp_path, tensors)), 1.0)])

    assert len(report.harmless) == 2
    assert report.failed == ("blocks.77.ffn.0.bias",)
    assert (
        "ignored 2 image-embedding layers this model does not have: harmless" in report.describe()
    )
    assert "NOT applied: 1 (blocks.77.ffn.0.bias)" in report.describe()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"diffusion_model.x.lora_up.weight": torch.ones(4, 2)}, "without .*lora_down.* damaged"),
        ({"x.lokr_w1": torch.ones(2, 2)}, "LoKr adapter, which this version does not apply"),
        ({"x.hada_w1_a": torch.ones(2, 2)}, "LoHa adapter"),
        ({"x.dora_scale": torch.ones(2)}, "DoRA adapter"),
        ({"blocks.0.ffn.0.weight": torch.ones(2, 2)}, "is not a LoRA this version knows"),
    ],
)
def test_a_file_that_is_no_plain_lora_is_refused(tmp_path, tensors, words):
    with pytest.raises(CheckpointError, match=words):
        read_lora(written(tmp_path, tensors))


def test_a_lora_that_matches_nothing_is_an_error_and_changes_nothing(tmp_path):
    tensors = {"other.model.lora_up.weight": torch.ones(4, 2)}
    tensors["other.model.lora_down.weight"] = torch.ones(2, 4)
    model = tiny_model()

    with pytest.raises(CheckpointError, match=r"no layer of lora\.safetensors matches this model"):
        apply_loras(model, [(read_lora(written(tmp_path, tensors)), 1.0)])

    assert torch.equal(run(model), run(tiny_model()))


def test_a_lora_of_another_width_is_named_with_both_shapes(tmp_path):
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.ones(1536, 4),
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(4, 1536),
    }

    with pytest.raises(CheckpointError, match=r"is 1536x1536 and this model's is 256x256"):
        apply_loras(tiny_model(), [(read_lora(written(tmp_path, tensors)), 1.0)])


def test_differences_of_a_memory_mapped_model_leave_its_file_alone(tmp_path):
    path = written(tmp_path, WEIGHTS, "model.safetensors")
    content, lora = path.read_bytes(), read_lora(written(tmp_path, published()))
    model = load_transformer(path).model

    apply_loras(model, [(lora, 1.0)])

    assert relative_error(run(model), run(merged(1.0, True))) <= FLOAT32_PARITY
    assert path.read_bytes() == content
