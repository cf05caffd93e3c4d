"""Small models of every kind, ours and native with the same weights, and ways to sample them."""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))
import torch
from inside import DEVICE, WORK, fill, host_nodes, pack, relative, run

import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
from small_files import write

config_of = pack("lightx2v_core.wan.config").WanConfig
wan_model = pack("lightx2v_core.wan.model").WanModel

TEXT = 64
VARIANTS = {
    "t2v": config_of(dim=256, ffn_dim=512, num_layers=2, text_dim=TEXT),
    "i2v": config_of(dim=256, ffn_dim=512, num_layers=2, text_dim=TEXT, in_dim=36, clip_tokens=257),
    "flf2v": config_of(
        dim=256, ffn_dim=512, num_layers=2, text_dim=TEXT, in_dim=36, clip_tokens=514
    ),
    "a14b": config_of(dim=256, ffn_dim=512, num_layers=2, text_dim=TEXT, in_dim=36),
    "native": config_of(dim=256, ffn_dim=512, num_layers=2, text_dim=4096),
}
FILES = {}
for name, config in VARIANTS.items():
    weights = fill(wan_model(config)).state_dict()
    FILES[name] = weights
    write(WORK / f"models/diffusion_models/{name}.safetensors", weights)
write(WORK / "models/diffusion_models/high_noise_wan2.2.safetensors", FILES["a14b"])
write(WORK / "models/diffusion_models/low_noise_wan2.2.safetensors", FILES["a14b"])
write(
    WORK / "models/diffusion_models/half.safetensors",
    {k: v.to(torch.bfloat16) for k, v in FILES["t2v"].items()},
)


def quantised(weights: dict[str, torch.Tensor], scale_name: str) -> tuple[dict, dict]:
    """fp8 with a scale for each tensor, and the weights that it stands for."""
    codes, meant = dict(weights), dict(weights)
    for key, weight in weights.items():
        if key.startswith("blocks.") and weight.ndim == 2:
            scale = weight.abs().amax() / 448.0
            codes[key] = (weight / scale).to(torch.float8_e4m3fn)
            codes[key.removesuffix("weight") + scale_name] = scale
            meant[key] = codes[key].float() * scale
    return codes, meant


for name, scale_name in (("t2v", "weight_scale"), ("native", "scale_weight")):
    codes, meant = quantised(FILES[name], scale_name)
    if scale_name == "scale_weight":
        codes["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    write(WORK / f"models/diffusion_models/{name}_fp8.safetensors", codes)
    write(WORK / f"models/diffusion_models/{name}_fp8_meant.safetensors", meant)

AUTO = {"schedule": "auto"}
BY_SPLIT = {"split": "auto"}
noise_free = torch.zeros(1, 16, 3, 8, 8)
generator = torch.Generator().manual_seed(4)
states = torch.randn(1, 512, TEXT, generator=generator)
positive = [[states, {}]]
picture = torch.randn(1, 16, 3, 8, 8, generator=generator)
mask = torch.ones(1, 4, 3, 8, 8)
mask[:, :, 0] = 0.0


def ours(name: str = "t2v", memory: str = "ours", attention: str = "auto") -> object:
    file = f"{name}.safetensors"
    return run(
        "LightX2VLoadModel", file=file, quantisation="keep", attention=attention, memory=memory
    )[0]


def native(name: str = "t2v") -> object:
    """ComfyUI's own Wan with the same weights, in the stock patcher."""
    config = VARIANTS[name]
    unet = {
        **{"image_model": "wan2.1", "model_type": "i2v" if config.clip_tokens else "t2v"},
        **{"dim": config.dim, "ffn_dim": config.ffn_dim, "num_layers": config.num_layers},
        **{"num_heads": config.num_heads, "in_dim": config.in_dim, "out_dim": 16},
        **{"text_dim": config.text_dim, "text_len": 512, "freq_dim": 256, "patch_size": (1, 2, 2)},
        **{"cross_attn_norm": True, "eps": 1e-6, "qk_norm": True, "window_size": (-1, -1)},
    }
    if config.clip_tokens == 514:
        unet["flf_pos_embed_token_number"] = 514
    host = comfy.supported_models.WAN21_T2V(unet)
    host.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.WAN21(host, image_to_video=config.takes_image)
    model.load_model_weights(dict(FILES[name]), "")
    return comfy.model_patcher.ModelPatcher(
        model, load_device=DEVICE, offload_device=torch.device("cpu")
    )


def ksampler(model: object, cond: list | None = None, **changes: object) -> torch.Tensor:
    asked = {"seed": 7, "steps": 3, "cfg": 1.0, "latent": noise_free, **changes}
    cond = cond or positive
    out = host_nodes.common_ksampler(
        model,
        asked["seed"],
        asked["steps"],
        asked["cfg"],
        "euler",
        "simple",
        cond,
        asked.get("negative", cond),
        {"samples": asked["latent"].clone()},
    )
    return out[0]["samples"]


def distill(model: object, cond: list | None = None, **changes: object) -> tuple:
    asked = {
        **{"schedule": AUTO, "split": BY_SPLIT, "seed": 7, "solver": "euler", "cfg": 1.0},
        **{"latent": {"samples": noise_free.clone()}},
        **changes,
    }
    return run("LightX2VDistillSampler", model=model, positive=cond or positive, **asked)


def lora(rank: int = 4, with_diffs: bool = True) -> dict[str, torch.Tensor]:
    rng, tensors = torch.Generator().manual_seed(1), {}
    for key, weight in FILES["t2v"].items():
        stem = f"diffusion_model.{key.rpartition('.')[0]}"
        if key.startswith("blocks") and weight.ndim == 2:
            up, down = (weight.shape[0], rank), (rank, weight.shape[1])
            tensors[f"{stem}.lora_up.weight"] = torch.randn(up, generator=rng) * 0.05
            tensors[f"{stem}.lora_down.weight"] = torch.randn(down, generator=rng) * 0.05
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
        elif with_diffs and key.endswith("norm3.weight"):
            tensors[f"{stem}.diff"] = torch.randn(weight.shape, generator=rng) * 0.1
        elif with_diffs and key == "text_embedding.0.weight":
            tensors[f"{stem}.diff"] = torch.randn(weight.shape, generator=rng) * 0.02
        if with_diffs and key.startswith("blocks") and key.endswith(".bias"):
            tensors[f"{stem}.diff_b"] = torch.randn(weight.shape, generator=rng) * 0.1
    return tensors


write(WORK / "models/loras/small.safetensors", lora())


def with_lora(model: object, strength: float = 0.7) -> object:
    return host_nodes.LoraLoaderModelOnly().load_lora_model_only(
        model, "small.safetensors", strength
    )[0]


def shifted(model: object, shift: float = 5.0) -> object:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, shift)[0]


def image_cond(tokens: int = 0) -> list:
    extra = {"concat_latent_image": picture, "concat_mask": mask}
    if tokens:
        rng = torch.Generator().manual_seed(9)
        features = torch.randn(1, tokens, 1280, generator=rng)
        extra["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=features)
    return [[states, extra]]


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-5) -> str:
    error = relative(actual, expected)
    assert error <= limit, f"relative error {error:.2e} is above {limit:.0e}"
    return f"{error:.1e}"


def applied(model: object, file: str = "small.safetensors", strength: float = 0.7) -> tuple:
    return run("LightX2VApplyLora", model=model, lora=file, strength=strength)
