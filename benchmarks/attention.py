"""Self-attention of a 14B block, with what comes before it: every row against the best of PyTorch.

usage: python -m benchmarks.attention --device cuda --out attention.jsonl

Cases: attention_16bit (backends of PyTorch's attention, FlashAttention), attention_8bit (rows that
make codes of q, k and v themselves, which counts), rms_rotary (norm over the full dim and rotary of
q and k: several passes against one), and attention_from_linears (all of it, from what the linears
of q, k and v give to what o takes). A line holds seconds (median), ratio to the best PyTorch
backend of the same run, tflops of the products, relative_error to float32 on normal and on
structured numbers, card, torch, commit; or blocked_by, the reason why a row did not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightx2v_core.device import describe_card, select_device
from lightx2v_core.ops.attention import BACKENDS, Attend, sdpa, select_attention
from lightx2v_core.ops.eight_bit import EightBit
from lightx2v_core.ops.layers import RMSNorm
from lightx2v_core.ops.norm_rotary import fuses, norm_rotate, norm_rotate_plainly, split_heads
from lightx2v_core.wan.config import WanConfig
from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.rope import rotary_table

from .lines import Line, about, add_out, emit, median_seconds, relative_error

TOKENS = (32760, 75600)  # 81 frames of 480x832 and of 720x1280
HEADS, HEAD_DIM = 40, 128
CHECKED = 256  # queries of which the error is taken
TORCH_BACKENDS = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
}
Operands = tuple[Tensor, Tensor, Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--repeats", type=int, default=5)
    add_out(parser)
    options = parser.parse_args(arguments)
    device = select_device(options.device)
    emit(lines_of(device, options.tokens, options.repeats, options.heads), options.out)
    return 0


@torch.inference_mode()
def lines_of(
    device: torch.device, tokens: Sequence[int], repeats: int, heads: int = HEADS
) -> Iterator[Line]:
    """The lines of every case for each number of tokens."""
    for count in tokens:
        shape = {"tokens": count, "heads": heads, "head_dim": HEAD_DIM}
        for line in _attention_lines(device, count, heads, repeats):
            yield line | shape | about(device)
        for line in _glue_lines(device, count, heads, repeats):
            yield line | shape | about(device)


def _attention_lines(device: torch.device, tokens: int, heads: int, repeats: int) -> Iterator[Line]:
    inputs = {kind: operands(kind, tokens, heads, device) for kind in ("normal", "structured")}
    flop = 4 * tokens**2 * heads * HEAD_DIM
    rows = _torch_rows(device) | {name: name for name in BACKENDS}
    best = None
    for name, row in rows.items():
        is_exact = not isinstance(row, str) or BACKENDS[row].is_exact
        case = {"case": "attention_16bit" if is_exact else "attention_8bit", "row": name}
        reason = BACKENDS[row].blocked_by(describe_card(device)) if isinstance(row, str) else None
        if reason:
            yield case | {"blocked_by": reason}
            continue
        attend = select_attention(row, device) if isinstance(row, str) else row
        seconds = median_seconds(partial(attend, *inputs["normal"]), device, repeats)
        if best is None or (name in TORCH_BACKENDS and seconds < best):
            best = seconds
        errors = {kind: error_of(attend, *inputs[kind]) for kind in inputs}
        yield case | {
            "seconds": seconds,
            "ratio": seconds / best,
            "tflops": round(flop / seconds / 1e12, 1),
            "relative_error": errors["normal"],
            "relative_error_structured": errors["structured"],
        }


def _torch_rows(device: torch.device) -> dict[str, Attend]:
    """PyTorch's attention by one backend each: the peers that a ratio is taken to."""
    if device.type != "cuda":
        return {"sdpa-any": sdpa}
    return {name: partial(_by_backend, backend) for name, backend in TORCH_BACKENDS.items()}


