from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.media import read_image, read_metadata
from lightx2v_core.presets import DEMO_FILES
from tests.unit.training.small_family import extracted, write_family
from training import ship
from training.ship import main

SCORES = {"world": "wide", "t2v student, 4 steps": {"color": 99.4, "order": 91.2, "all": 97.0}}
LORAS = ("demo_distill_lora", "demo_high_noise_lora", "demo_low_noise_lora")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_family(tmp_path_factory.mktemp("family"))
    for name in LORAS:
        extracted(folder, rank=4, dtype="bf16", name=f"{name}.safetensors")
    (folder / "metrics.json").write_text(json.dumps(SCORES))
    return folder


def told(folder: Path) -> dict[str, tuple[str, str | None, str, str | None]]:
    infos = {part: detect(open_checkpoint(folder / name)) for part, name in DEMO_FILES.items()}
    return {p: (i.release, i.preset, i.scheme, i.expert) for p, i in infos.items()}


def dtype_of_text(folder: Path) -> str:
    headers = open_checkpoint(folder / DEMO_FILES["text"]).headers
    return headers["blocks.0.attn.q.weight"].dtype


def test_every_file_says_what_it_is_and_is_in_the_form_asked_for(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text(
        "before\n<!-- files: training.ship -->\nold\n<!-- end of files -->\nafter\n"
    )

    main(["--from", str(family), "--to", str(tmp_path)])

    assert told(tmp_path) == {
        "t2v": ("demo", "demo-4step", "int8-row", None),
        "i2v": ("demo", "demo-4step", "int8-row", None),
        "base": ("demo-base", "demo-base", "int8-row", None),
        "lora": ("demo", "demo-4step", "bf16", None),
        "high": ("demo", "demo-4step", "bf16", "high"),
        "low": ("demo", "demo-4step", "bf16", "low"),
        "vae": ("demo", None, "fp16", None),
        "text": ("demo", None, "fp16", None),  # most of this tiny one is its vocabulary
    }
    assert dtype_of_text(tmp_path) == "I8"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    sizes = {name: (tmp_path / name).stat().st_size for name in DEMO_FILES.values()}
    assert metrics["bytes"] == {**sizes, "all": sum(sizes.values()), "limit": 30_000_000}
    assert metrics["t2v student, 4 steps"] == SCORES["t2v student, 4 steps"]
    assert (metrics["world"], metrics["forms"]) == ("wide", [])
    table, scores = capsys.readouterr().out.split("| Sampler | ")
    assert re.search(
        r"words to video in 50 steps with CFG 3 \| 0\.\d+ M \| int8-row \| 0\.81 \|", table
    )
    assert (tmp_path / "README.md").read_text() == (
        f"before\n<!-- files: training.ship -->\n\n{table}\n<!-- end of files -->\nafter\n"
    )
    assert scores.splitlines() == [
        "colour | who is in front | first frame kept (PSNR) |",
        "|---|---|---|---|",
        "| **T2V shipped, 4 steps, no CFG** | **99** | **91** |  |",
        "Not judged yet: add `--judge 48` to the command.",
    ]
    assert {p.name for p in tmp_path.iterdir()} == {*sizes, "metrics.json", "README.md"}


def test_the_vae_keeps_its_bytes_and_forms_can_be_chosen(family: Path, tmp_path: Path) -> None:
    chosen = ["--scheme", "fp8", "--text-scheme", "fp16"]

    main(["--from", str(family), "--to", str(tmp_path), *chosen])

    main(["--from", str(family), "--to", str(tmp_path / "again"), *chosen])
    for name in DEMO_FILES.values():
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    vae = DEMO_FILES["vae"]
    assert (tmp_path / vae).read_bytes() == (family / vae).read_bytes()
    assert {told(tmp_path)[part][2] for part in ("t2v", "i2v", "base")} == {"fp8-row"}
    assert dtype_of_text(tmp_path) == "F16"


def test_nothing_is_changed_when_a_part_is_missing_or_all_are_too_large(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, out, other = tmp_path / "there", tmp_path / "out", tmp_path / "other"
    there.mkdir()
    other.mkdir()
    (other / "metrics.json").write_text('{"world": "plain"}')
    for path in family.iterdir():
        if "low_noise" not in path.name and path.name != "teacher_t2v.safetensors":
            (there / path.name).symlink_to(path)

    with pytest.raises(SystemExit, match=r"lacks teacher_t2v\.s.* or base_t2v.*, demo_low_noise"):
        main(["--from", str(there), "--to", str(out)])
    assert not out.exists()

    (there / "metrics.json").unlink()
    for name in ("teacher_t2v", "demo_low_noise_lora"):
        (there / f"{name}.safetensors").symlink_to(family / f"{name}.safetensors")
    with pytest.raises(SystemExit, match=r"lacks metrics\.json with the scores"):
        main(["--from", str(there), "--to", str(out)])
    with pytest.raises(
        SystemExit, match=r"lacks metrics\.json, .* of the plain world, not the wide"
    ):
        main(["--from", str(there), "--to", str(other), "--world", "wide"])
    with pytest.raises(SystemExit, match=r"of the wide world, not the plain; nothing was changed"):
        main(["--from", str(family), "--to", str(out), "--world", "plain"])
    assert not out.exists()

    monkeypatch.setattr(ship, "LIMIT_BYTES", 1_000_000)
    with pytest.raises(SystemExit, match=r"bytes are more than 1,000,000: demo_t2v\.safetensors "):
        main(["--from", str(family), "--to", str(out)])
    assert list(out.iterdir()) == []


def test_a_lora_of_another_model_is_not_shipped(family: Path, tmp_path: Path) -> None:
    other = ["--lora", str(family / "demo_vae.safetensors")]

    with pytest.raises(Exception, match="demo_t2v_distill_lora"):
        main(["--from", str(family), "--to", str(tmp_path), *other])

    assert list(tmp_path.iterdir()) == []


def test_forms_are_judged_beside_their_source_and_bases_are_filmed(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.table.QUICK_REAL_CLIPS", 12)
    asked = ["--judge", "2", "--smoke", "--videos"]
    monkeypatch.setattr(ship, "VIDEO_SIZE", ["--width", "32", "--height", "32", "--frames", "5"])

    main(["--from", str(family), "--to", str(tmp_path), *asked])

    metrics = (tmp_path / "metrics.json").read_text()
    main(["--from", str(family), "--to", str(tmp_path)])
    assert (tmp_path / "metrics.json").read_text() == metrics, "the same files need no judge again"
    lines = json.loads(metrics)["forms"]
    assert [line["sampler"] for line in lines] == [
        "t2v base, 50 steps, CFG 3",
        "t2v base, 4 steps",
        "t2v distilled, 4 steps",
        "t2v base + distill LoRA, 4 steps",
        "t2v base + two expert LoRAs, 4 steps",
        "i2v distilled, 4 steps",
    ]
    for line in lines:
        low, high = line["difference"][1:]
        assert (
            line["prompts"] == 2 and low <= line["shipped"] - line["source"] + 0.01 <= high + 0.02
        )
    assert read_image(tmp_path / "contact_sheet.png").shape[2] == 5 * 32
    for task in ("t2v", "i2v"):
        facts = read_metadata(tmp_path / f"base_{task}.mp4")
        assert facts["model"] == f"base_{task}.safetensors"
        assert str(facts["plan"]).startswith("50 steps, euler, CFG 3 (preset demo-base")
