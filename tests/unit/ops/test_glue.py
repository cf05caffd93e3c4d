"""Rows shared between linears, and the choice between our kernels and plain PyTorch."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightx2v_core.device import Card
from lightx2v_core.lora.branches import Branch
from lightx2v_core.ops import Linear, fused, glue, triton_support
from lightx2v_core.ops.matmul import ROWS
from lightx2v_core.ops.rows import Form, Rows, form_for, quantise_rows, tokens_of
from lightx2v_core.quant.linear import QuantisedLinear
from lightx2v_core.quant.quantise import WRITTEN
from lightx2v_core.wan.model import BlockInputs, WanBlock, WanModel
from tests.conftest import VARIANTS, relative_error, tiny_inputs, tiny_model

FP8, INT8 = torch.float8_e4m3fn, torch.int8
SCHEMES = {"fp8-row": "fp8", "int8": "int8"}
MOST = ("self_attn.q", "self_attn.k", "cross_attn.q", "ffn.0", "ffn.2")


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised(linear: nn.Linear, row: str) -> QuantisedLinear:
    written = WRITTEN[SCHEMES[row]]
    codes, scale = written.quantise(linear.weight.detach())
    made = QuantisedLinear(
        linear.in_features, linear.out_features, written.dtype, tuple(scale.shape)
    )
    made.weight, made.weight_scale, made.bias = codes, scale, linear.bias
    made.use(ROWS[row])
    return made


def block_of(variant: str, row: str | None, only: tuple[str, ...] = ()) -> WanBlock:
    """A block with all linears, or `only` some, multiplied by `row`."""
    block = tiny_model(variant).blocks[0]
    for name, module in list(block.named_modules()) if row else ():
        if isinstance(module, nn.Linear) and (not only or name in only):
            block.set_submodule(name, quantised(module, row))
    return block


def shared_inputs(variant: str, dtype: torch.dtype) -> tuple[Tensor, BlockInputs]:
    seen = []
    model = tiny_model(variant)
    model.compute_dtype = dtype

    def watch(_index: int, _block: WanBlock, x: Tensor, inputs: BlockInputs) -> Tensor:
        seen.append((x, inputs))
        return x

    model(**tiny_inputs(VARIANTS[variant]), run_block=watch)
    return seen[0]


def one_by_one(block: WanBlock, x: Tensor, inputs: BlockInputs) -> Tensor:
    """The block as its mathematics is written, every linear handed a tensor."""
    modulation = block.modulation + inputs.modulation_B6E
    shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = modulation.chunk(6, dim=1)

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=block.eps) * (1 + scale) + shift
        return normed.to(inputs.dtype)

    x = x + block.self_attn(norm(x, shift_sa, scale_sa), inputs) * gate_sa
    x = x + block.cross_attn(block.norm3(x).to(inputs.dtype), inputs)
    return x + block.ffn(norm(x, shift_ffn, scale_ffn)) * gate_ffn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", [None, *SCHEMES])
@torch.inference_mode()
def test_a_block_in_plain_pytorch_equals_its_formula_bit_for_bit(row, dtype):
    block = block_of("i2v", row)
    x, inputs = shared_inputs("i2v", dtype)
    before = x.clone()

    y = block(x, inputs)

    assert torch.equal(y, one_by_one(block, x, inputs))
    assert torch.equal(x, before), "what the block was given is left alone"


@pytest.mark.parametrize("row", SCHEMES)
@torch.inference_mode()
def test_some_linears_in_half_precision_and_a_lora_change_nothing_in_that(row):
    block = block_of("t2v", row, only=MOST)
    x, inputs = shared_inputs("t2v", torch.bfloat16)
    plain = block(x, inputs)
    for name in ("self_attn.k", "self_attn.v", "ffn.0", "ffn.2"):
        linear = block.get_submodule(name)
        down, up = randn(4, linear.in_features), randn(linear.out_features, 4, seed=2)
        linear.branches = (Branch(0.1 * down, 0.1 * up, 0.7), Branch(0.1 * down, 0.1 * up, 0.0))

    y = block(x, inputs)

    assert torch.equal(y, one_by_one(block, x, inputs))
    assert relative_error(y, plain) > 1e-3


@pytest.mark.parametrize("row", SCHEMES)
@torch.inference_mode()
def test_one_quantisation_serves_query_key_and_value(row, monkeypatch):
    block = block_of("t2v", row)
    x, inputs = shared_inputs("t2v", torch.bfloat16)
    widths = []

    def counting(x_LK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        widths.append(tuple(x_LK.shape))
        return quantise_rows(x_LK, dtype)

    monkeypatch.setattr(glue, "quantise_rows", counting)
    block(x, inputs)

    # q, k and v; o; query of the text, its key, its value, o; both of the feed-forward part.
    video, text = (72, 256), (1024, 256)
    assert widths == [video, video, video, text, text, video, video, (72, 512)]


def test_with_gradients_every_linear_is_handed_a_tensor():
    block = block_of("t2v", None)
    x, inputs = shared_inputs("t2v", torch.float32)
    block.requires_grad_(True)

    form = form_for((block_of("t2v", "int8").ffn[0],), torch.float32)
    block(x.detach(), inputs).sum().backward()

    assert form == Form(torch.float32)
    assert block.modulation.grad is not None and block.self_attn.q.weight.grad is not None


class Foreign(nn.Linear):
    """Of another library, which knows tensors alone."""


@torch.inference_mode()
def test_the_form_of_an_activation_serves_every_linear_that_reads_it():
    plain, fp8 = Linear(64, 64), quantised(Linear(64, 64), "fp8-row")
    int8 = quantised(Linear(64, 64), "int8")
    with_lora = quantised(Linear(64, 64), "fp8-row")
    with_lora.branches = (Branch(randn(4, 64), randn(64, 4), 1.0),)
    forms = {
        "plain": form_for((plain, plain), torch.bfloat16),
        "fp8": form_for((fp8, fp8), torch.bfloat16),
        "a LoRA on one": form_for((fp8, with_lora), torch.bfloat16),
        "one plain": form_for((plain, fp8), torch.bfloat16),
        "two kinds": form_for((int8, fp8), torch.bfloat16),
        "a foreign one": form_for((fp8, Foreign(64, 64)), torch.bfloat16),
    }

    assert {name: (form.codes, form.tokens) for name, form in forms.items()} == {
        "plain": (None, True),
        "fp8": (FP8, False),
        "a LoRA on one": (FP8, True),
        "one plain": (FP8, True),
        "two kinds": (INT8, True),
        "a foreign one": (None, True),
    }


@torch.inference_mode()
def test_rows_of_one_kind_are_not_multiplied_as_another():
    linear, x = quantised(Linear(64, 48), "int8"), randn(2, 5, 64)
    rows = glue.rows_of(x, FP8)
    both = Rows(rows.codes_LK, rows.scale_L1, x.shape, x.dtype, x)

    assert torch.equal(linear(both), linear(x))
    with pytest.raises(AssertionError, match="rows without tokens reached a linear"):
        linear(rows)
    with pytest.raises(AssertionError, match="rows without tokens"):
        tokens_of(rows)


@pytest.mark.parametrize(
    ("card", "version", "words"),
    [
        (Card("cuda", (8, 0)), (3, 6), ""),
        (Card("cuda", (8, 6)), (3, 6), ""),
        (Card("cuda", (8, 9)), (3, 6), ""),
        (Card("cuda", (9, 0)), (3, 6), ""),
        (Card("cuda", (12, 0)), (3, 6), ""),
        (Card("cuda", (9, 0)), None, "the triton package is not installed"),
        (Card("cuda", (9, 0)), (3, 0), "needs Triton 3.2 and this is 3.0"),
        (Card("cuda", (7, 5)), (3, 6), "needs compute capability 8.0 and this is 7.5"),
        (Card("rocm", (9, 4)), (3, 6), "have not been tried on AMD cards"),
        (Card("mps"), (3, 6), "needs an NVIDIA GPU and this is mps"),
        (Card("cpu"), (3, 6), "needs an NVIDIA GPU and this is cpu"),
    ],
)
def test_kernels_are_taken_where_they_can_run_and_refused_in_words(
    card, version, words, monkeypatch
):
    fake_triton(monkeypatch, Computing())
    monkeypatch.setattr(fused, "describe_card", lambda device: card)
    monkeypatch.setattr(triton_support, "triton_version", lambda: version)

    found = fused.load_kernels("cpu")

    assert bool(found.module) == (not words)
    assert found.blocked_by.endswith(words)


class CompilerError(Exception):
    """As Triton's own, which derives from nothing else."""


