from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightx2v_core.checkpoint.detect import CheckpointInfo
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.envelope import COSTS, Run, enforce, find_warnings
from lightx2v_core.errors import RequestError
from lightx2v_core.presets import PRESETS, Overrides, make_plan, preset_for

DISTILL = PRESETS["distill-4step"]
SIZE = DISTILL.size
RESULTS = Path(__file__).parents[2] / "benchmarks/results/misuse.json"
BASE = CheckpointInfo(
    "transformer", family="wan2.1", task="t2v", size="14B", release="base", preset="base-t2v-14b"
)
LORA = CheckpointInfo("lora", release="distill", preset="distill-4step")


def warned(
    overrides: Overrides = Overrides(), experts: int = 1, **facts: object
) -> tuple[str, ...]:
    run = replace(Run(None, DISTILL, SIZE, asked=overrides, experts=experts), **facts)
    return find_warnings(make_plan(run.preset, overrides, experts), run)


CASES = {
    "cfg": ({"cfg": 3.5}, {}, "CFG 3.5 on a CFG-distilled model burns .*; set CFG 1.0"),
    "cfg of a step": ({"cfgs": (1, 2, 1, 1)}, {}, "CFG 2 in step 2 on"),
    "cfg of the base": (
        {"base_steps": 5},
        {"base": LORA},
        "CFG 3.5 on model_base, which is distilled itself .*; connect the model that is not",
    ),
    "steps": ({"steps": 2}, {}, "2 steps on a model distilled for 4 .*; use 4, or schedule auto"),
    "shift": ({"shift": 1.0}, {}, "shift 1 on a model trained at 5 .*; set shift 5"),
    "shift above": ({"shift": 8.0}, {}, "shift 8 on a model trained at 5; set shift 5"),
    "shifts": ({"shifts": (8, 8, 4, 5)}, {}, "shift 8, 8, 4, 5 on .*Fréchet"),
    "list": ({"denoising_list": (999, 600, 300, 100)}, {}, "timesteps 999, 600, 300, 100 are not"),
    "frames": ({}, {"size": VideoSize(832, 480, 121)}, "121 frames, trained with 81"),
    "size": ({}, {"size": VideoSize(160, 96, 81)}, "160x96, trained at 832x480"),
    "not distilled": ({}, {"info": BASE}, "4 steps without CFG on a model that is not distilled"),
    "one expert": (
        {},
        {"info": CheckpointInfo("transformer", family="wan2.2", task="t2v", expert="high")},
        "the high-noise expert .* alone, .* noise .*score.*; connect the low-noise file too",
    ),
    "lora strength": (
        {},
        {"info": BASE, "loras": [[("a.safetensors", 0.125, LORA)]]},
        "a.safetensors at 0.125, made for 1 .*; set strength 1",
    ),
    "caching": ({}, {"caching": "EasyCache"}, "EasyCache skips whole steps, .*; remove it"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_setting_outside_the_envelope_is_exactly_one_warning_with_the_fix(case):
    overrides, facts, words = CASES[case]

    (warning,) = warned(Overrides(**overrides), **facts)

    assert re.search(words, warning), warning
    name = warning.partition(":")[0]
    assert case.startswith(name.rstrip("s")) and name in COSTS
    assert all(cost in warning for cost in COSTS.get(case, COSTS[name]))
    with pytest.raises(RequestError, match="strict is on: "):
        enforce([warning], strict=True)
    enforce([warning], strict=False)


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        ({}, {}),
        ({"denoising_list": (999, 750, 500, 250)}, {}),
        ({"denoising_list": (1000, 875, 750, 625, 500, 375, 250, 125)}, {}),
        ({"steps": 8}, {}),
        ({"steps": 4, "shift": 5.0, "cfg": 1.0}, {}),
        ({"solver": "renoise"}, {}),
        ({}, {"size": VideoSize(1280, 720, 81)}),
        ({}, {"info": BASE, "loras": [[("a", 1.0, LORA)]]}),
        (
            {"cfgs": (3.5, 1, 1, 1)},
            {"info": BASE, "loras": [[("a", (0, 1, 1, 1), LORA)], [("b", 1.0, LORA)]]},
        ),
        ({"base_steps": 5}, {"base": BASE}),
        ({"base_steps": 5}, {}),
    ],
)
def test_what_models_are_trained_or_known_to_do_is_no_warning(overrides, facts):
    assert warned(Overrides(**overrides), **facts) == ()


def test_a_base_model_by_its_own_preset_may_guide_and_take_forty_steps():
    preset = preset_for(BASE)
    run = Run(BASE, preset, preset.size)

    assert find_warnings(make_plan(preset), run) == ()


def test_a_warning_names_the_measures_that_the_demo_model_really_loses_in():
    """COSTS against the figures of training.table --misuse."""
    results = json.loads(RESULTS.read_text("utf-8"))

    worse = {row["name"]: set(row["worse"]) for row in results["rows"]}

    measured = {
        "cfg": "CFG 3.5",
        "steps": "2 steps",
        "shift": "shift 1",
        "list": "list [999, 600, 300, 100]",
        "caching": "EasyCache skips steps 2 and 3",
        "not distilled": "base, 4 steps",
        "lora strength": "distill LoRA at 0.4",
        "one expert": "the low-noise expert alone",
    }
    for name, row in measured.items():
        assert COSTS[name], name
        assert set(COSTS[name]) <= worse[row], (name, worse[row])
    trained = results["as_trained"]
    for row in results["other_sizes"]:
        assert COSTS[row["warning"]] == ("score", "Fréchet distance")
        assert row["score"]["high"] < trained["interval"]["low"]
        assert row["frechet"] > trained["frechet"]
    assert COSTS["shift above"] == ()
    assert not worse["shift 8"]
