"""One block of a 14B image-to-video transformer, and forty in a row: where the time goes.

usage: python -m benchmarks.block --device cuda --out block.jsonl --profile block.txt

For each scheme a line for one block and one for a whole forward (the block forty times: timing does
not depend on the weights, which together are larger than any cache). A line holds case, scheme,
seconds and plain_seconds (without our Triton kernels; medians in the same run), ratio,
relative_error of a block to the same in float32, by_class (milliseconds of a block by kind of
kernel, from torch.profiler), tokens, attention (the row that was taken, by the scheme),
kernels, card, torch, commit. `--profile` writes the profiler's table of kernels.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightx2v_core.device import describe_card, select_device
from lightx2v_core.ops.attention import name_of, select_attention
from lightx2v_core.ops.fused import describe_kernels, plain_pytorch
from lightx2v_core.ops.matmul import Weight, select_matmul
from lightx2v_core.quant.quantise import WRITTEN
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import BlockInputs, WanBlock, WanModel

from .linears import quantised_linear
from .lines import Line, about, add_out, emit, median_seconds, relative_error
from .random_files import I2V_14B, TINY

BLOCKS = 40
LATENT = (21, 60, 104)  # 480x832, 81 frames: 32,760 tokens
SCHEMES = ("bf16", "fp8", "int8")
# Kinds of kernels by their names; the first that matches.
CLASSES = (
    ("attention", r"flash|fmha|sdpa|attend|attention|mha"),
    ("glue (ours)", r"^_(add_norm|rows|scale_sums)"),
    ("matmul", r"gemm|nvjet|cutlass|wgmma|xmma|splitk|cublas"),
    ("norm", r"norm|Norm"),
    ("other", r""),
)
Call = tuple[WanBlock, Tensor, BlockInputs]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--latent", type=int, nargs=3, default=LATENT, metavar=("T", "H", "W"))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES[:2])
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the whole forward; 0: none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    add_out(parser)
    parser.add_argument("--profile", type=Path, metavar="FILE.txt", help="append the tables here")
    options = parser.parse_args(arguments)
    emit(run(options), options.out)
    return 0


@torch.inference_mode()
def run(options: argparse.Namespace) -> Iterator[Line]:
    device, repeats = select_device(options.device), options.repeats
    config = replace(TINY if options.tiny else I2V_14B, num_layers=1)
    exact = random_model(config, device)
    inputs = random_inputs(config, device, tuple(options.latent))
    block, x, shared = block_call(exact, inputs, torch.float32)
    with plain_pytorch():
        expected = block(x, shared)
    facts: Line = {"tokens": x.shape[1], "kernels": describe_kernels(device), **about(device)}
    for scheme in options.schemes:
        model, row = in_scheme(exact, scheme, device)
        model.attend = select_attention(options.attention, device, exact=scheme == "bf16")
        block, x, shared = block_call(model, inputs, torch.bfloat16)

        def one(block: WanBlock = block, x: Tensor = x, shared: BlockInputs = shared) -> Tensor:
            return block(x, shared)

        error = relative_error(one(), expected)
        line: Line = {
            "case": "block",
            "scheme": scheme,
            "matmul": row,
            "attention": name_of(model.attend),
            **both(one, device, repeats),
        }
        line["relative_error"] = error
        if device.type == "cuda":
            line["by_class"], table = profile(one)
            if options.profile:
                with options.profile.open("a", encoding="utf-8") as file:
                    file.write(f"{scheme}\n{table}\n")
        yield line | facts
        if options.blocks:
            many = repeated(model, inputs, options.blocks)
            figures = both(many, device, max(repeats // 2, 1))
            told = {key: line[key] for key in ("scheme", "matmul", "attention")}
            yield {"case": "forward"} | told | figures | facts


def both(work: Callable[[], object], device: torch.device, repeats: int) -> Line:
    with plain_pytorch():
        plain = median_seconds(work, device, repeats)
    seconds = median_seconds(work, device, repeats)
    return {"seconds": seconds, "plain_seconds": plain, "ratio": seconds / plain}


def random_model(config: WanConfig, device: torch.device) -> WanModel:
    """float32 on `device`; matrices keep the size of signals."""
    with torch.device("meta"):
        model = WanModel(config)
    model = model.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.named_parameters():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=0.1, generator=generator)
    return model


def in_scheme(exact: WanModel, scheme: str, device: torch.device) -> tuple[WanModel, str]:
    """A copy as a file of `scheme` is loaded: matrices in bf16, or codes in the block's linears."""
    model, row = copy.deepcopy(exact), "bf16"
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if scheme == "bf16" or not name.startswith("blocks"):
            module.weight.data = module.weight.data.bfloat16()
            continue
        codes = str(WRITTEN[scheme].dtype).removeprefix("torch.")
        weight = Weight(codes, module.in_features, module.out_features)
        row = select_matmul("auto", describe_card(device), weight, torch.bfloat16).row
        model.set_submodule(name, quantised_linear(module.weight, module.bias, row, scheme))
    model.compute_dtype = torch.bfloat16
    return model, row


def random_inputs(
    config: WanConfig, device: torch.device, latent: tuple[int, int, int]
) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return {
        "x_BCTHW": randn(1, config.in_dim, *latent),
        "timestep_B": torch.full((1,), 937.5, device=device),
        "text_BSE": randn(1, 512, config.text_dim),
        "clip_BSE": randn(1, config.clip_tokens, 1280),
    }


def block_call(model: WanModel, inputs: dict[str, Any], dtype: torch.dtype) -> Call:
    """The first block with what it is called with."""
    seen: list[Call] = []

    def watch(_index: int, block: WanBlock, x: Tensor, shared: BlockInputs) -> Tensor:
        seen.append((block, x.contiguous(), shared))
        return x

    model.compute_dtype = dtype
    model(**inputs, run_block=watch)
    return seen[0]


def repeated(model: WanModel, inputs: dict[str, Any], times: int) -> Callable[[], Tensor]:
    """A whole forward whose only block runs `times` times."""

    def again(_index: int, block: WanBlock, x: Tensor, shared: BlockInputs) -> Tensor:
        for _ in range(times):
            x = block(x, shared)
        return x

    return lambda: model(**inputs, run_block=again)


def profile(work: Callable[[], object]) -> tuple[dict[str, float], str]:
    """(milliseconds by class of kernel, the table of kernels) of one call."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    work()
    with watch(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        work()
        torch.cuda.synchronize()
    kernels = sorted(
        ((e.key, e.count, e.self_device_time_total / 1000) for e in seen.key_averages()),
        key=lambda row: -row[2],
    )
    kernels = [row for row in kernels if row[2] > 0 and not row[0].startswith("aten::")]
    by_class = dict.fromkeys((name for name, _ in CLASSES), 0.0)
    for key, _, milliseconds in kernels:
        by_class[next(name for name, words in CLASSES if re.search(words, key))] += milliseconds
    lines = [f"{ms:9.3f} ms  {count:3d} x  {key[:150]}" for key, count, ms in kernels]
    return {name: round(ms, 3) for name, ms in by_class.items()}, "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
