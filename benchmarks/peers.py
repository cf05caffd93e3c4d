"""Other programs' denoisers, run beside ours in the same process, each at the settings it offers.

`--peer comfyui=PATH` imports that checkout's own Wan model and layers; what a user would switch on
there (fp8 matmul, a scaled fp8 file, torch.compile, another attention) are settings by name.
`--peer diffusers` takes the installed package, `--peer lightx2v=PATH` a checkout.
The peer's modules are used as they are: nothing of them is changed but the attention where the
setting says so, through the hook the peer has for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightx2v_core.checkpoint.convert import is_quantised
from lightx2v_core.checkpoint.headers import TensorHeader
from lightx2v_core.checkpoint.layouts import to_diffusers
from lightx2v_core.errors import CapabilityError, RequestError
from lightx2v_core.wan.config import CLIP_DIM, WanConfig
from lightx2v_core.wan.vae import VaeConfig

from .contender import (
    FA3_FORWARD,
    Contender,
    Forward,
    Weights,
    comfyui_version,
    compile_blocks,
    half,
    installed,
)
from .peer_lightx2v import lightx2v

PEERS = "comfyui=PATH, diffusers or lightx2v=PATH"
FP8 = torch.float8_e4m3fn


def contenders(peer: str) -> list[Contender]:
    """Every setting of `NAME` or `NAME=PATH` that can run here.

    Raises RequestError for a name that is unknown, CapabilityError for one that cannot run.
    """
    name, _, path = peer.partition("=")
    if name == "comfyui":
        return _comfyui(Path(path))
    if name == "diffusers":
        return _diffusers()
    if name == "lightx2v":
        return lightx2v(Path(path))
    raise RequestError(f"peer {peer!r} is unknown; use {PEERS}")


def _comfyui(root: Path) -> list[Contender]:
    release = f"{comfyui_version(root)}, comfy-kitchen {installed('comfy-kitchen')}"
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    attentions: dict[str, Callable[..., Tensor] | None] = {"sdpa": None, "cudnn": _comfy_cudnn}
    if find_spec(FA3_FORWARD):
        attentions["fa3"] = _comfy_fa3
    made = []
    for scheme, tier in (("bf16", "16bit"), ("fp8-cast", "8bit"), ("fp8-scaled", "8bit")):
        for attention, override in attentions.items():
            for compiled in (False, True):
                setting = "-".join((scheme, attention, *(("compile",) if compiled else ())))
                load = _ComfyLoad(scheme, override, compiled)
                facts = (setting, release, tier, attention, scheme, load, override is None)
                made.append(Contender("comfyui", *facts))
    return made


@dataclass(frozen=True)
class _ComfyLoad:
    """bf16: plain layers. fp8-cast: what `--fast fp8_matrix_mult` does with a file without scales.
    fp8-scaled: a file with a scale for each tensor, which ComfyUI multiplies in fp8 by itself."""

    scheme: str
    attention: Callable[..., Tensor] | None
    compiled: bool

    def __call__(self, config: WanConfig, weights: Weights) -> Forward:
        device = next(iter(weights.values())).device
        layers = self._layers(_comfy("ops"), device)
        with torch.device("meta"):
            model = _comfy("ldm.wan.model").WanModel(
                model_type="i2v" if config.clip_tokens else "t2v",
                in_dim=config.in_dim,
                dim=config.dim,
                ffn_dim=config.ffn_dim,
                text_dim=config.text_dim,
                out_dim=config.out_dim,
                num_heads=config.num_heads,
                num_layers=config.num_layers,
                dtype=torch.bfloat16,
                operations=layers,
            )
        _comfy_fill(model, self._stored(weights), device)
        options: dict[str, Any] = {}
        if self.attention is not None:
            options["optimized_attention_override"] = self.attention
        if self.compiled:
            compile_blocks(model.blocks)

        def forward(x: Tensor, timestep: Tensor, text: Tensor, clip: Tensor | None) -> Tensor:
            x, text, clip = half(x, text, clip)
            return model(x, timestep, text, clip, transformer_options=dict(options)).float()

        return forward

    def _layers(self, ops: ModuleType, device: torch.device) -> Any:  # noqa: ANN401
        if self.scheme == "bf16":
            return ops.pick_operations(torch.bfloat16, torch.bfloat16, device)
        if self.scheme == "fp8-cast":
            picked = ops.pick_operations(FP8, torch.bfloat16, device, fp8_optimizations=True)
            if picked is not ops.fp8_ops and device.type == "cuda":
                raise CapabilityError("this ComfyUI does not multiply fp8 on this card")
            return ops.fp8_ops
        return ops.mixed_precision_ops({}, torch.bfloat16)

    def _stored(self, weights: Weights) -> Weights:
        """What such a file holds."""
        stored = dict(weights)
        for leaf in ("weight", "bias"):  # which ComfyUI keeps in float32
            stored[f"patch_embedding.{leaf}"] = weights[f"patch_embedding.{leaf}"].float()
        for name, weight in weights.items() if self.scheme != "bf16" else ():
            if not is_quantised(name, TensorHeader(tuple(weight.shape), "BF16")):
                continue
            if self.scheme == "fp8-cast":
                stored[name] = weight.to(FP8)
                continue
            layer = name.removesuffix("weight")
            scale = weight.abs().amax().float() / torch.finfo(FP8).max
            stored[name] = (weight / scale.to(weight)).clamp(-448, 448).to(FP8)
            stored[f"{layer}weight_scale"] = scale
            about = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}comfy_quant"] = torch.frombuffer(bytearray(about), dtype=torch.uint8)
        return stored


def _comfy(name: str) -> Any:  # noqa: ANN401 - modules of whatever version it is
    """ComfyUI asks for the card when it is imported, unless it is told that there is none."""
    if not torch.cuda.is_available():
        import_module("comfy.cli_args").args.cpu = True
    return import_module(f"comfy.{name}")


def _comfy_fill(model: torch.nn.Module, stored: Weights, device: torch.device) -> None:
    missing, unexpected = model.load_state_dict(stored, strict=False, assign=True)
    lacking = [name for name in missing if not name.endswith(("weight_scale", "input_scale"))]
    if lacking or unexpected:
        raise CapabilityError(
            f"this ComfyUI's Wan model lacks {len(lacking)} of our tensors and has "
            f"{len(unexpected)} others ({', '.join([*lacking, *unexpected][:3])})"
        )
    model.to(device)  # what is computed when it is built
    model.requires_grad_(False).eval()


def _comfy_cudnn(plain: Callable[..., Tensor], *arguments: object, **options: object) -> Tensor:
    """ComfyUI's own attention with cuDNN's kernel first, which it asks for on Windows alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return plain(*arguments, **options)


