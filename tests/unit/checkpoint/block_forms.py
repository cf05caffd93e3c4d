"""Files in blocks (NVFP4, MXFP8) by the formulas of those who write them, and what they stand for.

Scales and order are those of ModelTC/LightX2V at f8aee98b, lightx2v_kernel/csrc/gemm/
nvfp4_quant_kernels_sm120.cu:118-245 and lightx2v/common/ops/mm/mm_weight.py:999-1060; names of
ComfyUI's dialect are those of ComfyUI 0.18.1, comfy/ops.py:969-1010. Written element by element
from there, and independent of the code under test.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

LARGEST_FP4, LARGEST_FP8 = 6.0, 448.0
MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def offsets(rows: int, blocks: int) -> tuple[Tensor, int]:
    """(place of each block's scale in the stored order, how many places there are)."""
    m, k = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    tiles = -(-blocks // 4)
    place = (m // 128) * tiles * 512 + (k // 4) * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4
    return place, -(-rows // 128) * 128 * tiles * 4


def stored_order(scale: Tensor) -> Tensor:
    place, count = offsets(*scale.shape)
    stored = torch.zeros(count, dtype=scale.dtype)
    stored[place.flatten()] = scale.flatten()
    return stored.reshape(-1, -(-scale.shape[1] // 4) * 4)


def fp4_value(code: Tensor) -> Tensor:
    """Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    normal = (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return torch.where(sign > 0, -1.0, 1.0) * torch.where(exponent > 0, normal, mantissa / 2)


def nvfp4(weight: Tensor, dialect: str) -> dict[str, Tensor]:
    """Tensors of one linear by their leaf."""
    inverted = LARGEST_FP4 * LARGEST_FP8 / weight.abs().amax()
    blocks = weight.reshape(weight.shape[0], -1, 16)
    scale = (inverted * blocks.abs().amax(dim=2) / LARGEST_FP4).to(torch.float8_e4m3fn)
    divided = blocks * inverted / scale.float().clamp_min(1e-12)[..., None]
    codes = torch.bucketize(divided.abs(), MIDDLES) | (divided < 0).long() << 3
    even, odd = codes.flatten(1)[:, 0::2], codes.flatten(1)[:, 1::2]
    tiled = stored_order(scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    if dialect == "comfy":
        text = bytearray(json.dumps({"format": "nvfp4"}).encode())
        return {
            "weight": (even << 4 | odd).to(torch.uint8),
            "weight_scale": tiled,
            "weight_scale_2": 1.0 / inverted,
            "input_scale": torch.tensor(0.01),
            "comfy_quant": torch.frombuffer(text, dtype=torch.uint8).clone(),
        }
    packed = {"weight": (odd << 4 | even).to(torch.uint8), "weight_scale": tiled}
    if dialect == "export":
        return packed | {"weight_global_scale": inverted, "input_absmax": torch.tensor(3.0)}
    input_scale = torch.tensor(808.0)
    alpha = 1.0 / (input_scale * inverted)
    return packed | {"alpha": alpha.reshape(1), "input_global_scale": input_scale}


def mxfp8(weight: Tensor) -> dict[str, Tensor]:
    blocks = weight.reshape(weight.shape[0], -1, 32)
    exponent = torch.log2(blocks.abs().amax(dim=2) / LARGEST_FP8).ceil()
    codes = (blocks / 2.0 ** exponent[..., None]).flatten(1).to(torch.float8_e4m3fn)
    text = bytearray(json.dumps({"format": "mxfp8"}).encode())
    return {
        "weight": codes,
        "weight_scale": stored_order((exponent + 127).to(torch.uint8)),
        "comfy_quant": torch.frombuffer(text, dtype=torch.uint8).clone(),
    }


def meant(leaves: dict[str, Tensor]) -> Tensor:
    """The weight that one linear's tensors stand for, in float32."""
    codes, scale = leaves["weight"], leaves["weight_scale"].view(torch.uint8).flatten()
    packed = codes.dtype == torch.uint8
    rows, block = codes.shape[0], 16 if packed else 32
    blocks = codes.shape[1] * (2 if packed else 1) // block
    place, _ = offsets(rows, blocks)
    if not packed:
        factor = 2.0 ** (scale[place].float() - 127)
        return (codes.float().reshape(rows, blocks, block) * factor[..., None]).flatten(1)
    low, high = (codes & 15).int(), (codes >> 4).int()
    pair = (high, low) if "weight_scale_2" in leaves else (low, high)
    values = torch.stack([fp4_value(code) for code in pair], dim=2).reshape(rows, blocks, block)
    factor = scale.view(torch.float8_e4m3fn).float()[place] * _global_scale(leaves)
    return (values * factor[..., None]).flatten(1)


def _global_scale(leaves: dict[str, Tensor]) -> Tensor:
    if "weight_scale_2" in leaves:
        return leaves["weight_scale_2"]
    if "weight_global_scale" in leaves:
        return 1.0 / leaves["weight_global_scale"]
    return leaves["alpha"] * leaves["input_global_scale"]


def as_file(weights: dict[str, Tensor], linears: list[str], form: str) -> dict[str, Tensor]:
    """`weights` with `linears` in mxfp8, or in NVFP4 of the dialect lightx2v, export or comfy."""
    tensors = dict(weights)
    for key in linears:
        leaves = mxfp8(weights[key]) if form == "mxfp8" else nvfp4(weights[key], form)
        del tensors[key]
        tensors |= {key.removesuffix("weight") + leaf: t for leaf, t in leaves.items()}
    return tensors


def leaves_of(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    stem = key.removesuffix("weight")
    found = {k.removeprefix(stem): v for k, v in tensors.items() if k.startswith(stem)}
    return {leaf: tensor for leaf, tensor in found.items() if "." not in leaf}
