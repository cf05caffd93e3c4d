"""On a real card: every Triton kernel equals plain PyTorch, twice the same, without waiting."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import glue as glue_benchmark
from benchmarks.block import in_scheme, random_inputs, random_model
from benchmarks.memory import TINY
from lightx2v_core.device import describe_card
from lightx2v_core.lora.branches import Branch
from lightx2v_core.ops import LayerNorm, Linear, fused, glue
from lightx2v_core.ops.fused import plain_pytorch
from lightx2v_core.ops.matmul import ROWS
from lightx2v_core.ops.rows import Form, Rows
from tests.conftest import fill, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
FP8, INT8 = torch.float8_e4m3fn, torch.int8
# The kernels round once where plain PyTorch rounds to bf16 before it quantises: some numbers fall
# on the other neighbour, 6 % (fp8) or 1/127 of the row's largest (int8) away.
OWN_ERROR = {None: 4e-3, FP8: 0.03, INT8: 0.02}
FORMS = [Form(torch.bfloat16), Form(torch.float16), Form(torch.float32)]
FORMS += [Form(torch.bfloat16, INT8, tokens) for tokens in (True, False)]
FORMS += [Form(torch.bfloat16, FP8, tokens) for tokens in (True, False)]
# Every form at one width, and one form at the others: each pair is compiled.
PAIRS = [(1536, form) for form in FORMS]
PAIRS += [(width, Form(torch.bfloat16, INT8)) for width in (128, 5120, 13824)]


@pytest.fixture(autouse=True)
def kernels() -> None:
    if reason := fused.load_kernels("cuda").blocked_by:
        pytest.skip(reason)


def supported(form: Form) -> Form:
    if form.codes == FP8 and describe_card("cuda").capability < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    return form


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def numbers(activation: Tensor | Rows) -> Tensor:
    if isinstance(activation, Rows):
        return (activation.codes_LK.double() * activation.scale_L1).view(activation.shape)
    return activation


def compare(work, form: Form) -> None:
    """`work` in Triton equals itself in plain PyTorch, and itself once more."""
    with plain_pytorch():
        expected = work()
    actual, again = work(), work()

    assert relative_error(numbers(actual), numbers(expected)) < OWN_ERROR[form.codes]
    assert torch.equal(numbers(actual), numbers(again))
    assert isinstance(actual, Rows) == isinstance(expected, Rows) == (form.codes is not None)
    if isinstance(actual, Rows) and isinstance(expected, Rows):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert (actual.tokens is None) == (expected.tokens is None) == (not form.tokens)
        if actual.tokens is not None:
            assert relative_error(actual.tokens, expected.tokens) < OWN_ERROR[None]


@pytest.mark.parametrize(("width", "form"), PAIRS, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 77), (2, 33)])
@torch.inference_mode()
def test_norms_with_and_without_a_sum_before_them_equal_plain_pytorch(batch, tokens, width, form):
    form = supported(form)
    x, y = 3 * randn(batch, tokens, width), randn(batch, tokens, width, seed=2).bfloat16()
    shift, scale, gate = randn(batch, 6, width, seed=3).chunk(6, dim=1)[:3]
    affine = fill(LayerNorm(width, eps=1e-6)).cuda()

    for how in (glue.ModulatedNorm(shift, scale, 1e-6), affine):
        compare(lambda how=how: glue.norm(x, how, form), form)
        for strength in (gate, None):
            compare(lambda how=how, g=strength: glue.add_norm(x, y, g, how, form)[1], form)


@pytest.mark.parametrize(("width", "form"), PAIRS, ids=str)
@torch.inference_mode()
def test_gelu_and_rows_equal_plain_pytorch(width, form):
    form = supported(form)
    x = randn(2, 33, 256).to(form.dtype)
    linear = fill(Linear(256, width)).to(form.dtype).cuda()

    compare(lambda: glue.gelu_of(linear, x, form), form)
    if form.codes is not None:
        compare(lambda: glue.rows_of(linear(x), form.codes), form._replace(tokens=False))


@pytest.mark.parametrize(("width", "form"), PAIRS, ids=str)
@torch.inference_mode()
def test_rows_of_a_sum_equal_plain_pytorch_and_change_neither_part(width, form):
    form = supported(form)
    x, y = (randn(2, 33, width, seed=seed).to(form.dtype) for seed in (1, 2))
    before = x.clone(), y.clone()

    compare(lambda: glue.total(x, y, form), form)

    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@torch.inference_mode()
def test_gelu_in_the_epilogue_of_a_matmul_is_nearer_to_float32_than_one_after_it():
    x, linear = randn(1, 333, 5120).bfloat16(), fill(Linear(5120, 1536)).cuda()
    exact = F.gelu(linear(x.float()), approximate="tanh")
    linear = linear.bfloat16()

    actual = glue.gelu_of(linear, x, Form(torch.bfloat16))

    assert relative_error(actual, exact) < relative_error(
        F.gelu(linear(x), approximate="tanh"), exact
    )


@pytest.mark.parametrize("in_place", [True, False])
@torch.inference_mode()
def test_a_gated_sum_equals_plain_pytorch_and_writes_only_where_it_may(in_place):
    x, y, gate = randn(2, 77, 5120), randn(2, 77, 5120, seed=2).bfloat16(), randn(2, 1, 5120)
    before, expected = x.clone(), x + y * gate

    total = glue.add(x, y, gate, in_place=in_place)

    assert relative_error(total, expected) < 1e-6
    assert torch.equal(x, before) != in_place


@torch.inference_mode()
def test_numbers_that_are_not_finite_do_not_pass_for_numbers():
    x = randn(5, 256).bfloat16()
    x[1, 3], x[2, 7], x[3, 9] = float("nan"), float("inf"), -float("inf")

    scales = glue.rows_of(x, INT8).scale_L1.flatten()

    assert torch.isfinite(scales).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("row", ["fp8-tensor", "int8"])
@torch.inference_mode()
def test_scales_and_bias_after_a_product_equal_plain_pytorch(row):
    usable = ROWS[row]
    codes = randn(512, 256).mul(20).to(INT8 if row == "int8" else FP8)
    scale, bias = randn(512, 1, seed=2).abs(), randn(512, seed=3).bfloat16()
    for dtype in (torch.bfloat16, torch.float16):
        x = randn(333, 256, seed=4).to(dtype)
        rows = glue.rows_of(x, usable.rows_dtype)
        for s in (scale, scale[:1]):
            with plain_pytorch():
                expected = usable.multiply(rows, codes, s, bias)

            y = usable.multiply(rows, codes, s, bias)

            assert (y.dtype, y.shape) == (dtype, expected.shape)
            assert relative_error(y, expected) < 6e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("has_lora", [False, True])
@torch.inference_mode()
def test_a_whole_forward_waits_for_nothing_and_is_as_near_to_float32_as_plain(scheme, has_lora):
    exact = random_model(TINY, torch.device("cuda"))
    inputs = random_inputs(TINY, torch.device("cuda"), (3, 10, 6))
    model, _ = in_scheme(exact, scheme, torch.device("cuda"))
    for name, linear in model.blocks.named_modules() if has_lora else ():
        if hasattr(linear, "branches"):
            down, up = randn(4, linear.in_features), randn(linear.out_features, 4)
            linear.branches = (Branch(down * 0.1, up * 0.1, 0.5),)
            exact.blocks.get_submodule(name).branches = linear.branches
    model(**inputs)
    torch.cuda.synchronize()
    with plain_pytorch():
        expected, plain = exact(**inputs), model(**inputs)

    torch.cuda.set_sync_debug_mode("error")
    try:
        y, again = model(**inputs), model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    errors = relative_error(y, expected), relative_error(plain, expected)
    print(json.dumps({"scheme": scheme, "fused": errors[0], "plain": errors[1]}))
    assert errors[0] < 1.1 * errors[1]
    assert not torch.equal(y, plain), "nothing ran in a kernel"
    assert torch.equal(y, again)


def test_gradients_flow_through_plain_pytorch():
    model = random_model(TINY, torch.device("cuda")).requires_grad_(True)
    inputs = random_inputs(TINY, torch.device("cuda"), (1, 4, 4))

    y = model(**inputs)

    with plain_pytorch():
        assert torch.equal(y, model(**inputs))
    y.sum().backward()
    assert model.blocks[0].modulation.grad.isfinite().all()
    assert isinstance(model.blocks[0].ffn, nn.Sequential)


def test_what_the_passes_of_a_14b_block_cost_is_printed():
    for line in glue_benchmark.run(torch.device("cuda"), 32760, 5120, 13824, 5):
        print(json.dumps(line))
        limit = {"fp8": 0.03, "int8": 0.02}.get(line["form"], 4e-3)
        assert line["relative_error"] < limit, line
