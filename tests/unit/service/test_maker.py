"""What the worker does with LoRAs and steps that a request names, without a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lightx2v_core.errors import CheckpointError, RequestError
from lightx2v_core.worker import Maker, _notes


class Recorder:
    def __init__(self):
        self.sets, self.problem = [], None

    def set_loras(self, files, experts):
        self.sets.append((list(files), list(experts)))
        if self.problem:
            raise self.problem
        return []


@pytest.fixture
def maker(tmp_path):
    (tmp_path / "style.safetensors").touch()
    configured = SimpleNamespace(path=Path("distill.safetensors"), strength=1.0, expert="high")
    return Maker(SimpleNamespace(loras=(configured,)), Recorder(), tmp_path)


def test_a_lora_of_a_request_joins_those_of_the_configuration_and_leaves_with_it(maker):
    named = {"lora_name": "style.safetensors", "lora_strength": 0.5}

    for request in ({}, named, named, {}, {}):
        maker._put_lora(request)

    distill = (Path("distill.safetensors"), 1.0)
    style = (maker.lora_dir / "style.safetensors", 0.5)
    assert maker.pipeline.sets == [([distill, style], ["high", None]), ([distill], ["high"])]


def test_a_lora_that_cannot_be_put_on_does_not_stay_half_on(maker):
    maker.pipeline.problem = CheckpointError("it belongs to another model")
    with pytest.raises(CheckpointError):
        maker._put_lora({"lora_name": "style.safetensors"})
    maker.pipeline.problem = None

    maker._put_lora({})

    assert maker.pipeline.sets[-1] == ([(Path("distill.safetensors"), 1.0)], ["high"])


def test_a_lora_is_found_in_its_folder_alone(maker):
    with pytest.raises(RequestError, match="not in the service's --lora_dir"):
        maker._put_lora({"lora_name": "other.safetensors"})
    maker.lora_dir = None
    with pytest.raises(RequestError, match="no --lora_dir"):
        maker._put_lora({"lora_name": "style.safetensors"})


def test_steps_that_are_not_the_models_are_named():
    assert _notes({"steps": 5}, 4)[0].startswith("infer_steps 5 has no effect")
    assert not _notes({"steps": 4}, 4) and not _notes({}, 4)
