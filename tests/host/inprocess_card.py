"""The shipped demo and 8-bit files of it as a card computes them: half precision, fused kernels,
streaming, eviction. Run by tests/gpu; on a CPU it tries the checks themselves."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from inside import (
    DEVICE,
    FLAGS,
    IS_DYNAMIC,
    WORK,
    Heard,
    check,
    host_nodes,
    main,
    pack,
    relative,
    run,
    sentence,
)

import comfy.model_management as mm
import comfy.model_patcher
import torch
from safetensors.torch import load_file
from small_card import SmallCard
from small_files import write

DEMO = "lightx2v_demo/demo_"
PROMPT = "a large blue circle moving right on a dark background"
SIZE = {"width": 128, "height": 128, "frames": 17}
HALF = 0.03  # relative, of latents: what half precision may add up to over four steps
ON_CARD = DEVICE.type == "cuda"
AUTO = {
    **{"schedule": {"schedule": "auto"}, "split": {"split": "auto"}},
    **{"solver": "auto", "cfg": 0.0},
}

presets = pack("lightx2v_core.presets")
demo = {part: presets.DEMO_FOLDER / name for part, name in presets.DEMO_FILES.items()}
diffusion_models = WORK / "models/diffusion_models"
quantise_file = pack("lightx2v_core.checkpoint.convert").quantise_file
# In bfloat16, as published files are: blocks are then read where they lie in the file.
weights = pack("lightx2v_core.quant.dequantise").dequantised(load_file(demo["t2v"]), "demo", "")
half = {name: tensor.bfloat16() for name, tensor in weights.items()}
plain_file = write(diffusion_models / "bf16.safetensors", half)
for scheme in ("fp8", "int8", "fp8-tensor"):
    quantise_file(plain_file, diffusion_models / f"{scheme}.safetensors", scheme)


def write_lora() -> None:
    """Pairs on every matrix of the blocks."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, weight in half.items():
        if name.startswith("blocks.") and weight.ndim == 2 and name.endswith(".weight"):
            stem = f"diffusion_model.{name.removesuffix('.weight')}"
            for part, shape in (("up", (weight.shape[0], 8)), ("down", (8, weight.shape[1]))):
                values = torch.randn(shape, generator=generator) * 0.05
                tensors[f"{stem}.lora_{part}.weight"] = values
    write(WORK / "models/loras/card.safetensors", tensors)


write_lora()
clip = run("LightX2VLoadTextEncoder", file=f"{DEMO}umt5.safetensors")[0]
vae = run("LightX2VLoadVae", file=f"{DEMO}vae.safetensors")[0]
with torch.inference_mode():
    positive = host_nodes.CLIPTextEncode().encode(clip, PROMPT)[0]


def load(file: str = "bf16.safetensors", **choices: str) -> object:
    asked = {"quantisation": "keep", "attention": "auto", "memory": "ours", **choices}
    return run("LightX2VLoadModel", file=file, **asked)[0]


def latent(model: object, **changes: object) -> torch.Tensor:
    empty = run("LightX2VEmptyVideoLatent", **SIZE)[0]
    asked = {"model": model, "positive": positive, "latent": empty, "seed": 1, **AUTO, **changes}
    return run("LightX2VDistillSampler", **asked)[0]["samples"]


def frames(samples: torch.Tensor) -> torch.Tensor:
    return run("LightX2VDecodeVideo", latent={"samples": samples}, vae=vae)[0]


def with_native_lora(model: object) -> object:
    return host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, "card.safetensors", 0.7)[0]


@check
def the_device_is_what_was_asked_for() -> str:
    assert ("--cpu" in FLAGS) == (not ON_CARD), DEVICE
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    assert (patcher is not comfy.model_patcher.ModelPatcher) == IS_DYNAMIC
    dtype = load().model.diffusion_model.compute_dtype
    return f"{DEVICE}, {dtype}, {patcher.__name__}, {torch.cuda.get_allocator_backend()}"


