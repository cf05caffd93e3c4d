"""Every key has a fate, the documentation says the same, and our own configurations are obeyed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightx2v_core.configuration.keys import FATES, KEYS, key_table
from lightx2v_core.configuration.read import FORMS, make_configuration, read_configuration
from lightx2v_core.errors import RequestError

ROOT = Path(__file__).parents[3]
THEIR_KEYS = Path(__file__).with_name("lightx2v_keys.txt")
OURS = sorted((ROOT / "configs").rglob("*.json"))


def test_every_key_of_their_configurations_has_a_fate():
    keys = [k for k in THEIR_KEYS.read_text("utf-8").splitlines() if not k.startswith("#")]

    assert len(keys) == 60
    assert not set(keys) - set(KEYS)


def test_every_row_is_whole():
    for name, key in KEYS.items():
        assert key.fate in FATES, name
        assert key.form in FORMS, name
        assert key.what, name


def test_the_documentation_holds_the_table():
    text = (ROOT / "docs/lightx2v.md").read_text("utf-8")

    missing = [line for line in key_table() if line not in text.splitlines()]

    assert not missing, "put these lines (keys.key_table) into docs/lightx2v.md: " + str(missing)
    assert sum(line.startswith("| `") for line in text.split("## Keys")[1].splitlines()) == len(
        KEYS
    )


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.stem)
def test_our_own_configurations_hold_nothing_that_is_not_obeyed(path):
    configuration = read_configuration(path)

    assert configuration.notes == ()
    assert configuration.numbers("denoising_step_list") == (1000, 750, 500, 250)


def test_the_four_documented_configurations_are_there():
    names = {p.name for p in OURS}

    assert {
        f"wan_{task}_distill_4step_cfg{ending}.json"
        for task in ("t2v", "i2v")
        for ending in ("", "_lora")
    } <= names


def test_an_unknown_key_is_a_warning_with_the_nearest_name():
    notes = make_configuration({"sample_shfit": 5, "dim": 5120, "eps": 1e-6}, "c.json").notes

    assert notes[0] == (
        "warning: c.json: sample_shfit is no key that LightX2V has for Wan, and is ignored; "
        "sample_shift is meant?"
    )
    assert "c.json: dim ignored: sizes of the model are read from the tensors" in notes[1]
    assert len(notes) == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"infer_steps": "4"}, "infer_steps is '4'; it takes a whole number"),
        ({"infer_steps": True}, "infer_steps is True; it takes a whole number"),
        ({"infer_steps": float("inf")}, "infer_steps is inf; it takes a whole number"),
        ({"enable_cfg": "false"}, "enable_cfg is 'false'; it takes true or false"),
        ({"denoising_step_list": "1000"}, "it takes a list of numbers"),
        ({"sample_guide_scale": [1, 2, 3]}, "it takes a number, or a list of two"),
        ({"vae_path": "a\0b"}, "it takes a path"),
        ({"parallel": 4}, "it takes false or an object"),
        ({"lora_configs": [{"strength": 1}]}, r"lora_configs\[0\] has no path"),
        ({"lora_configs": [{"path": 3}]}, r"lora_configs\[0\].path is 3; it takes a path"),
    ],
)
def test_a_value_of_the_wrong_form_is_refused(values, words):
    with pytest.raises(RequestError, match=words):
        make_configuration(values, "c.json")


def test_null_is_as_if_the_key_were_not_there():
    values = make_configuration({"lora_configs": None, "high_noise_original_ckpt": None}).values

    assert values == {}
