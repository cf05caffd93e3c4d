from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Generator

from lightx2v_core.assemble import load_transformer
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.wan.model import WanModel
from tests.conftest import fill, relative_error
from tests.unit.training.small_family import extracted, write_family
from training import verdicts
from training.files import STUDENTS, TEACHERS, save_weights
from training.samplers import Reusing, all_rows
from training.sizes import SMOKE
from training.table import even_parts
from training.table import main as table_main


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


def velocity(path: Path, lora: Path | None = None) -> torch.Tensor:
    model = load_transformer(path).model
    if lora is not None:
        (report,) = apply_loras(model, [(read_lora(lora), 1.0)])
        assert not report.failed
    rng = Generator().manual_seed(6)
    x = torch.randn(1, *SMOKE.latent_shape, generator=rng)
    text = torch.randn(1, 8, SMOKE.text_dim, generator=rng)
    with torch.no_grad():
        return model(x, torch.tensor([900.0]), text)


def test_a_lora_with_whole_differences_is_the_student_and_lower_ranks_are_farther(
    family: Path,
) -> None:
    base, student = (velocity(family / files["t2v"]) for files in (TEACHERS, STUDENTS))

    errors = [
        relative_error(velocity(family / TEACHERS["t2v"], extracted(family, rank)), student)
        for rank in (8, 32, 128)
    ]

    assert errors[2] < 1e-5, "at this rank no pair is smaller, and all differences are whole"
    assert errors[2] < errors[1] < errors[0] < relative_error(base, student)


def test_a_change_of_low_rank_is_found_whole(tmp_path: Path) -> None:
    base = fill(WanModel(SMOKE.transformer(takes_image=False))).state_dict()
    rng, name = Generator().manual_seed(7), "blocks.0.ffn.0.weight"
    up, down = torch.randn(256, 4, generator=rng), torch.randn(4, 128, generator=rng)
    student = {**base, name: base[name] + 0.05 * up @ down}
    save_weights(tmp_path / TEACHERS["t2v"], base, "t2v")
    save_weights(tmp_path / STUDENTS["t2v"], student, "t2v")

    pair = read_lora(extracted(tmp_path, rank=4)).pairs["blocks.0.ffn.0"]

    assert relative_error(pair.up_MR @ pair.down_RK, 0.05 * up @ down) < 0.01  # files are fp16


