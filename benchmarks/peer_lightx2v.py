"""LightX2V's own transformer beside ours: `--peer lightx2v=PATH` of a checkout.

Its `WanModel` computes as its runner lets it (bfloat16, no CFG, everything on the card), with the
attention and the matmul of the setting. A setting is SCHEME-ATTENTION, with `-compile` its own
`use_compile`. Weights are handed over where its loader would read a file, in that loader's types.

What it needs: loguru and triton. FlashAttention 3 (`fa3`) is the package flash_attn_interface, or
fa3-fwd, the same kernels built for the forward alone, put in its place; `sage` the package
sageattention. Norms, rotary and modulation go by its fastest kernels that are installed: sgl-kernel
and flashinfer, without them its Triton kernels and PyTorch.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightx2v_core.errors import CapabilityError, RequestError
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.vae import VaeConfig

from .contender import (
    FA3_FORWARD,
    Contender,
    Forward,
    Weights,
    allow_recompiles,
    half,
    installed,
)
from .lines import git_commit
from .random_models import quantised

WHO = "lightx2v"
MODEL = "lightx2v/models/networks/wan/model.py"
VAE = "lightx2v/models/video_encoders/hf/wan/vae.py"
# Its dit_quant_scheme by ours, with the package it needs beside PyTorch and Triton. What it calls
# fp8-torchao is PyTorch's own _scaled_mm.
SCHEMES: Mapping[str, tuple[str, str | None]] = {
    "bf16": ("bf16", None),
    "fp8-torchao": ("fp8", None),
    "fp8-triton": ("fp8", None),
    "fp8-sgl": ("fp8", "sgl_kernel"),
    "fp8-vllm": ("fp8", "vllm"),
    "fp8-q8f": ("fp8", "q8_kernels"),
    "int8-triton": ("int8", None),
    "int8-sgl": ("int8", "sgl_kernel"),
    "int8-vllm": ("int8", "vllm"),
    "int8-q8f": ("int8", "q8_kernels"),
    "int8-torchao": ("int8", "torchao"),
}
ATTENTIONS = {"sdpa": "torch_sdpa", "fa3": "flash_attn3", "sage": "sage_attn2"}
ATTENTION_KEYS = ("self_attn_1_type", "cross_attn_1_type", "cross_attn_2_type")
FA3 = "flash_attn_interface"
PACKAGES = ("sgl-kernel", "flashinfer-python", "vllm", "sageattention", "flash-attn-3", "fa3-fwd")
# Packages that its helpers for files and videos import, and no transformer calls.
FOR_VIDEOS = (
    *("einops", "imageio", "imageio_ffmpeg"),
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
)


def lightx2v(root: Path) -> list[Contender]:
    """Every setting that can run here.

    Raises RequestError where `root` is not a checkout of LightX2V.
    """
    release = lightx2v_release(root)
    schemes = [
        name for name, (_, package) in SCHEMES.items() if package is None or find_spec(package)
    ]
    made = []
    for scheme in schemes:
        for attention in _attentions():
            for compiled in (False, True):
                setting = "-".join((scheme, attention, *(("compile",) if compiled else ())))
                tier = "16bit" if scheme == "bf16" and attention != "sage" else "8bit"
                load = _Load(root, scheme, attention, compiled)
                facts = (setting, release, tier, attention, scheme, load)
                made.append(Contender(WHO, *facts, stock=attention != "fa3" or _has(FA3)))
    return made


def _attentions() -> Iterator[str]:
    yield "sdpa"
    if _has(FA3) or _has(FA3_FORWARD):
        yield "fa3"
    if _has("sageattention"):
        yield "sage"


def _has(module: str) -> bool:
    return find_spec(module) is not None


def lightx2v_release(root: Path) -> str:
    """What its package says, its commit, and the packages that decide how fast it is.

    A copy without .git may hold its commit in a file COMMIT.
    Raises RequestError where `root` is not a checkout of LightX2V.
    """
    if not (root / MODEL).is_file():
        raise RequestError(f"{root} holds no LightX2V with {MODEL}")
    text = (root / "lightx2v/__init__.py").read_text("utf-8")
    told = [text.partition('__version__ = "')[2].partition('"')[0] or "unknown"]
    if (root / ".git").exists():
        told.append(git_commit(root))
    elif (root / "COMMIT").is_file():
        told.append((root / "COMMIT").read_text("utf-8").strip()[:10])
    packages = {name: installed(name) for name in PACKAGES}
    told += [f"{name} {found}" for name, found in packages.items() if found != "unknown"]
    return ", ".join(told)


@dataclass(frozen=True)
class _Load:
    root: Path
    scheme: str
    attention: str
    compiled: bool

    def __call__(self, config: WanConfig, weights: Weights) -> Forward:
        device = next(iter(weights.values())).device
        theirs = _module(self.root, MODEL, device).WanModel
        if self.attention == "fa3":
            _lend_attention()
        scheme, _ = SCHEMES[self.scheme]
        stored = weights if scheme == "bf16" else quantised(weights, scheme)
        # Its loader turns scales into bfloat16 too.
        stored = {
            name: tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
            for name, tensor in stored.items()
        }

        class Given(theirs):
            """Its model, whose file is in memory."""

            def _load_ckpt(self, *_: object) -> Weights:
                return stored

            _load_quant_ckpt = _load_ckpt

        if self.compiled:
            allow_recompiles()
        if device.type == "cuda":
            return _forward(Given("", self._settings(config, device), device), config)
        with _unpinned():
            model = Given("", self._settings(config, device), device)
            model.to_cuda()  # from where it page-locks weights to where it computes: the CPU here
        return _forward(model, config)

    def _settings(self, config: WanConfig, device: torch.device) -> dict[str, Any]:
        """What a configuration file and its runner would say."""
        task = "i2v" if config.in_dim > config.out_dim else "t2v"
        settings = {
            **{"model_cls": "wan2.1_distill", "task": task},
            **{"feature_caching": "NoCaching", "enable_cfg": False, "cfg_parallel": False},
            **{"seq_parallel": False, "cpu_offload": False, "use_compile": self.compiled},
            **{"use_image_encoder": bool(config.clip_tokens), "text_len": 512, "freq_dim": 256},
            **{"dim": config.dim, "ffn_dim": config.ffn_dim, "num_heads": config.num_heads},
            **{"in_dim": config.in_dim, "out_dim": config.out_dim},
            **{"num_layers": config.num_layers, "text_dim": config.text_dim},
            **dict.fromkeys(ATTENTION_KEYS, ATTENTIONS[self.attention]),
            **_kernels(device.type == "cuda", self.compiled),
        }
        if self.scheme != "bf16":
            settings |= {"dit_quantized": True, "dit_quant_scheme": self.scheme}
        return settings


def _kernels(on_card: bool, compiled: bool) -> dict[str, str]:
    """Its kernels between matmuls; PyTorch's on a CPU, and where a compiler is to fuse them."""
    if compiled or not on_card:
        rotary = "torch_real_rope" if compiled else "torch_complex_rope"
        return {"rms_norm_type": "torch", "rope_type": rotary, "modulate_type": "torch"}
    return {
        "rms_norm_type": "sgl-kernel" if find_spec("sgl_kernel") else "torch_native",
        "rope_type": "flashinfer_rope" if find_spec("flashinfer") else "torch_complex_rope",
        "modulate_type": "triton",
    }


