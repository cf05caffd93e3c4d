"""LoRA files in every naming, against weights merged by the formula."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from lightx2v_core.assemble import load_transformer
from lightx2v_core.checkpoint.layouts import to_diffusers
from lightx2v_core.errors import CheckpointError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.branches import weight_shapes
from lightx2v_core.lora.names import ModelNames
from lightx2v_core.lora.read import read_lora
from lightx2v_core.wan.model import WanModel
from tests.conftest import VARIANTS, relative_error, tiny_model
from tests.tolerances import FLOAT32_PARITY
from tests.unit.lora.samples import pair, run, written

RANK, ALPHA, STRENGTH = 8, 1.0, 0.7
LAYERS = (
    "blocks.0.self_attn.q",
    "blocks.0.cross_attn.o",
    "blocks.1.ffn.0",
    "text_embedding.0",
    "time_projection.1",
    "head.head",
)
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


UP, DOWN = ".lora_up.weight", ".lora_down.weight"


def spelled(
    prefix: str,
    up: str = UP,
    down: str = DOWN,
    layer=lambda name: name,
    alpha: float | None = None,
) -> dict[str, Tensor]:
    tensors = {}
    for name, matrix in matrices().items():
        stem = prefix + layer(name)
        tensors |= dict(zip((stem + up, stem + down), matrix, strict=True))
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers(name: str) -> str:
    return to_diffusers(f"{name}.weight").removesuffix(".weight")


def flat(name: str) -> str:
    return name.replace(".", "_")


def flat_diffusers(name: str) -> str:
    return flat(diffusers(name))


A, B = ".lora_A.weight", ".lora_B.weight"
PLAIN = spelled("diffusion_model.")
# Alpha equal to the rank is scale 1: the bits must be those without alpha.
DIALECTS = {
    "LightX2V extractor": PLAIN,
    "with alpha": spelled("diffusion_model.", alpha=RANK),
    "ComfyUI checkpoint": spelled("model.diffusion_model.", B, A),
    "bare": spelled(""),
    "DiffSynth": spelled("", ".lora_B.default.weight", ".lora_A.default.weight"),
    "UniAnimate": spelled("pipe.dit.", ".lora_B.default.weight", ".lora_A.default.weight"),
    "PEFT": spelled("base_model.model.", B, A),
    "PEFT, adapter named": spelled(
        "base_model.model.", ".lora_B.mine.weight", ".lora_A.mine.weight"
    ),
    "PEFT of diffusers": spelled("base_model.model.", B, A, diffusers),
    "PEFT inside ComfyUI's prefix": spelled("diffusion_model.base_model.model.", B, A),
    "diffusers and finetrainers": spelled("transformer.", B, A, diffusers),
    "diffusers, bare": spelled("", B, A, diffusers),
    "diffusers, up and down": spelled(
        "transformer.", ".lora.up.weight", ".lora.down.weight", diffusers
    ),
    "old diffusers": spelled("unet.", "_lora.up.weight", "_lora.down.weight"),
    "transformers": spelled("", ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "without suffix": spelled("diffusion_model.", ".lora_B", ".lora_A"),
    "kohya and musubi": spelled("lora_unet_", layer=flat, alpha=RANK),
    "kohya, dots kept": spelled("lora_unet_", layer=lambda n: n.replace("blocks.", "blocks_")),
    "kohya of diffusers": spelled("lora_unet_", layer=flat_diffusers, alpha=RANK),
    "Wan-Fun": spelled("lora_unet__", layer=flat, alpha=RANK),
    "OneTrainer": spelled("lora_transformer_", layer=flat_diffusers, alpha=RANK),
    "LyCORIS and SimpleTuner": spelled("lycoris_", layer=flat_diffusers, alpha=RANK),
    "ai-toolkit's LyCORIS": spelled("lycoris_", layer=flat, alpha=RANK),
    "wrapped by FSDP": spelled("_fsdp_wrapped_module.", layer=lambda n: f"_orig_mod.{n}"),
}


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


def test_a_lora_equals_the_merged_weights(tmp_path):
    model, lora = tiny_model(), read_lora(written(tmp_path, PLAIN))

    apply_loras(model, [(lora, STRENGTH)])

    assert relative_error(run(model), run(merged(STRENGTH))) <= FLOAT32_PARITY
    assert relative_error(run(model), run(tiny_model())) > 1e-2


@pytest.fixture(scope="module")
def shared() -> WanModel:
    return tiny_model()


@pytest.fixture(scope="module")
def plainly_named(shared: WanModel, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    folder = tmp_path_factory.mktemp("plain")
    apply_loras(shared, [(read_lora(written(folder, PLAIN)), STRENGTH)])
    return run(shared)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_spelling_gives_the_same_bits(tmp_path, shared, plainly_named, dialect):
    apply_loras(shared, [])
    lora = read_lora(written(tmp_path, DIALECTS[dialect]))

    (report,) = apply_loras(shared, [(lora, STRENGTH)])

    assert (report.matched, report.failed, report.ranks) == (len(LAYERS), (), (RANK,))
    assert torch.equal(run(shared), plainly_named)


def test_differences_of_weight_bias_and_modulation_take_the_strength_too(tmp_path):
    model, lora = tiny_model(), read_lora(written(tmp_path, published()))

    (report,) = apply_loras(model, [(lora, STRENGTH)])

    assert report.matched == len(LAYERS) + len(differences())
    assert relative_error(run(model), run(merged(STRENGTH, True))) <= FLOAT32_PARITY


def test_alpha_over_rank_scales_and_is_told(tmp_path):
    tensors = spelled("diffusion_model.", alpha=ALPHA)
    model, lora = tiny_model(), read_lora(written(tmp_path, tensors))

    (report,) = apply_loras(model, [(lora, 1.0)])

    assert relative_error(run(model), run(merged(ALPHA / RANK))) <= FLOAT32_PARITY
    assert "rank 8, alpha 1, effective strength 1 x 0.125" in report.describe()


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


def test_the_order_of_loras_changes_not_even_the_last_bit(tmp_path):
    first = read_lora(written(tmp_path, published(), "a.safetensors"))
    second = read_lora(written(tmp_path, DIALECTS["PEFT"], "b.safetensors"))
    given = [(first, 0.4), (second, 0.3), (first, -0.1)]
    one, other = tiny_model(), tiny_model()

    reports = apply_loras(one, given)
    apply_loras(other, [given[2], given[1], given[0]])

    assert torch.equal(run(one), run(other))
    assert [report.strengths for report in reports] == [0.4, 0.3, -0.1]
    assert relative_error(run(one), run(merged(0.6))) > FLOAT32_PARITY, "the differences count"


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


@pytest.mark.parametrize("variant", ["t2v", "flf2v"])
def test_every_tensor_is_found_by_its_official_diffusers_and_flat_names(variant):
    with torch.device("meta"):
        tensors = weight_shapes(WanModel(VARIANTS[variant]))
    names = ModelNames(tensors)

    for name in tensors:
        stem, _, leaf = name.rpartition(".")
        spelled = to_diffusers(name)
        assert names.find(stem, leaf) == names.find(flat(stem), leaf) == name
        assert names.find(name, "weight") == names.find(spelled, "weight") == name
        assert names.find(flat(spelled), "weight") == name


def test_a_flat_name_that_could_be_two_layers_is_neither():
    names = ModelNames(["a.b_c.weight", "a_b.c.weight"])

    assert names.find("a_b_c", "weight") is None
    assert names.find("a_b.c", "weight") == "a_b.c.weight"


SPELLED_DIFFERENCES = {
    "LightX2V extractor": lambda stem, leaf: f"diffusion_model.{stem}.{LEAVES[leaf]}",
    "kohya": lambda stem, leaf: f"lora_unet_{flat(stem)}.{LEAVES[leaf]}",
    "diffusers": lambda stem, leaf: (
        f"transformer.{to_diffusers(f'{stem}.modulation')}.diff"
        if leaf == "modulation"
        else f"transformer.{diffusers(stem)}.{LEAVES[leaf]}"
    ),
    "modulation as a tensor of its own": lambda stem, leaf: (
        f"{stem}.modulation.diff" if leaf == "modulation" else f"{stem}.{LEAVES[leaf]}"
    ),
    "LyCORIS norms": lambda stem, leaf: (
        f"{stem}." + {"weight": "w_norm", "bias": "b_norm"}.get(leaf, LEAVES[leaf])
    ),
}


@pytest.mark.parametrize("dialect", SPELLED_DIFFERENCES)
def test_differences_in_every_spelling_give_the_same_bits(tmp_path, dialect):
    spell = SPELLED_DIFFERENCES[dialect]
    tensors = {spell(*name.rsplit(".", 1)): added for name, added in differences().items()}
    model, plainly = tiny_model(), tiny_model()
    official = {
        f"{name.rsplit('.', 1)[0]}.{LEAVES[name.rsplit('.', 1)[1]]}": added
        for name, added in differences().items()
    }

    (report,) = apply_loras(model, [(read_lora(written(tmp_path, tensors)), STRENGTH)])
    apply_loras(plainly, [(read_lora(written(tmp_path, official, "o.safetensors")), STRENGTH)])

    assert (report.matched, report.failed) == (len(differences()), ())
    assert torch.equal(run(model), run(plainly))


def test_a_pair_on_the_patch_embedding_is_a_change_of_the_convolution(tmp_path):
    generator = torch.Generator().manual_seed(9)
    up = torch.randn(256, RANK, 1, 1, 1, generator=generator)
    down = 0.1 * torch.randn(RANK, 16, 1, 2, 2, generator=generator)
    stem = "base_model.model.patch_embedding"
    added = 0.1 * torch.randn(256, 16, 1, 2, 2, generator=generator)
    tensors = {stem + B: up, stem + A: down, f"{stem}.diff": added}
    lora = read_lora(written(tmp_path, tensors))
    model, expected = tiny_model(), tiny_model()
    change = torch.einsum("or,rithw->oithw", up.flatten(1), down) + added
    expected.patch_embedding.weight.data += STRENGTH * change

    (report,) = apply_loras(model, [(lora, STRENGTH)])

    assert report.failed == ()
    assert relative_error(run(model), run(expected)) <= FLOAT32_PARITY


def test_a_bias_of_the_up_matrix_is_scaled_like_the_matrix(tmp_path):
    stem, bias = "base_model.model.blocks.0.self_attn.q", torch.linspace(-1, 1, 256)
    tensors = {
        f"{stem}.lora_A.weight": torch.zeros(4, 256),
        f"{stem}.lora_B.weight": torch.zeros(256, 4),
        f"{stem}.lora_B.bias": bias,
        f"{stem}.diff_b": torch.ones(256),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    model = tiny_model()
    before = model.blocks[0].self_attn.q.bias.clone()

    apply_loras(model, [(read_lora(written(tmp_path, tensors)), 1.0)])

    torch.testing.assert_close(model.blocks[0].self_attn.q.bias, before + 0.5 * bias + 1)


STEM = "base_model.model.blocks.0.self_attn.q"
Q = {f"{STEM}.lora_A.weight": torch.ones(4, 256), f"{STEM}.lora_B.weight": torch.ones(256, 4)}
FOUR = {"r": 4, "lora_alpha": 8, "use_rslora": True}


def declared(**config: object) -> str:
    return json.dumps({f"transformer.{key}": value for key, value in config.items()})


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({}, 1.0),
        ({"lora_adapter_metadata": declared(r=4, lora_alpha=8)}, 2.0),
        ({"lora_adapter_metadata": declared(**FOUR)}, 4.0),
        (
            {"lora_adapter_metadata": declared(**FOUR, alpha_pattern={"self_attn.q": 2.0})},
            1.0,
        ),
        ({"lora_adapter_metadata": declared(**FOUR, alpha_pattern={"ffn.0": 2.0})}, 4.0),
    ],
)
def test_scaling_declared_in_diffusers_metadata_is_followed(tmp_path, metadata, scale):
    lora = read_lora(written(tmp_path, Q, **metadata))

    assert [pair.scale for pair in lora.pairs.values()] == [scale]


def test_rank_stabilised_scaling_of_a_peft_folder_is_followed(tmp_path):
    file = written(tmp_path, Q, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(FOUR))

    scales = [p.scale for path in (file, tmp_path) for p in read_lora(path).pairs.values()]

    assert scales == [8 / 2, 8 / 2]


def test_alpha_of_a_lycoris_file_holds_the_root_already(tmp_path):
    tensors = Q | {f"{STEM}.alpha": torch.tensor(8 * 2.0)}

    lora = read_lora(written(tmp_path, tensors, ss_network_args='{"rs_lora": "True"}'))

    assert [pair.scale for pair in lora.pairs.values()] == [8 / 2]


def test_an_8_bit_float_lora_is_read(tmp_path):
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in pair("blocks.0.ffn.0", 512).items()}
    model, wide = tiny_model(), tiny_model()
    widened = {name: t.float() for name, t in tensors.items()}

    apply_loras(model, [(read_lora(written(tmp_path, tensors)), 1.0)])
    apply_loras(wide, [(read_lora(written(tmp_path, widened, "w.safetensors")), 1.0)])

    assert torch.equal(run(model), run(wide))
