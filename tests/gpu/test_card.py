"""On a real card: streaming equals resident, half precision stays near float32, budgets hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightx2v_core.assemble import find_parts
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.lora.steps import steps_of
from lightx2v_core.media import read_image
from lightx2v_core.memory.residency import Residency
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.presets import DEMO_FOLDER
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import VARIANTS, fill, relative_error, tiny_inputs
from tests.unit.lora.samples import every_kind, written

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
START = DEMO_FOLDER / "start.png"
DEEP = replace(VARIANTS["i2v"], num_layers=6)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 proper; PyTorch's default there is TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_card(inputs: dict) -> dict:
    return {k: None if v is None else v.cuda() for k, v in inputs.items()}


def streamed(config: WanConfig, budget: float | None, dtype: torch.dtype) -> WanModel:
    model = fill(WanModel(config)).to(dtype)
    model.compute_dtype = dtype
    engine = Residency(model)
    model.run_block = engine.run_block
    engine.place("cuda", budget)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_streaming_every_block_equals_resident_bit_for_bit(dtype):
    inputs = on_card(tiny_inputs(DEEP))

    resident = streamed(DEEP, None, dtype)(**inputs)
    from_host = streamed(DEEP, 0, dtype)(**inputs)

    assert torch.equal(from_host, resident)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.01), (torch.float16, 0.002), (torch.float32, 1e-4)]
)
def test_the_card_stays_near_the_float32_forward_of_the_cpu(dtype, bound):
    """float32 on the card may use other summation orders; half precision rounds each matmul."""
    inputs = tiny_inputs(DEEP)
    expected = fill(WanModel(DEEP)).to(dtype).float()(**inputs)

    actual = streamed(DEEP, None, dtype)(**on_card(inputs))

    assert relative_error(actual.cpu(), expected) < bound


@torch.inference_mode()
def test_weights_on_the_card_stay_within_the_budget():
    config = WanConfig(dim=1536, ffn_dim=8960, num_layers=8, text_dim=4096)
    with torch.device("cuda"):
        size = sum(p.nbytes for p in WanModel(config).parameters())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, budget = torch.cuda.memory_allocated(), size // 2

    model = WanModel(config)
    engine = Residency(model)
    model.run_block = engine.run_block
    engine.place("cuda", budget)
    model(
        torch.zeros(1, 16, 1, 8, 8, device="cuda"),
        torch.ones(1, device="cuda"),
        torch.zeros(1, 512, 4096, device="cuda"),
    )
    activations = 64 << 20

    assert 0 < engine.resident < 8
    assert engine.loaded_bytes <= budget
    assert torch.cuda.max_memory_allocated() - before <= budget + activations


@torch.inference_mode()
def test_the_vae_on_the_card_equals_the_cpu():
    vae = fill(WanVae(VaeConfig(16, 16)))
    pixels = torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latent = vae.encode(pixels)
    frames = vae.decode(latent)

    card = vae.cuda()

    assert relative_error(card.encode(pixels.cuda()).cpu(), latent) < 1e-4
    assert relative_error(card.decode(latent.cuda()).cpu(), frames) < 1e-4


@pytest.mark.parametrize("vram_bytes", [None, 0])
def test_the_demo_makes_nearly_the_same_video_on_the_card_as_on_the_cpu(vram_bytes):
    """bfloat16 against float32; with a budget of nothing every block streams."""
    parts = find_parts("demo", "i2v")
    request = GenerateRequest("a red circle moving right", image=read_image(START), seed=1)
    expected = Pipeline(parts, torch.device("cpu")).generate(request).frames.float()

    pipeline = Pipeline(parts, torch.device("cuda"), vram_bytes=vram_bytes)
    actual = pipeline.generate(request)

    difference = (actual.frames.float() - expected).abs().mean()
    assert difference < 3, f"mean difference {difference:.2f} of 255 levels"
    assert actual.peak_bytes > 0
    assert all(p.device.type == "cpu" for e in pipeline.experts for p in e.model.parameters())


@torch.inference_mode()
@pytest.mark.parametrize("budget", [None, 0])
def test_lora_strengths_by_step_reach_the_card_and_leave_nothing_there(tmp_path, budget):
    config, inputs = VARIANTS["t2v"], on_card(tiny_inputs(VARIANTS["t2v"]))
    lora = read_lora(written(tmp_path, every_kind(fill(WanModel(config)))))
    outputs = []
    for strengths, step in (((0.5, 0.0), 0), ((0.5, 0.0), 1), (0.5, 0), (0.0, 0)):
        model = fill(WanModel(config))
        engine = Residency(model)
        model.run_block = engine.run_block
        apply_loras(model, [(lora, strengths)])
        engine.place("cuda", budget)
        steps_of(model).follow(step, 2)
        outputs.append(model(**inputs))
        engine.release()
        assert {p.device.type for p in model.parameters()} == {"cpu"}

    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