def _by_backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _glue_lines(device: torch.device, tokens: int, heads: int, repeats: int) -> Iterator[Line]:
    """From what the linears give: norm and rotary of one operand, then all up to o's input."""
    x_BLE, norm, rotary = _linear_output(device, tokens, heads)
    v_BLND = split_heads(torch.randn_like(x_BLE))
    time = partial(median_seconds, device=device, repeats=repeats)
    several = time(partial(norm_rotate_plainly, x_BLE, norm, rotary))
    yield {"case": "rms_rotary", "row": "several passes", "seconds": several, "ratio": 1.0}
    if not fuses(x_BLE, norm):
        yield {"case": "rms_rotary", "row": "one pass", "blocked_by": "no kernel runs here"}
        return
    for row, turns in (("one pass", rotary), ("one pass, norm alone", None)):
        plain = time(partial(norm_rotate_plainly, x_BLE, norm, turns))
        seconds = time(partial(norm_rotate, x_BLE, norm, turns))
        case: Line = {"case": "rms_rotary", "row": row, "seconds": seconds}
        yield case | {"ratio": seconds / plain, "gb_per_s": round(2e-9 * x_BLE.nbytes / seconds)}

    def exact(turn: Callable[..., Tensor], attend: Attend) -> Tensor:
        q, k = (turn(x_BLE, norm, rotary).transpose(1, 2) for _ in range(2))
        return attend(q, k, v_BLND.transpose(1, 2))

    cudnn = partial(_by_backend, SDPBackend.CUDNN_ATTENTION)
    base = time(partial(exact, norm_rotate_plainly, cudnn))
    yield _from_linears("sdpa-cudnn after several passes", base, base)
    yield _from_linears("sdpa-cudnn", time(partial(exact, norm_rotate, cudnn)), base)
    for name in ("gluon", "triton"):
        if reason := BACKENDS[name].blocked_by(describe_card(device)):
            yield {"case": "attention_from_linears", "row": name, "blocked_by": reason}
            continue
        attend = select_attention(name, device)
        assert isinstance(attend, EightBit)
        pieces = {
            "queries": partial(attend.queries, x_BLE, norm, rotary),
            "keys": partial(attend.keys, x_BLE, norm, rotary),
            "values": partial(attend.values, v_BLND),
        }
        q, k, v = (piece() for piece in pieces.values())
        pieces["product"] = partial(attend.attend, q, k, v, x_BLE)
        parts = {f"{part}_seconds": time(work) for part, work in pieces.items()}
        yield _from_linears(name, sum(parts.values()), base) | parts


def _from_linears(row: str, seconds: float, base: float) -> Line:
    case: Line = {"case": "attention_from_linears", "row": row}
    return case | {"seconds": seconds, "ratio": seconds / base}


def _linear_output(
    device: torch.device, tokens: int, heads: int
) -> tuple[Tensor, RMSNorm, tuple[Tensor, Tensor]]:
    generator = torch.Generator(device).manual_seed(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = (1, tokens, heads * HEAD_DIM)
    x_BLE = torch.randn(shape, generator=generator, device=device).to(dtype)
    rotary = rotary_table((1, 1, tokens), HEAD_DIM, device)
    return x_BLE, RMSNorm(shape[-1], eps=1e-6, device=device), rotary


def operands(kind: str, tokens: int, heads: int, device: torch.device) -> Operands:
    """q, k, v BNLD as a model gives them: views of BLND.

    normal: independent numbers, the worst case, since what attention averages is nothing.
    structured: queries attend to neighbours in a line, keys lie 5 to 10 off zero in each lane.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if kind == "normal":
        made = [randn(1, tokens, heads, HEAD_DIM).to(dtype) for _ in range(3)]
        q, k, v = (x.transpose(1, 2) for x in made)
        return q, k, v
    angle = torch.arange(tokens, device=device)[:, None] / tokens
    angle = angle * 2 * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0], device=device)
    shared = torch.cat((angle.sin(), angle.cos()), 1) / 6**0.5
    q, k, v = (
        torch.empty(1, tokens, heads, HEAD_DIM, dtype=dtype, device=device) for _ in range(3)
    )
    for head in range(heads):
        mix = 1.1 * randn(12, HEAD_DIM)
        off = randn(HEAD_DIM).sign() * (5 + 5 * torch.rand_like(mix[0]))
        q[0, :, head] = shared @ mix + 0.7 * randn(tokens, HEAD_DIM)
        k[0, :, head] = shared @ mix + 0.7 * randn(tokens, HEAD_DIM) + off
        v[0, :, head] = shared @ (1.5 * randn(12, HEAD_DIM)) + randn(tokens, HEAD_DIM)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def error_of(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative error of CHECKED queries to attention in float32, head by head."""
    some = torch.linspace(0, q.shape[2] - 1, min(CHECKED, q.shape[2]), device=q.device).long()
    y = attend(q, k, v)[:, :, some].float()
    parts = [
        (q[:, h, some].float() @ k[:, h].float().mT * HEAD_DIM**-0.5).softmax(-1) @ v[:, h].float()
        for h in range(q.shape[1])
    ]
    exact = torch.stack(parts, 1)
    return relative_error(y, exact)


@torch.inference_mode()
def forward_error(
    attends: Sequence[Attend], layers: int = 4, grid: tuple[int, int, int] = (7, 60, 104)
) -> list[float]:
    """Of a forward of random 14B blocks in bfloat16 with each, to float32 with PyTorch's.

    Gates near one and scores of a few units, unlike fresh weights, whose attention is flat and
    hardly reaches the output.
    """
    config = WanConfig(dim=5120, ffn_dim=13824, num_layers=layers, text_dim=64)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = WanModel(config).bfloat16()
        arguments = (
            torch.randn(1, 16, *grid),
            torch.full((1,), 700.0),
            torch.randn(1, 512, 64),
        )
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and name.endswith("modulation"):
            parameter.data.normal_(std=0.3)[:, 2::3] += 1
        if "self_attn.norm" in name:
            parameter.data.fill_(1.5)
    expected = model(*arguments)
    model.compute_dtype = torch.bfloat16
    return [relative_error(model(*arguments, attend=attend), expected) for attend in attends]


if __name__ == "__main__":
    raise SystemExit(main())
