"""On a real card: streaming equals resident, half precision stays near float32, budgets hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightx2v_core.assemble import find_parts, load_text_encoder, load_transformer
from lightx2v_core.checkpoint.convert import quantise_file
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.branches import Branch, set_lora
from lightx2v_core.lora.read import read_lora
from lightx2v_core.lora.steps import steps_of
from lightx2v_core.media import read_image
from lightx2v_core.memory import residency
from lightx2v_core.memory.plan import WORKSPACE_BYTES, forward_bytes
from lightx2v_core.memory.residency import Residency
from lightx2v_core.memory.transport import TorchCuda
from lightx2v_core.pipeline import GenerateRequest, Pipeline
from lightx2v_core.presets import DEMO_FOLDER
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import VARIANTS, fill, relative_error, tiny_inputs
from tests.layouts import plain_demo
from tests.unit.lora.samples import every_kind, written
from tests.unit.text.samples import official_tensors, spiece_tensor

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


@pytest.fixture(scope="module", params=["bf16", "fp8", "int8"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer on disk, wide enough that a copy takes longer than a launch."""
    folder = tmp_path_factory.mktemp(request.param)
    config = WanConfig(dim=1024, ffn_dim=4096, num_layers=9, text_dim=64)
    plain = folder / "plain.safetensors"
    weights = fill(WanModel(config)).to(torch.bfloat16).state_dict()
    save_file({name: t.contiguous() for name, t in weights.items()}, plain)
    if request.param == "bf16":
        return plain
    quantise_file(plain, folder / "codes.safetensors", request.param)
    return folder / "codes.safetensors"