def _forward(model: Any, config: WanConfig) -> Forward:  # noqa: ANN401 - theirs
    """One step of its model for the first of a batch of one, without a scheduler's arithmetic."""
    scheduler = SimpleNamespace(step_index=0, infer_steps=1)
    model.set_scheduler(scheduler)

    def forward(x: Tensor, timestep: Tensor, text: Tensor, clip: Tensor | None) -> Tensor:
        if len(x) != 1:
            raise CapabilityError(f"LightX2V computes one video at a time; {len(x)} were given")
        whole, text, clip = half(x, text, clip)
        scheduler.latents, condition = whole[0].split(
            [config.out_dim, config.in_dim - config.out_dim]
        )
        scheduler.timestep_input = timestep
        image = {"vae_encoder_out": condition}
        if clip is not None:
            image["clip_encoder_out"] = clip[0]
        model.infer({"text_encoder_output": {"context": text}, "image_encoder_output": image})
        return scheduler.noise_pred[None].float()

    return forward


def lightx2v_vae(root: Path, config: VaeConfig, device: torch.device) -> torch.nn.Module:
    """Its own VAE of Wan 2.1, on the CPU; needs einops."""
    made = _module(root, VAE, device).WanVAE_(
        dim=config.decoder_dim, z_dim=config.z_dim, temperal_downsample=[False, True, True]
    )
    return made.requires_grad_(False).eval()


def convolve_by_rows_of_channels(vae: torch.nn.Module) -> None:
    """What its USE_CHANNELS_LAST_3D=1 does to the VAE."""
    sys.modules[_name(VAE)].convert_to_channels_last_3d(vae)


def _lend_attention() -> None:
    """Its FlashAttention 3 by the package of the forward kernels, where it found no other."""
    attentions = sys.modules["lightx2v.common.ops.attn.flash_attn"]
    if attentions.flash_attn_func_v3 is None:
        attentions.flash_attn_func_v3 = import_module(FA3_FORWARD).flash_attn_func


def _name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def _module(root: Path, path: str, device: torch.device) -> Any:  # noqa: ANN401 - any version
    """One of its modules, with its registers of kernels filled."""
    if _name(path) in sys.modules:
        return sys.modules[_name(path)]
    if "lightx2v" not in sys.modules:
        sys.path.insert(0, str(root))
        # Their __init__ imports every model and server there is.
        sys.modules["lightx2v"] = _package("lightx2v", root / "lightx2v")
    with _standing_in(FOR_VIDEOS):
        platform = import_module("lightx2v_platform.base.global_var")
        platform.AI_DEVICE = platform.PLATFORM = device.type
        import_module("lightx2v.common.ops")
        return import_module(_name(path))


def _package(name: str, folder: Path) -> types.ModuleType:
    """A package of this folder without what its __init__ does."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = [str(folder)]
    return module


@contextmanager
def _unpinned() -> Iterator[None]:
    """Its loader page-locks what is not on a card, which PyTorch refuses where there is none."""
    empty, pin = torch.empty, Tensor.pin_memory
    torch.empty = lambda *sizes, pin_memory=False, **more: empty(*sizes, **more)
    Tensor.pin_memory = lambda tensor, *_, **__: tensor
    try:
        yield
    finally:
        torch.empty, Tensor.pin_memory = empty, pin


@contextmanager
def _standing_in(names: Sequence[str]) -> Iterator[None]:
    """Those of `names` that are not installed can be imported while this is open."""
    absent = [name for name in names if find_spec(name.partition(".")[0]) is None]
    for name in absent:
        sys.modules[name] = _Unused(name)
        package, _, leaf = name.rpartition(".")
        if package:
            setattr(sys.modules[package], leaf, sys.modules[name])
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


class _Unused(types.ModuleType):
    """Stands in for a module that is not installed: has every name, and none can be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise CapabilityError(f"the package {self.__name__} is not installed")

        return refuse
