"""Makes the mistakes of docs/messages.md and returns what is said: by the core, on small files."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightx2v_core.assemble import load_clip_vision, load_text_encoder, load_transformer
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.device import Card
from lightx2v_core.errors import LightX2VError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.match import match_lora
from lightx2v_core.lora.read import read_lora
from lightx2v_core.memory import plan as memory_plan
from lightx2v_core.memory.residency import Residency
from lightx2v_core.ops import attention, triton_support
from lightx2v_core.ops.matmul import Weight, select_matmul
from lightx2v_core.ops.trial import failure
from lightx2v_core.sizing import fit_size
from lightx2v_core.wan.vae import VaeConfig, WanVae
from tests.conftest import tiny_inputs, tiny_model
from tests.host.small_files import umt5_tensors

ROOT = Path(__file__).parents[2]
GB = 10**9
STOLEN_PACK = "a_pack_for_messages"


def raised(action: Callable[[], object]) -> str:
    try:
        action()
    except LightX2VError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def nodes_part(name: str) -> ModuleType:
    """A module of nodes/ that needs no ComfyUI, under a package name of its own."""
    for package, folder in ((STOLEN_PACK, ROOT), (f"{STOLEN_PACK}.nodes", ROOT / "nodes")):
        if package not in sys.modules:
            module = ModuleType(package)
            module.__path__ = [str(folder)]
            sys.modules[package] = module
    core = sys.modules["lightx2v_core"]
    sys.modules.setdefault(f"{STOLEN_PACK}.lightx2v_core", core)
    for known in ("errors", "conditioning", "wan.config", "wan.vae", "checkpoint.detect"):
        module = importlib.import_module(f"lightx2v_core.{known}")
        sys.modules.setdefault(f"{STOLEN_PACK}.lightx2v_core.{known}", module)
    return importlib.import_module(f"{STOLEN_PACK}.nodes.{name}")


def saved(folder: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / name)
    return folder / name


# --- LoRA ---


def lora_pair(stem: str) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_up.weight": torch.ones(256, 4),
        f"{stem}.lora_down.weight": torch.ones(4, 256),
        f"{stem}.alpha": torch.tensor(4.0),
    }


def described(folder: Path, name: str, tensors: dict[str, Tensor]) -> str:
    lora = read_lora(saved(folder, name, tensors))
    shapes = {k: tuple(v.shape) for k, v in tiny_model("a14b_i2v").state_dict().items()}
    return match_lora(lora, shapes).report.describe()


def image_keys_in_a_lora(folder: Path) -> str:
    tensors = lora_pair("diffusion_model.blocks.0.self_attn.q")
    tensors["diffusion_model.img_emb.proj.0.diff_b"] = torch.zeros(1280)
    return described(folder, "wan2.1_i2v_lora.safetensors", tensors)


def underscores_in_a_lora(folder: Path) -> str:
    tensors = lora_pair("lora_unet_blocks_1.self_attn.k")
    return described(folder, "trained_with_musubi.safetensors", tensors)


def clip_norms_in_a_lora(folder: Path) -> str:
    tensors = lora_pair("blocks.0.cross_attn.k")
    tensors["blocks.0.cross_attn.norm_k_img.diff"] = torch.zeros(256)
    return described(folder, "fusion_x_i2v.safetensors", tensors)


def lora_of_another_model(folder: Path) -> str:
    tensors = lora_pair("lora_unet_double_blocks_0_img_attn_qkv")
    return raised(lambda: described(folder, "high_noise_model.safetensors", tensors))


def lora_on_fp8(folder: Path) -> str:
    path = saved(folder, "wan.safetensors", tiny_model().state_dict())
    model = load_transformer(path, dtype=torch.float32, quantisation="fp8").model
    pair = saved(folder, "style.safetensors", lora_pair("diffusion_model.blocks.0.self_attn.q"))
    (report,) = apply_loras(model, [(read_lora(pair), 1.0)])
    return report.describe()


# --- What does not fit together ---

PICTURE = torch.zeros(1, 16, 3, 8, 8)


def start_image_on_t2v(_folder: Path) -> str:
    return raised(lambda: nodes_part("checks").check_start_image(16, 16, PICTURE))


def more_channels_than_i2v_takes(_folder: Path) -> str:
    control = torch.zeros(1, 48, 3, 8, 8)[:, :32]
    return raised(lambda: nodes_part("checks").check_start_image(36, 16, control))


def vae_of_5b(_folder: Path) -> str:
    samples = torch.zeros(1, 16, 21, 80, 80)
    return raised(lambda: nodes_part("checks").check_latent(samples, 48, "this VAE"))


def latent_of_5b(_folder: Path) -> str:
    samples = torch.zeros(1, 48, 21, 15, 26)
    return raised(lambda: nodes_part("checks").check_latent(samples, 16, "the sampler"))


def control_model(folder: Path) -> str:
    tensors = tiny_model().state_dict()
    tensors["patch_embedding.weight"] = torch.zeros(256, 48, 1, 2, 2)
    path = saved(folder, "wan2.1_fun_control.safetensors", tensors)
    return str(detect(open_checkpoint(path)).refusal)


def clip_l_text(_folder: Path) -> str:
    return raised(lambda: nodes_part("checks").check_text_width(768, 4096))


def text_of_a_language_model(_folder: Path) -> str:
    return raised(lambda: nodes_part("checks").check_text_width(3584, 4096))


def odd_height(_folder: Path) -> str:
    return fit_size(VideoSize(640, 360, 81)).describe()


def sides_no_model_makes(_folder: Path) -> str:
    return fit_size(VideoSize(292, 520, 17), "pad").describe()


def other_frames(_folder: Path) -> str:
    samples, image = torch.zeros(1, 16, 21, 60, 104), torch.zeros(1, 16, 22, 60, 104)
    return raised(lambda: nodes_part("checks").check_same_size(samples, image))


# --- Files ---


def scaled_fp8_text_encoder(folder: Path) -> str:
    tensors = dict(umt5_tensors())
    for name in [n for n in tensors if n.endswith((".q.weight", ".wo.weight"))]:
        scale = tensors[name].abs().amax() / 448.0
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".scale_weight")] = scale
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    path = saved(folder, "umt5_fp8_scaled.safetensors", tensors)
    states = load_text_encoder(path).encode(["a red circle"])
    assert torch.isfinite(states).all()
    return "nothing: it is loaded and encodes"


def t5_not_umt5(folder: Path) -> str:
    tensors = umt5_tensors()
    del tensors["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    path = saved(folder, "t5xxl_fp16.safetensors", tensors)
    return raised(lambda: load_text_encoder(path))


def vae_as_clip_vision(folder: Path) -> str:
    path = saved(folder, "clip_vision.safetensors", WanVae(VaeConfig(16, 16)).state_dict())
    return raised(lambda: load_clip_vision(path))


def only_blocks(folder: Path) -> str:
    blocks = {k: v for k, v in tiny_model().state_dict().items() if k.startswith("blocks.")}
    path = saved(folder, "wan_fp8_block.safetensors", blocks)
    return raised(lambda: load_transformer(path, dtype=torch.float32))


def half_a_file(folder: Path) -> str:
    path = saved(folder, "wan.safetensors", {"blocks.0.self_attn.q.weight": torch.zeros(2048, 512)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return raised(lambda: open_checkpoint(path))


def lfs_pointer(folder: Path) -> str:
    path = folder / "wan_2.1_vae.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n")
    return raised(lambda: open_checkpoint(path))


# --- The machine ---

A100, BLACKWELL = Card("cuda", (8, 0), (2, 9)), Card("cuda", (12, 0), (2, 9))


def packages(**there: bool) -> mock._patch:
    """find_spec answers for these packages; nothing is imported."""

    def find(name: str, *_: object) -> object | None:
        return object() if there.get(name.partition(".")[0]) else None

    return mock.patch.object(attention, "find_spec", find)


def no_sage(_folder: Path) -> str:
    with packages():
        return raised(lambda: attention.select_attention("sage", torch.device("cpu")))


def fp8_on_an_a100(_folder: Path) -> str:
    weight = Weight("float8_e4m3fn", 5120, 5120)
    assert select_matmul("auto", A100, weight, torch.bfloat16)[0] == "dequantise"
    return raised(lambda: select_matmul("fp8-row", A100, weight, torch.bfloat16))


def no_triton(_folder: Path) -> str:
    with mock.patch.object(triton_support, "find_spec", lambda _name: None):
        return str(triton_support.triton_blocked_by(A100))


def no_compiler(_folder: Path) -> str:
    def launch() -> Tensor:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    triton = ModuleType("triton")
    triton.TritonError = type("TritonError", (Exception,), {})
    with mock.patch.dict(sys.modules, {"triton": triton}):
        return str(failure(launch, torch.ones(1), 0.1))


def kernel_of_an_older_card(_folder: Path) -> str:
    with (
        packages(flash_attn_interface=True),
        mock.patch.object(attention, "describe_card", lambda _device: BLACKWELL),
    ):
        return raised(lambda: attention.select_attention("flash3", torch.device("cpu")))


def card_too_small(_folder: Path) -> str:
    engine = Residency(tiny_model())
    size = VideoSize(832, 480, 81)
    advice = memory_plan.cheaper(size, lambda smaller: smaller.frames <= 41, "an fp8 file")
    job = memory_plan.Job("transformer", 2 * GB, advice)
    return raised(lambda: memory_plan.place_within(engine, torch.device("cpu"), 1.5 * GB, job))


def ram_too_small(_folder: Path) -> str:
    with mock.patch.object(memory_plan, "available_bytes", lambda: int(6.1 * GB)):
        return raised(lambda: memory_plan.check_ram(int(28.6 * GB), "low-noise expert"))


def moved_by_another_add_on(_folder: Path) -> str:
    model = tiny_model()
    engine = Residency(model)
    engine.place("cpu")
    model.to("meta")
    inputs = tiny_inputs(model.config)
    assert inputs
    return raised(lambda: engine.enter(0))


# --- The pack itself ---


@contextmanager
def comfyui(version: str) -> Iterator[ModuleType]:
    """nodes/__init__.py as that ComfyUI would run it; no node of it is built."""
    found, latest = ModuleType("comfyui_version"), ModuleType("comfy_api.latest")
    found.__version__, latest.ComfyExtension = version, object
    stand_ins = {"comfyui_version": found, "comfy_api": ModuleType("comfy_api")}
    with mock.patch.dict(sys.modules, {**stand_ins, "comfy_api.latest": latest}):
        nodes_part("checks")  # the package exists
        spec = importlib.util.spec_from_file_location(
            f"{STOLEN_PACK}.nodes", ROOT / "nodes/__init__.py", submodule_search_locations=[]
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def old_comfyui(_folder: Path) -> str:
    with comfyui("0.3.64") as nodes:
        return raised(nodes.make_extension)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def files_of_two_versions(_folder: Path) -> str:
    import asyncio

    def load(_module: str, _package: str) -> ModuleType:
        exec(f"from {STOLEN_PACK}.nodes.checks import no_such_check")
        raise AssertionError

    heard = Lines()
    with comfyui("0.18.1") as nodes, mock.patch.object(nodes, "import_module", load):
        nodes.NODES = nodes.NODES[:1]
        nodes.log.addHandler(heard)
        assert not asyncio.run(nodes.make_extension().get_node_list())
    (line,) = heard.lines
    return line.replace(STOLEN_PACK, "lightx2v-distill").replace(ROOT.name, "lightx2v-distill")


def sources() -> str:
    found = [p for part in ("lightx2v_core", "nodes") for p in (ROOT / part).rglob("*.py")]
    return "\n".join(path.read_text("utf-8") for path in found)


def no_required_attention(_folder: Path) -> str:
    with packages():
        chosen = attention.select_attention("auto", torch.device("cpu"))
    assert chosen is attention.sdpa
    return "nothing: auto is PyTorch's own attention where no package is there"


def no_lightx2v_import(_folder: Path) -> str:
    text = sources()
    assert "import lightx2v." not in text and "from lightx2v" not in text
    return "nothing: the lightx2v package is not imported"


def nothing_compiled(_folder: Path) -> str:
    assert "torch.compile(" not in sources()
    return "nothing: torch.compile is not called"


def no_host_pinning(_folder: Path) -> str:
    text = sources()
    assert "mm.pin_memory" not in text and "unpin_memory" not in text
    return "nothing: ComfyUI's page-locked memory is not used, own memory is locked and freed"