@check
def the_nodes_give_the_frames_of_the_command_line() -> str:
    module, requests = pack("lightx2v_core.pipeline"), pack("lightx2v_core.request")
    parts = pack("lightx2v_core.assemble").find_parts("demo", "t2v")
    size = pack("lightx2v_core.datatypes").VideoSize(*SIZE.values())
    pipeline = module.Pipeline(parts, DEVICE)
    request = requests.GenerateRequest(PROMPT, size=size, seed=1)
    expected = pipeline.generate(request).frames.float()
    apart = (frames(latent(load(f"{DEMO}t2v.safetensors"))) * 255).round().sub(expected).abs()
    told = f"mean {apart.mean():.3f}, most {apart.max():.0f} of 255"
    assert apart.mean() < 1.0, told
    return told


@check
def a_second_run_is_the_same_bit_for_bit() -> None:
    for file in ("fp8.safetensors", "int8.safetensors", f"{DEMO}t2v.safetensors"):
        model = load(file)
        assert torch.equal(latent(model), latent(model)), file


@check
def streamed_blocks_give_what_resident_ones_give_bit_for_bit() -> str:
    told = []
    for file in ("fp8.safetensors", "bf16.safetensors", f"{DEMO}t2v.safetensors"):
        model = load(file)
        model.model.memory_required = lambda *a, **k: 0
        whole, engine = latent(model), model.model.engine
        assert engine.streamed == []
        with SmallCard(engine.least_bytes * 1.5):
            assert torch.equal(latent(model), whole), file
            assert engine.streamed, engine.describe()
            told.append(engine.describe())
        assert torch.equal(latent(model), whole), file
    return "; ".join(told)


@check
def an_eviction_spares_page_locked_copies_until_ram_is_wanted() -> str:
    """Where RAM is plentiful; ComfyUI asks for it before it loads another model."""
    model = load("bf16.safetensors")
    engine = model.model.engine
    whole = latent(model)
    with SmallCard(engine.least_bytes * 1.5):
        assert torch.equal(latent(model), whole)
        locked = engine.pinned_bytes
        assert bool(locked) == ON_CARD, engine.describe()
        mm.free_memory(1e30, DEVICE)
        assert (model.loaded_size(), engine.pinned_bytes) == (0, locked)
        assert torch.equal(latent(model), whole)
        mm.free_memory(1e30, DEVICE)
    model.partially_unload_ram(1e30)
    assert engine.pinned_bytes == 0
    assert torch.equal(latent(model), whole)
    return f"{locked} bytes"


@check
def eight_bit_files_stay_near_the_half_precision_one() -> str:
    plain = latent(load())
    errors = {s: relative(latent(load(f"{s}.safetensors")), plain) for s in ("fp8", "int8")}
    assert max(errors.values()) < 0.5, errors
    return str(errors)


@check
def a_native_lora_on_eight_bits_is_what_apply_lora_puts_there() -> str:
    told = {}
    for file in ("fp8.safetensors", "int8.safetensors", "fp8-tensor.safetensors"):
        model = load(file)
        plain = latent(model)
        theirs = latent(with_native_lora(model))
        mine = run("LightX2VApplyLora", model=model, lora="card.safetensors", strength=0.7)[0]
        assert relative(theirs, plain) > 0.01, "the LoRA changed nothing"
        told[file] = relative(latent(mine), theirs)
        assert told[file] < 1e-3, told
        assert torch.equal(latent(model), plain), "the clone left something behind"
    return str(told)


@check
def clones_with_and_without_a_lora_take_turns() -> None:
    model = load("fp8.safetensors")
    changed = with_native_lora(model)
    plain, other = latent(model), latent(changed)
    for _ in range(2):
        assert torch.equal(latent(model), plain)
        assert torch.equal(latent(changed), other)


@check
def comfyuis_own_memory_gives_the_same_video() -> str:
    mine, stock = latent(load()), load(memory="comfyui")
    told = f"{type(stock).__name__}: {relative(latent(stock), mine):.1e}"
    assert relative(latent(stock), mine) < HALF, told
    both = relative(latent(with_native_lora(stock)), latent(with_native_lora(load())))
    assert both < HALF, both
    return f"{told}, with a LoRA {both:.1e}"


