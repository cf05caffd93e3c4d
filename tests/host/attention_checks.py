"""Whose attention a MODEL runs inside a real ComfyUI; registered by inprocess_settings.

The card is made up: rows of ours count their calls and compute as PyTorch does.
"""

# ruff: noqa: I001 - `inside` puts ComfyUI on the path and comes before its modules.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

from inside import DEVICE, check, pack, run

import comfy.ldm.modules.attention as host
import torch
from comfy.cli_args import args
from small_models import ksampler, ours

core, bridge = pack("lightx2v_core.ops.attention"), pack("nodes.bridge")


class Calls(NamedTuple):
    """Whose attention was called, in the order of calls."""

    names: list[str]

    def counted(self, name: str, attend: object) -> object:
        def attend_and_count(*args: object, **kwargs: object) -> torch.Tensor:
            self.names.append(name)
            return attend(*args, **kwargs)

        return attend_and_count

    def of(self, model: object) -> set[str]:
        self.names.clear()
        ksampler(model, steps=1)
        return set(self.names)


@contextmanager
def a_card(*fast: str) -> Iterator[Calls]:
    """On which the rows `fast` run, and where ComfyUI runs PyTorch's attention unasked."""
    calls = Calls([])
    capability = core.describe_card(DEVICE).capability
    rows = {"comfyui": calls.counted("comfyui", host.attention_pytorch)}
    rows["comfyui"].__name__ = "attention_pytorch"
    absent = {"blocked_by": lambda card: "it is not on this card"}
    backends = {
        name: row if name == "sdpa" else row._replace(**absent)
        for name, row in core.BACKENDS.items()
    }
    for name in fast:
        row = core.Packaged(name, calls.counted(name, core.sdpa))
        backends[name] = backends[name]._replace(
            load=lambda device, row=row: row,
            blocked_by=lambda card: None,
            proven_on=(capability,),
        )
    chosen = pack("nodes.attention")
    with (
        patch.object(core, "BACKENDS", backends),
        patch.object(chosen, "BACKENDS", backends),
        patch.object(bridge, "_compute_dtype", lambda device: torch.bfloat16),
        patch.object(host, "attention_pytorch", rows["comfyui"]),
        patch.object(host, "optimized_attention", rows["comfyui"]),
    ):
        yield calls


def load(quantisation: str = "keep", attention: str = "auto") -> tuple[object, str]:
    """(MODEL, what its summary says of attention)"""
    choices = {"quantisation": quantisation, "attention": attention, "memory": "ours"}
    model, summary = run("LightX2VLoadModel", file="t2v.safetensors", **choices)
    return model, summary.partition("; attention: ")[2]


@check
def auto_runs_our_8_bit_attention_for_8_bit_weights_alone() -> str:
    with a_card("gluon") as calls:
        quantised, told = load("int8")
        plain, plainly = load()
        assert calls.of(quantised) == {"gluon"}, calls
        assert calls.of(plain) == {"comfyui"}, calls
    assert told == "gluon (faster than ComfyUI's default here, 8-bit codes)", told
    assert plainly == "ComfyUI's pytorch (none of ours is faster here)", plainly
    return told


@check
def auto_runs_an_exact_attention_that_is_faster_for_16_bit_files() -> str:
    with a_card("flash3") as calls:
        model, told = load()
        assert calls.of(model) == {"flash3"}, calls
    assert told == "flash3 (faster than ComfyUI's default here, exact)", told
    return told


@check
def auto_follows_a_comfyui_that_was_told_another_attention() -> str:
    with a_card("gluon") as calls:
        with patch.object(args, "use_sage_attention", True):
            model, told = load("int8")
            assert calls.of(model) == {"comfyui"}, calls
        assert calls.of(load("int8")[0]) == {"gluon"}, "the flag is gone"
    assert told == "ComfyUI's pytorch (it was started with --use-sage-attention)", told
    return told


@check
def auto_follows_what_another_pack_puts_into_comfyuis_place_for_a_run() -> None:
    with a_card("gluon") as calls:
        model, _ = load("int8")
        assert calls.of(model) == {"gluon"}, calls
        theirs = calls.counted("theirs", host.attention_pytorch)
        with patch.object(host, "optimized_attention", theirs):
            assert "theirs" in calls.of(model) and "gluon" not in calls.names, calls
        assert calls.of(model) == {"gluon"}, calls


@check
def an_override_on_the_model_comes_before_our_row() -> None:
    with a_card("gluon") as calls:
        model, _ = load("int8")
        clone = model.clone()
        options = clone.model_options["transformer_options"]

        def override(attend: object, *given: object, **kwargs: object) -> torch.Tensor:
            calls.names.append("override")
            return attend(*given, **kwargs)

        options["optimized_attention_override"] = override
        # ComfyUI's own function hands over to the override; the counting one stands before it.
        assert "gluon" not in calls.of(clone), calls
        assert "override" in calls.names, calls
        assert calls.of(model) == {"gluon"}, calls


@check
def the_choice_comfyui_is_always_comfyuis_and_a_name_always_ours() -> None:
    with a_card("gluon") as calls:
        theirs, told = load("int8", "comfyui")
        assert calls.of(theirs) == {"comfyui"}, calls
        assert told == "ComfyUI's pytorch (as chosen)", told
        with patch.object(args, "use_sage_attention", True):
            named, by_name = load("keep", "gluon")
            assert calls.of(named) == {"gluon"}, calls
        assert by_name == "gluon", by_name


@check
def on_a_cpu_auto_stays_with_comfyuis_attention() -> str:
    if DEVICE.type != "cpu":
        return "a CPU's own"
    model = ours()
    assert model.model.diffusion_model.runs_host_attention({})
    return load()[1]
