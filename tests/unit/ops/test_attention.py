"""Which attention a card takes, and what each row is refused for. Cards are made up."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from lightx2v_core.device import Card
from lightx2v_core.errors import CapabilityError
from lightx2v_core.ops import attention, eight_bit, triton_support
from lightx2v_core.ops.attention import (
    BACKENDS,
    Backend,
    name_of,
    sdpa,
    select_attention,
    takes_cudnn,
)

TORCH = (2, 11)
CARDS = {
    "8.0": Card("cuda", (8, 0), TORCH),
    "8.6": Card("cuda", (8, 6), TORCH),
    "8.9": Card("cuda", (8, 9), TORCH),
    "9.0": Card("cuda", (9, 0), TORCH),
    "12.0": Card("cuda", (12, 0), TORCH),
    "7.5": Card("cuda", (7, 5), TORCH),
    "ROCm": Card("rocm", (9, 4), TORCH),
    "MPS": Card("mps", (0, 0), TORCH),
    "CPU": Card("cpu", (0, 0), TORCH),
}
# What `auto` takes for an 8-bit model, and the 8-bit rows of ours that a card can be asked for.
TAKEN = {
    "8.0": ("sdpa", ["triton"]),
    "8.6": ("sdpa", ["triton"]),
    "8.9": ("sdpa", ["triton"]),
    "9.0": ("gluon", ["gluon", "triton"]),
    "12.0": ("sdpa", ["triton"]),
    "7.5": ("sdpa", []),
    "ROCm": ("sdpa", []),
    "MPS": ("sdpa", []),
    "CPU": ("sdpa", []),
}
PACKAGES = {
    "flash": "flash_attn",
    "flash3": "flash_attn_interface",
    "sage": "sageattention",
    "kitchen": "comfy_kitchen",
}


@pytest.fixture
def card(monkeypatch):
    """Puts a card with Triton 3.6 into the machine; rows that load are named, not loaded."""

    def put(name: str, triton: tuple[int, int] | None = (3, 6)) -> Card:
        monkeypatch.setattr(attention, "describe_card", lambda device: CARDS[name])
        for module in (triton_support, eight_bit):
            monkeypatch.setattr(module, "triton_version", lambda: triton)
        rows = {k: row._replace(load=lambda device, k=k: k) for k, row in BACKENDS.items()}
        monkeypatch.setattr(attention, "BACKENDS", rows)
        return CARDS[name]

    return put


@pytest.mark.parametrize("name", CARDS)
def test_auto_is_exact_for_a_16_bit_model_on_every_card(card, name):
    card(name)

    taken = select_attention("auto", "cpu")

    assert taken == ("gluon16" if name == "9.0" else "sdpa")
    assert BACKENDS[taken].is_exact


@pytest.mark.parametrize("name", TAKEN)
def test_auto_takes_an_8_bit_row_for_an_8_bit_model_where_it_is_proven(card, name):
    put = card(name)

    assert select_attention("auto", "cpu", exact=False) == TAKEN[name][0]
    ours = [key for key in ("gluon", "triton") if BACKENDS[key].blocked_by(put) is None]
    assert ours == TAKEN[name][1]


@pytest.mark.parametrize(
    ("name", "triton", "row", "words"),
    [
        ("9.0", None, "gluon", "the triton package is not installed"),
        ("9.0", (3, 7), "gluon", r"tested with Triton 3\.6 alone and this is 3\.7"),
        ("9.0", (3, 3), "triton", r"needs Triton 3\.4 and this is 3\.3"),
        ("12.0", (3, 6), "gluon", r"made for compute capability 9\.0 and this is 12\.0"),
        ("7.5", (3, 6), "triton", r"needs compute capability 8\.0 and this is 7\.5"),
        ("ROCm", (3, 6), "triton", "not been tried on AMD cards"),
        ("MPS", (3, 6), "gluon", "needs an NVIDIA GPU and this is mps"),
        ("CPU", (3, 6), "triton", "needs an NVIDIA GPU and this is cpu"),
    ],
)
def test_a_named_row_of_ours_is_refused_with_the_reason(card, name, triton, row, words):
    card(name, triton)

    with pytest.raises(CapabilityError, match=f"{row!r} cannot run here: .*{words}; use auto"):
        select_attention(row, "cpu")


def test_auto_goes_on_and_says_why_where_a_row_fails_its_trial(card, caplog, monkeypatch):
    card("9.0")

    def fails(device):
        raise CapabilityError("it is wrong here by 12.0%")

    rows = attention.BACKENDS
    rows = rows | {"gluon": rows["gluon"]._replace(load=fails)}
    monkeypatch.setattr(attention, "BACKENDS", rows)

    with caplog.at_level("INFO"):
        taken = select_attention("auto", "cpu", exact=False)

    assert taken == "triton"
    assert "attention: not gluon: it is wrong here by 12.0%" in caplog.text
    with pytest.raises(CapabilityError, match="wrong here by"):
        select_attention("gluon", "cpu")


def test_auto_says_what_a_proven_row_lacks(card, caplog):
    card("9.0", triton=(3, 7))

    with caplog.at_level("INFO"):
        taken = select_attention("auto", "cpu", exact=False)

    assert taken == "triton"
    assert "attention: not gluon: it was tested with Triton 3.6 alone" in caplog.text


def test_cudnn_goes_first_on_hopper_alone(monkeypatch, caplog):
    assert [name for name, one in CARDS.items() if takes_cudnn(one)] == ["9.0"]
    assert not takes_cudnn(CARDS["9.0"]._replace(torch=(2, 6)))

    taken = []
    for version in ((2, 6), (2, 7), (2, 10), (2, 11)):
        one = CARDS["9.0"]._replace(torch=version)
        monkeypatch.setattr(attention, "describe_card", lambda device, one=one: one)
        with caplog.at_level("INFO"):
            taken.append(select_attention("sdpa", "cpu"))

    ours = attention.sdpa_cudnn_first
    assert taken == [attention.sdpa, ours, ours, attention.sdpa]
    assert caplog.messages == ["attention: sdpa", *["attention: sdpa (cuDNN first)"] * 3]


def test_on_a_cpu_auto_is_plain_sdpa_and_the_log_says_so(caplog):
    with caplog.at_level("INFO"):
        taken = [select_attention("auto", "cpu", exact=exact) for exact in (True, False)]

    assert taken == [attention.sdpa] * 2
    assert caplog.messages == ["attention: sdpa"] * 2


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        CapabilityError, match="'magic' is unknown; use auto, gluon, triton, flash3, gluon16, sdpa"
    ):
        select_attention("magic")


@pytest.mark.parametrize("name", PACKAGES)
def test_a_named_choice_is_refused_and_not_replaced_where_its_package_is_missing(name, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda package: None)

    with pytest.raises(
        CapabilityError, match=f"{name!r} cannot run here: the {PACKAGES[name]} .* not installed"
    ):
        select_attention(name)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_cuda_row_is_refused_on_the_cpu_even_where_its_package_is_there(name, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda package: object())

    with pytest.raises(CapabilityError, match=r"needs a CUDA GPU and this is cpu"):
        select_attention(name, "cpu")


def test_a_package_row_is_refused_on_cards_it_is_not_made_for(monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda package: object())
    blocked = {
        name: [c for c, one in CARDS.items() if BACKENDS[name].blocked_by(one) is not None]
        for name in PACKAGES
    }

    assert blocked["flash3"] == [c for c in CARDS if c != "9.0"]
    assert blocked["flash"] == blocked["sage"] == ["7.5", "MPS", "CPU"]
    assert blocked["kitchen"] == ["MPS", "CPU"]


def test_an_older_comfy_kitchen_is_named(monkeypatch):
    has = {"comfy_kitchen": object(), "comfy_kitchen.sage_attention": None}
    monkeypatch.setattr(attention, "find_spec", has.get)

    assert (
        BACKENDS["kitchen"].blocked_by(CARDS["9.0"]) == "this comfy-kitchen has no int8 attention"
    )


HOPPER = CARDS["9.0"]
OWN_BUILD, WHEEL = attention.FLASH3_MODULES


@pytest.fixture
def flash3(monkeypatch):
    """Puts packages of FlashAttention 3 that compute `attend` (BLND) into a machine with Hopper."""

    def put(*modules: str, attend=None) -> list[str]:
        called = []

        def made(module: str) -> SimpleNamespace:
            def flash_attn_func(q, k, v):
                called.append(module)
                y = sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
                return (y if attend is None else attend(y), None)

            return SimpleNamespace(flash_attn_func=flash_attn_func)

        for module in modules:
            monkeypatch.setitem(sys.modules, module, made(module))
        found = {module: object() for module in modules}
        monkeypatch.setattr(attention, "find_spec", found.get)
        monkeypatch.setattr(attention, "describe_card", lambda device: HOPPER)
        return called

    return put


@pytest.mark.parametrize(
    ("installed", "taken"),
    [((OWN_BUILD,), OWN_BUILD), ((WHEEL,), WHEEL), ((WHEEL, OWN_BUILD), OWN_BUILD)],
)
def test_flash3_is_either_package_and_auto_takes_it_for_16_bits_on_hopper(
    flash3, installed, taken, caplog
):
    called = flash3(*installed)
    q, k, v = torch.randn(3, 1, 2, 9, 128, generator=torch.Generator().manual_seed(1)).bfloat16()

    with caplog.at_level("INFO"):
        attend = select_attention("auto", "cpu")
    with torch.no_grad():
        y = attend(q, k, v)

    assert set(called) == {taken}
    assert name_of(attend) == "flash3"
    assert torch.equal(y, sdpa(q, k, v))
    assert caplog.messages == [
        "attention: flash3 (exact, and faster than cuDNN on this kind of card)"
    ]


def test_flash3_leaves_gradients_and_float32_to_pytorch(flash3):
    called = flash3(WHEEL)
    attend = select_attention("flash3", "cpu")
    called.clear()
    q = torch.randn(1, 2, 9, 128, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        wide = attend(q, q, q)
    learns = attend(q.bfloat16(), q.bfloat16(), q.bfloat16())

    assert called == []
    assert torch.equal(wide, sdpa(q, q, q))
    assert torch.equal(learns, sdpa(q.bfloat16(), q.bfloat16(), q.bfloat16()))


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (lambda y: 1.1 * y, f"{WHEEL} is wrong here by 10.*%"),
        (lambda y: y.no_such_thing, f"{WHEEL} does not run here: AttributeError"),
    ],
)
def test_a_flash3_that_fails_its_trial_is_refused_and_auto_goes_on(flash3, breaks, reason, caplog):
    flash3(WHEEL, attend=breaks)

    with caplog.at_level("INFO"):
        taken = select_attention("auto", "cpu")

    assert taken is attention.sdpa
    assert re.search(f"attention: not flash3: .*{reason}", caplog.text)
    with pytest.raises(CapabilityError, match=reason):
        select_attention("flash3", "cpu")


def test_a_flash3_that_cannot_be_imported_is_refused_with_the_reason(flash3, monkeypatch):
    flash3(WHEEL)
    monkeypatch.setitem(sys.modules, WHEEL, None)

    with pytest.raises(CapabilityError, match="fa3_fwd_interface does not run here: ModuleNot"):
        select_attention("flash3", "cpu")


def test_rows_are_told_by_name():
    told = [name_of(row) for row in (sdpa, attention.sdpa_cudnn_first, test_rows_are_told_by_name)]

    assert told == ["sdpa", "sdpa", "test_rows_are_told_by_name"]


def test_auto_skips_a_blocked_row(monkeypatch):
    def chosen(q, k, v):
        return q

    rows = {
        "first": Backend(lambda device: attention.sdpa, lambda card: "it is blocked"),
        "second": Backend(lambda device: chosen, lambda card: None),
    }
    monkeypatch.setattr(attention, "BACKENDS", rows)

    assert select_attention("auto") is chosen


def test_the_plain_row_is_softmax_of_scaled_products():
    q, k, v = torch.randn(3, 2, 4, 7, 128, generator=torch.Generator().manual_seed(1)).double()

    expected = torch.softmax(q @ k.transpose(-1, -2) / 128**0.5, dim=-1) @ v

    torch.testing.assert_close(select_attention("sdpa")(q, k, v), expected)


def test_cudnn_first_is_the_same_attention():
    q, k, v = torch.randn(3, 1, 2, 9, 128, generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(attention.sdpa_cudnn_first(q, k, v), attention.sdpa(q, k, v))
