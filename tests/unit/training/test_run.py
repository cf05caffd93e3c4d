from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightx2v_core.assemble import load_text_encoder, load_transformer, load_vae
from training.progress import Average, Clock, cosine
from training.run import main


def test_stages_leave_files_that_the_product_loads(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    main(["--smoke", "--out", str(first), "text:0.0001", "vae:0.0001", "bank:0.0001", "t2v:0.0001"])

    main(
        ["--smoke", "--out", str(second), "--from", str(first), "bank:0.0001", "t2v-student:0.0001"]
    )

    model = load_transformer(second / "demo_t2v.safetensors")
    assert (model.info.release, model.info.task) == ("demo", "t2v")
    assert load_text_encoder(first / "demo_umt5.safetensors").encode(["red"]).shape == (1, 512, 64)
    latent = load_vae(first / "demo_vae.safetensors").encode(torch.zeros(1, 3, 5, 32, 32))
    assert latent.shape == (1, 16, 2, 4, 4)
    records = [json.loads(line) for line in (second / "journal.jsonl").read_text().splitlines()]
    assert any("loss" in record for record in records)
    assert (second / "curves.png").is_file()


def test_a_stage_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"'vea:1' is not STAGE:MINUTES"):
        main(["--out", str(tmp_path), "vea:1"])


def test_the_learning_rate_rises_by_steps_and_falls_by_time() -> None:
    assert cosine(0.0, 0, 10) == pytest.approx(0.1)
    assert cosine(0.0, 50, 10) == pytest.approx(1.0)
    assert cosine(0.5, 50, 10) == pytest.approx(0.505)
    assert cosine(1.0, 50, 10) == pytest.approx(0.01)


def test_a_clock_without_minutes_is_over_at_once() -> None:
    clock = Clock(0.0)
    while not clock.is_over:
        pass

    assert clock.fraction == 1.0


def test_an_average_follows_its_module() -> None:
    module = torch.nn.Linear(2, 2)
    average = Average(module, decay=0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)

    for _ in range(40):
        average.update()

    torch.testing.assert_close(average.module.weight, module.weight.detach(), atol=1e-4, rtol=0)