def test_a_distill_lora_has_the_names_and_type_of_the_published_ones(
    family: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with safe_open(extracted(family, rank=8, dtype="bf16"), "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        dtypes = {file.get_tensor(name).dtype for name in names}

    expected = (
        "blocks.0.self_attn.q.lora_up.weight",
        "blocks.0.self_attn.q.lora_down.weight",
        "blocks.0.self_attn.q.diff_b",
        "blocks.0.self_attn.norm_q.diff",
        "blocks.0.norm3.diff",
        "blocks.0.norm3.diff_b",
        "blocks.0.diff_m",
        "head.diff_m",
        "patch_embedding.diff",
        "time_embedding.0.lora_up.weight",
    )
    assert {f"diffusion_model.{name}" for name in expected} <= names
    assert dtypes == {torch.bfloat16}
    assert metadata["lightx2v.task"] == "t2v"
    assert "rank    8: relative error" in capsys.readouterr().out


def test_the_table_has_every_row_whose_files_are_there(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extracted(family, rank=8, name="demo_distill_lora.safetensors")

    folders = ["--folder", str(family), "--out", str(tmp_path)]
    table_main(["--smoke", *folders, "--prompts", "2", "--seeds", "2"])

    table = json.loads((tmp_path / "table.json").read_text("utf-8"))
    rows = {(row["task"], row["name"]): row for row in table["rows"]}
    assert len(rows) == 15
    first = rows["t2v", "base, 50 steps, CFG 3"]
    assert first["difference"] is None
    assert (first["frechet_ratio"], first["diversity_ratio"], first["speedup"]) == (1, 1, 1)
    assert all(row["clips"] == 4 and row["denoiser_seconds"] > 0 for row in rows.values())
    assert rows["t2v", "distilled, 4 steps"]["first_frame_psnr"] is None
    assert rows["i2v", "distilled, 4 steps"]["first_frame_psnr"] > 0
    assert rows["t2v", "distilled, 4 steps"]["speedup"] > 5, "100 forwards against 4"
    said = capsys.readouterr().out
    assert "left out: i2v base + two expert LoRAs, 4 steps: no demo_high_noise_lora" in said
    assert "| t2v: distilled, renoise, 4 steps | 4 |" in (tmp_path / "table.md").read_text("utf-8")
    for name in ("scores.png", "bars.png", "sheet.png"):
        assert (tmp_path / name).stat().st_size > 0


def test_two_clips_at_once_are_measured_as_one_after_the_other(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.table.QUICK_REAL_CLIPS", 12)
    monkeypatch.setattr("training.table.CPU_BATCH", 1)
    names = ["distilled, 4 steps", "distilled, renoise, 4 steps"]
    asked = ["--smoke", "--folder", str(family), "--prompts", "4", "--tasks", "i2v", "t2v"]

    made = {}
    for workers in (1, 2):
        monkeypatch.setattr("training.table.share_threads", lambda _, workers=workers: workers)
        table_main([*asked, "--out", str(tmp_path), "--seeds", "1", "--only", *names])
        table = json.loads((tmp_path / "table.json").read_text("utf-8"))
        made[workers] = [(row["score"], row["frechet"]) for row in table["rows"]]
        assert table["device"] == f"CPU, {workers} threads"

    assert len(made[1]) == 3
    assert made[1] == made[2]


def test_clips_are_shared_out_evenly() -> None:
    assert even_parts(1500, 256) == [(i * 250, (i + 1) * 250) for i in range(6)]
    assert even_parts(7, 3) == [(0, 2), (2, 4), (4, 7)]


def test_a_folder_without_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no model this table knows"):
        table_main(["--folder", str(tmp_path), "--out", str(tmp_path)])


def test_a_table_of_held_out_captions_asks_for_textures_and_order(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row in all_rows(family, 3.0) if row.name == "distilled, 4 steps"]
    monkeypatch.setattr("training.table.all_rows", lambda *_: rows[:1])
    monkeypatch.setattr("training.table.QUICK_REAL_CLIPS", 16)
    asked = ["--world", "wide", "--prompts", "8"]

    table_main(["--smoke", "--folder", str(family), "--out", str(tmp_path), *asked])

    table = json.loads((tmp_path / "table.json").read_text("utf-8"))
    (row,) = table["rows"]
    assert table["asked"] == "8 held-out prompts of the wide world"
    assert list(row["attributes"]) == ["color", "shape", "direction", "texture", "count", "order"]


def test_the_plain_world_has_no_table_of_held_out_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        table_main(["--out", str(tmp_path), "--world", "plain", "--split", "held-out"])

    assert "the plain world holds nothing out" in capsys.readouterr().err


def test_each_misuse_is_held_against_the_model_as_trained(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "RESAMPLES", 20)
    wanted = ["as trained", "CFG 3.5", "EasyCache skips step 2", "base, 4 steps"]
    asked = ["--smoke", "--misuse", "--folder", str(family), "--out", str(tmp_path)]

    table_main([*asked, "--prompts", "2", "--seeds", "2", "--tasks", "t2v", "--only", *wanted])

    made = json.loads((tmp_path / "misuse.json").read_text())
    assert [row["name"] for row in made["rows"]] == wanted[1:]
    assert [row["warning"] for row in made["rows"]] == ["cfg", "caching", "not distilled"]
    for row in made["rows"]:
        for measure in ("score", "frechet", "diversity"):
            interval = row[measure]
            assert interval["low"] <= interval["high"]
        assert ("score" in row["worse"]) == (row["score"]["high"] < 0)
    assert (tmp_path / "misuse.md").read_text().count("\n") == 5


def test_a_skipped_step_reuses_what_the_last_one_added() -> None:
    class Counting:
        calls = 0

        def guided(self, x: torch.Tensor, *_: object) -> torch.Tensor:
            self.calls += 1
            return 3 * x

    real = Counting()
    cached = Reusing(real, (1,))
    x = torch.ones(1, 2)

    made = [
        cached.guided(scale * x, torch.tensor([sigma]), (), None, 1.0)
        for scale, sigma in ((1.0, 1.0), (0.5, 0.9), (0.25, 0.8))
    ]

    assert real.calls == 2
    assert [float(m[0, 0]) for m in made] == [3.0, 0.5 + 2.0, 0.75]