def between(model: object, at: int, act: Callable[[], None]) -> object:
    """A clone of `model`; `act` is called after its forward number `at`."""
    calls = []

    def wrapper(apply: Callable, args: dict) -> torch.Tensor:
        result = apply(args["input"], args["timestep"], **args["c"])
        calls.append(1)
        if len(calls) == at:
            act()
        return result

    clone = model.clone()
    clone.set_model_unet_function_wrapper(wrapper)
    return clone


@check
def comfyuis_own_models_beside_ours_and_in_the_middle_of_a_run_change_no_bit() -> str:
    """Its model is a dynamic one where Dynamic VRAM is on."""
    write_native_model()
    theirs = host_nodes.UNETLoader().load_unet("native.safetensors", "default")[0]
    model = with_native_lora(load("fp8.safetensors"))
    whole = latent(model)
    own = sample_native(theirs)
    assert torch.equal(latent(model), whole)

    def rob() -> None:
        mm.free_memory(1e30, DEVICE)
        assert model.loaded_size() == 0
        mm.load_models_gpu([theirs])

    assert torch.equal(latent(between(model, 2, rob)), whole)
    assert torch.equal(sample_native(theirs), own)
    return type(theirs).__name__


def write_native_model() -> None:
    wan, config = (
        pack("lightx2v_core.wan.model").WanModel,
        pack("lightx2v_core.wan.config").WanConfig,
    )
    torch.manual_seed(0)
    weights = wan(config(dim=256, ffn_dim=512, num_layers=2, text_dim=4096)).state_dict()
    path = diffusion_models / "native.safetensors"
    write(path, {name: tensor.bfloat16() for name, tensor in weights.items()})


def sample_native(model: object) -> torch.Tensor:
    states = torch.randn(1, 512, 4096, generator=torch.Generator().manual_seed(8))
    cond, empty = [[states, {}]], {"samples": torch.zeros(1, 16, 3, 8, 8)}
    out = host_nodes.common_ksampler(model, 7, 3, 1.0, "euler", "simple", cond, cond, empty)
    return out[0]["samples"]


@check
def an_interrupt_leaves_nothing_behind() -> str:
    model = load("fp8.safetensors")
    whole = latent(model)
    stopped = between(model, 2, lambda: mm.interrupt_current_processing(True))
    told = sentence(lambda: latent(stopped))
    mm.interrupt_current_processing(False)
    assert told.startswith("InterruptProcessingException"), told
    assert torch.equal(latent(model), whole)
    return told


@check
def out_of_memory_of_the_card_itself_is_the_hosts_kind_of_error() -> str:
    """What PyTorch raises under the allocator that is on; the run after it is the same."""
    if not ON_CARD:
        return "a card's own"
    model = load("fp8.safetensors")
    whole = latent(model)

    def fill() -> None:
        torch.empty(2**48, dtype=torch.uint8, device=DEVICE)

    try:
        fill()
    except mm.OOM_EXCEPTION as error:
        told = type(error).__name__
    assert torch.equal(latent(between(model, 3, lambda: None)), whole)
    return told


@check
def free_gives_the_cards_memory_back() -> str:
    """The same after each of some runs, when everything was unloaded."""
    if not ON_CARD:
        return "a card's own"
    model, left = load("fp8.safetensors"), []
    for _ in range(4):
        with SmallCard(model.model.engine.least_bytes * 1.5):
            latent(model)
        mm.unload_all_models()
        mm.soft_empty_cache()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated(DEVICE))
    assert left[-1] <= left[1], left
    return str(left)


@check
def auto_attention_says_what_runs() -> str:
    with Heard():
        told = [
            run(
                "LightX2VLoadModel", file=file, quantisation="keep", attention="auto", memory="auto"
            )[1]
            for file in ("fp8.safetensors", "bf16.safetensors")
        ]
    said = [text.rpartition("attention: ")[2] for text in told]
    capability = torch.cuda.get_device_capability(DEVICE) if ON_CARD else (0, 0)
    assert capability != (9, 0) or said[0].startswith(("gluon", "triton")), said
    assert all(said), said
    return "; ".join(said)


if __name__ == "__main__":
    main()