def _comfy_fa3(
    plain: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    **options: object,
) -> Tensor:
    """FlashAttention 3 (package fa3-fwd) where it can: B L (heads D) without a mask."""
    if mask is not None or options.get("skip_reshape"):
        return plain(q, k, v, heads, mask, **options)
    flash_attn_func = import_module(FA3_FORWARD).flash_attn_func
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    y = flash_attn_func(q, k, v)
    return (y[0] if isinstance(y, tuple) else y).flatten(2)


def comfy_vae(config: VaeConfig, device: torch.device) -> torch.nn.Module:
    """ComfyUI's own VAE of Wan 2.1 in bfloat16, random; `contenders` has found the checkout."""
    vae = _comfy("ldm.wan.vae").WanVAE(
        dim=config.decoder_dim, z_dim=config.z_dim, temperal_downsample=[False, True, True]
    )
    for parameter in vae.parameters():
        spread = 1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, std=spread)
    return vae.to(device, torch.bfloat16).requires_grad_(False).eval()


# diffusers' own names of attention, which `set_attention_backend` takes.
DIFFUSERS_ATTENTIONS = {"sdpa": "native", "cudnn": "_native_cudnn", "fa3": "_flash_3"}


def _diffusers() -> list[Contender]:
    if find_spec("diffusers") is None:
        raise CapabilityError("the diffusers package is not installed; pip install diffusers")
    release = installed("diffusers")
    has_own_fa3 = installed("flash-attn-3") != "unknown"
    attentions = [*DIFFUSERS_ATTENTIONS][: 3 if has_own_fa3 or find_spec(FA3_FORWARD) else 2]
    made = []
    for attention in attentions:
        for compiled in (False, True):
            setting = f"bf16-{attention}" + ("-compile" if compiled else "")
            load = _DiffusersLoad(attention, compiled)
            facts = (setting, release, "16bit", attention, "bf16", load)
            made.append(Contender("diffusers", *facts, stock=attention != "fa3" or has_own_fa3))
    return made


@dataclass(frozen=True)
class _DiffusersLoad:
    attention: str
    compiled: bool

    def __call__(self, config: WanConfig, weights: Weights) -> Forward:
        from diffusers import WanTransformer3DModel

        with torch.device("meta"):
            model = WanTransformer3DModel(
                num_attention_heads=config.num_heads,
                attention_head_dim=128,
                in_channels=config.in_dim,
                out_channels=config.out_dim,
                text_dim=config.text_dim,
                ffn_dim=config.ffn_dim,
                num_layers=config.num_layers,
                image_dim=CLIP_DIM if config.clip_tokens else None,
                added_kv_proj_dim=config.dim if config.clip_tokens else None,
            )
        named = {to_diffusers(name): tensor for name, tensor in weights.items()}
        for name in named:  # as `from_pretrained` does with bfloat16
            if any(part in name.split(".") for part in model._keep_in_fp32_modules):
                named[name] = named[name].float()
        device = next(iter(weights.values())).device
        rope = type(model.rope)(128, (1, 2, 2), 1024)  # its tables, which no file holds
        model.load_state_dict(named, strict=True, assign=True)
        model.rope = rope.to(device)
        model.requires_grad_(False).eval()
        self._choose_attention(model)
        if self.compiled:
            compile_blocks(model.blocks)

        def forward(x: Tensor, timestep: Tensor, text: Tensor, clip: Tensor | None) -> Tensor:
            x, text, clip = half(x, text, clip)
            return model(x, timestep, text, clip, return_dict=False)[0].float()

        return forward

    def _choose_attention(self, model: Any) -> None:  # noqa: ANN401 - theirs
        from diffusers.models import attention_dispatch

        if self.attention == "fa3" and attention_dispatch.flash_attn_3_func is None:
            forward = import_module(FA3_FORWARD)
            attention_dispatch.flash_attn_3_func = forward.flash_attn_func
            attention_dispatch._CAN_USE_FLASH_ATTN_3 = True
        model.set_attention_backend(DIFFUSERS_ATTENTIONS[self.attention])
