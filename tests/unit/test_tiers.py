"""The benchmark that judges the demo in each tier, with an exam that costs nothing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from benchmarks import tiers
from lightx2v_core.ops import eight_bit, sixteen_bit


class QuickExam:
    """Scores that depend on whether the linears are codes."""

    def __init__(self, folder: object, prompts: int, device: torch.device) -> None:
        self.prompts = prompts

    def velocity(self, model: nn.Module) -> Tensor:
        return torch.full((4,), 1.0 if model.compute_dtype == torch.float32 else 1.25)

    def scores(self, model: nn.Module) -> Tensor:
        codes = any(hasattr(module, "weight_scale") for module in model.modules())
        return torch.arange(self.prompts)[:, None] % 2 - 0.25 * codes


def test_tiers_are_paired_with_the_first_and_what_cannot_run_says_why(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tiers, "Exam", QuickExam)
    out = tmp_path / "lines.jsonl"
    asked = ["bf16", "bf16, gluon16", "fp8 linears"]

    code = tiers.main(["--device", "cpu", "--prompts", "6", "--out", str(out), "--tiers", *asked])

    exact, blocked, codes = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0
    assert capsys.readouterr().out == out.read_text()
    assert exact["difference"] == [0.0, 0.0, 0.0] and exact["score"][0] == 50.0
    assert "needs an NVIDIA GPU" in blocked["blocked_by"] and "score" not in blocked
    assert codes["difference"] == pytest.approx([-25.0, -25.0, -25.0])
    assert (codes["scheme"], codes["attention"]) == ("fp8", "sdpa")
    assert codes["forward_error"] == 0.25


def test_rows_are_forced_for_the_run_alone(tmp_path, monkeypatch):
    seen = []

    def lines_of(*arguments: object) -> list:
        seen.append((eight_bit.LEAST_TOKENS, sixteen_bit.LEAST_KEYS))
        return []

    monkeypatch.setattr(tiers, "lines_of", lines_of)
    before = eight_bit.LEAST_TOKENS, sixteen_bit.LEAST_KEYS

    tiers.main(["--device", "cpu"])

    assert seen == [(1, 1)]
    assert before == (eight_bit.LEAST_TOKENS, sixteen_bit.LEAST_KEYS)
    assert min(before) > 1