@torch.inference_mode()
@pytest.mark.parametrize("ram", ["pinned", "no pinned", "refused"])
@pytest.mark.parametrize("resident", [0, 4])
def test_streaming_from_a_file_equals_resident_bit_for_bit_in_every_step(
    file, ram, resident, monkeypatch
):
    """With LoRA; page-locked, from the mapped file, and where the driver refuses to lock."""
    if ram == "no pinned":
        monkeypatch.setattr(residency, "pinnable_bytes", lambda: 0)
    if ram == "refused":
        monkeypatch.setattr(TorchCuda, "register", lambda self, memory: False)
    loaded = load_transformer(file, torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    up, down = (torch.randn(shape, generator=generator) / 32 for shape in ((4096, 8), (8, 1024)))
    branches = {f"blocks.{i}.ffn.0": (Branch(down, up, 0.5),) for i in range(9)}
    set_lora(loaded.model, branches)
    engine, inputs = loaded.residency, on_card(tiny_inputs(loaded.model.config, batch=1))
    engine.place("cuda")
    expected = loaded.model(**inputs)
    own = dict(loaded.model.named_parameters())
    engine.release()

    engine.place("cuda", engine.card_bytes(resident))
    outputs = [loaded.model(**inputs) for _ in range(4)]
    line, pinned = engine.describe(), engine.pinned_bytes
    engine.release()

    assert all(torch.equal(output, expected) for output in outputs)
    assert engine.resident == 0 and f"resident {resident}/9 blocks" in line, line
    assert (pinned > 0) == (ram == "pinned"), line
    assert own.keys() == dict(loaded.model.named_parameters()).keys()
    assert not any(p.is_cuda for p in loaded.model.parameters())


@torch.inference_mode()
def test_a_block_is_copied_while_another_computes(file):
    """Streamed time stays well below copy and computation one after the other."""
    loaded = load_transformer(file, torch.bfloat16)
    config, engine = loaded.model.config, loaded.residency
    inputs = {
        "x_BCTHW": torch.randn(1, config.in_dim, 9, 96, 96, device="cuda"),
        "timestep_B": torch.ones(1, device="cuda"),
        "text_BSE": torch.randn(1, 512, config.text_dim, device="cuda"),
    }

    def seconds(budget: float | None) -> float:
        engine.release()
        engine.place("cuda", budget)
        for _ in range(3):
            loaded.model(**inputs)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(5):
            loaded.model(**inputs)
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 5e3

    resident, streamed_two, streamed_one = (
        seconds(b) for b in (None, engine.card_bytes(0), engine.least_bytes)
    )

    print(f"resident {resident:.4f} s, two buffers {streamed_two:.4f}, one {streamed_one:.4f}")
    assert streamed_two < 1.02 * streamed_one
    assert streamed_two < 1.15 * resident


@torch.inference_mode()
def test_evictions_between_steps_change_nothing(file):
    loaded = load_transformer(file, torch.bfloat16)
    engine, inputs = loaded.residency, on_card(tiny_inputs(loaded.model.config, batch=1))
    engine.place("cuda")
    expected = loaded.model(**inputs)

    for _ in range(3):
        freed = engine.shrink(engine.loaded_bytes / 3)
        assert freed > 0
        assert torch.equal(loaded.model(**inputs), expected)
        engine.release()
        engine.place("cuda", engine.card_bytes(5))
        assert torch.equal(loaded.model(**inputs), expected)
        engine.place("cuda")


def test_page_locked_memory_is_given_back(file):
    loaded = load_transformer(file, torch.bfloat16)
    engine, inputs = loaded.residency, on_card(tiny_inputs(loaded.model.config, batch=1))
    before = torch.cuda.memory_allocated()
    engine.place("cuda", 0)
    loaded.model(**inputs)
    hosts = list(engine._hosts.values())
    assert all(host.pinned.is_pinned() for host in hosts)

    engine.release()
    del hosts

    assert engine.pinned_bytes == 0
    assert torch.cuda.memory_allocated() <= before + 2**20


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


@pytest.mark.parametrize("streams", [False, True])
def test_the_demo_makes_nearly_the_same_video_on_the_card_as_on_the_cpu(streams, caplog):
    """bfloat16 against float32; under a limit that leaves room for two buffers of blocks."""
    parts = replace(find_parts("demo", "i2v"), transformer=plain_demo("i2v"))
    request = GenerateRequest("a red circle moving right", image=read_image(START), seed=1)
    expected = Pipeline(parts, torch.device("cpu")).generate(request).frames.float()

    pipeline = Pipeline(parts, torch.device("cuda"))
    expert, size = pipeline.experts[0], pipeline.preset.size
    if streams:
        needed = expert.residency.card_bytes(0) + pipeline.turns.activations(expert, size)
        others = torch.cuda.memory_allocated() + 2**21
        pipeline.vram_bytes = others + WORKSPACE_BYTES + needed
    with caplog.at_level("INFO"):
        actual = pipeline.generate(request)

    difference = (actual.frames.float() - expected).abs().mean()
    whole = len(expert.model.blocks)
    assert difference < 3, f"mean difference {difference:.2f} of 255 levels"
    assert (f"transformer: resident {whole}/{whole} blocks" in caplog.text) != streams
    assert actual.peak_bytes > 0
    assert pipeline.vram_bytes is None or actual.peak_bytes <= pipeline.vram_bytes
    left = {p.device.type for p in expert.model.parameters()}
    assert ("cpu" in left) == streams, "it stays as far as there is room for it"
    again = pipeline.generate(replace(request, prompt="a blue circle moving left", seed=2))
    assert again.memory in ((), actual.memory) if streams else not again.memory, "only if it left"
    pipeline.turns.release(0)
    assert {p.device.type for p in expert.model.parameters()} == {"cpu"}


def test_placing_twice_on_a_card_named_without_its_number_leaves_nothing_there():
    model = fill(WanModel(DEEP)).bfloat16()
    engine, before = Residency(model), torch.cuda.memory_allocated()
    for budget in (engine.card_bytes(0), engine.card_bytes(2), None):
        engine.place("cuda", budget)

    engine.release()

    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.cuda.memory_allocated() - before < 2**20


@torch.inference_mode()
def test_text_states_do_not_depend_on_where_the_table_of_tokens_lies(tmp_path):
    file = tmp_path / "umt5.safetensors"
    save_file(official_tensors(dim=256) | {"spiece_model": spiece_tensor()}, file)
    encoder = load_text_encoder(file, dtype=torch.bfloat16)
    table = encoder.transformer.shared
    states = []
    for apart in ([], [table]):
        engine = Residency(encoder, [file], apart=apart)
        engine.place("cuda")
        states.append(encoder.encode(["a red circle"]))
        assert (table.weight.device.type == "cpu") == bool(apart)
        engine.release()

    assert states[0].is_cuda and torch.equal(*states)


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


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_count_of_activations_holds_on_the_card(dtype):
    config = WanConfig(dim=1024, ffn_dim=2816, num_layers=1, text_dim=64)
    model = fill(WanModel(config)).to(dtype).cuda()
    model.compute_dtype = dtype
    x = torch.zeros(1, 16, 9, 64, 64, device="cuda")
    inputs = (torch.ones(1, device="cuda"), torch.zeros(1, 512, 64, device="cuda"))
    model(x, *inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    model(x, *inputs)

    allocated = torch.cuda.max_memory_allocated() - before
    counted = forward_bytes(model, 9 * 32 * 32, torch.device("cuda"))
    print(f"{dtype}: {allocated / 1e6:.1f} MB allocated, {counted / 1e6:.1f} MB counted")
    assert allocated <= counted + WORKSPACE_BYTES
    assert counted <= 1.5 * allocated


@torch.inference_mode()
def test_the_text_encoder_streams_bit_for_bit(tmp_path):
    file = tmp_path / "umt5.safetensors"
    save_file(official_tensors(dim=256) | {"spiece_model": spiece_tensor()}, file)
    encoder = load_text_encoder(file, dtype=torch.bfloat16)
    engine = Residency(encoder, [file])
    engine.hook(encoder.blocks)
    engine.place("cuda")
    expected = encoder.encode(["a red circle"])
    engine.release()

    engine.place("cuda", 0)
    states = [encoder.encode(["a red circle"]) for _ in range(2)]

    assert engine.resident == 0
    assert all(torch.equal(s, expected) for s in states)