def fake_triton(monkeypatch: pytest.MonkeyPatch, kernels: object) -> None:
    """A Triton whose kernels are those of `kernels`, a module or what importing it raises."""
    errors = ModuleType("triton.errors")
    errors.TritonError = CompilerError
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.errors", errors)

    def import_module(_name: str, _package: str | None = None) -> object:
        if isinstance(kernels, Exception):
            raise kernels
        return kernels

    monkeypatch.setattr(fused, "import_module", import_module)
    monkeypatch.setattr(triton_support, "triton_version", lambda: (3, 6))
    monkeypatch.setattr(fused, "describe_card", lambda device: Card("cuda", (9, 0)))
    fused._load.cache_clear()


@pytest.fixture(autouse=True)
def asked_anew():
    yield
    fused._load.cache_clear()


class Computing(ModuleType):
    """Kernels that compute in PyTorch; `off` is added to every code."""

    def __init__(self, off: int = 0, raises: Exception | None = None) -> None:
        super().__init__("computing")
        self.off, self.raises = off, raises

    def rows(self, x: Tensor, form: Form) -> Rows:
        if self.raises:
            raise self.raises
        codes, scale = quantise_rows(x, form.codes)
        return Rows(codes + self.off, scale, x.shape, form.dtype)


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        (ImportError("libcuda.so.1: cannot open"), "triton fails here: ImportError: libcuda.so.1"),
        (Computing(raises=RuntimeError("Failed to find C compiler")), "Failed to find C compiler"),
        (Computing(raises=CompilerError("ptxas died")), "triton fails here: CompilerError: ptxas"),
        (Computing(off=1), "they gave wrong numbers in their self-test"),
    ],
)
def test_a_triton_that_is_broken_leaves_plain_pytorch_with_the_reason(kernels, words, monkeypatch):
    fake_triton(monkeypatch, kernels)

    assert fused.load_kernels("cpu").module is None
    assert words in fused.describe_kernels("cpu")


def test_a_full_card_is_no_broken_triton(monkeypatch):
    fake_triton(monkeypatch, Computing(raises=torch.cuda.OutOfMemoryError("full")))

    with pytest.raises(torch.cuda.OutOfMemoryError):
        fused.load_kernels("cpu")


def test_kernels_compute_without_gradients_on_a_card_unless_plain_pytorch_is_asked_for(monkeypatch):
    kernels = Computing()
    fake_triton(monkeypatch, kernels)
    monkeypatch.setattr(fused, "load_kernels", lambda device: fused.Kernels(kernels))
    on_card = SimpleNamespace(device=torch.device("cuda", 0))
    with torch.no_grad():
        found = [fused.kernels_for(on_card)]
        with fused.plain_pytorch():
            found.append(fused.kernels_for(on_card))
        found.append(fused.kernels_for(torch.zeros(1)))
    found.append(fused.kernels_for(on_card))

    assert found == [kernels, None, None, None]


def test_a_model_without_triton_computes(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)

    with torch.inference_mode():
        y = WanModel(VARIANTS["t2v"])(**tiny_inputs(VARIANTS["t2v"], batch=1))

    assert torch.isfinite(y).all()
