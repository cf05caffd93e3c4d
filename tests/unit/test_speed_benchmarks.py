"""Benchmarks of speed, tiny on a CPU: what their lines hold, how peers and regressions are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import cold_start, end_to_end, forward, peers, plot, regress, scale
from benchmarks.lines import read_lines, relative_error
from benchmarks.memory import TINY
from benchmarks.random_models import as_checkpoint, quantised, random_inputs, random_weights
from lightx2v_core.assemble import load_transformer
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.errors import RequestError

CPU = torch.device("cpu")
TRY = ("--tiny", "--device", "cpu")
ONE_BLOCK = replace(TINY, num_layers=1)
SIZE = "64x32x5"
FACTS = {"seconds", "relative_error", "peak_gib", "attention", "scheme", "size", "tokens", "blocks"}
FACTS |= {"card", "torch", "commit", "setting", "who", "version"}


def lines(path: Path) -> list[dict]:
    return list(read_lines(path))


def slowed(name: str, tier: str, seconds: float, stock: bool = True) -> peers.Contender:
    """A peer that is our own model and says how long it takes."""

    def load(_config, weights):
        model = load_transformer(as_checkpoint(weights), torch.float32).model

        def run(*inputs):
            spent.append(seconds)
            return model(*inputs)

        return run

    return peers.Contender("other", name, "1.0", tier, "sdpa", "bf16", load, stock)


def broken(_config, _weights):
    raise ValueError("no such layer")


spent: list[float] = []


@pytest.fixture
def timed_by_what_is_said(monkeypatch):
    """A contender takes as long as it says; ours takes one second."""

    def seconds(work, _device, _repeats, _warm_ups):
        spent.clear()
        work()
        return spent[0] if spent else 1.0

    monkeypatch.setattr(forward, "median_seconds", seconds)


def test_ours_stands_beside_the_fastest_peer_of_its_tier(
    tmp_path, monkeypatch, timed_by_what_is_said
):
    field = [
        slowed("slow", "16bit", 4.0),
        slowed("hooked", "16bit", 2.0, stock=False),
        slowed("eight", "8bit", 1.25),
        replace(slowed("broken", "16bit", 0.1), load=broken),
    ]
    monkeypatch.setattr(forward, "contenders", lambda _peer: field)
    monkeypatch.setattr(forward, "TINY", ONE_BLOCK)
    out = tmp_path / "lines.jsonl"

    sizes = ["--size", SIZE, "--error-size", SIZE]
    code = forward.main([*TRY, *sizes, "--peer", "x", "--out", str(out), "--profile"])

    found = {(line["case"], line["setting"]): line for line in lines(out)}
    assert code == 0
    ours = {case: line for (case, _), line in found.items() if line["who"] == "ours"}
    assert set(ours) == {
        f"{case}_{SIZE}"
        for case in (
            *("forward_16bit", "forward_8bit", "forward_8bit_vs_8bit"),
            *("profile_16bit", "profile_8bit"),
        )
    }
    half = ours[f"forward_16bit_{SIZE}"]
    assert set(half) >= FACTS
    assert (half["peer"], half["ratio"], half["peer_version"]) == ("other hooked", 0.5, "1.0")
    assert (half["stock_peer"], half["stock_ratio"]) == ("other slow", 0.25)
    assert ours[f"forward_8bit_{SIZE}"]["ratio"] == 0.5
    assert ours[f"forward_8bit_vs_8bit_{SIZE}"]["ratio"] == 0.8
    assert half["relative_error"] < ours[f"forward_8bit_{SIZE}"]["relative_error"] < 0.05
    assert sum(ours[f"profile_8bit_{SIZE}"]["milliseconds"].values()) > 0
    failed = found[f"forward_peer_{SIZE}", "broken"]
    assert failed["blocked_by"] == "ValueError: no such layer" and "seconds" not in failed
    exact = found[f"forward_peer_{SIZE}", "slow"]
    assert exact["relative_error"] < 1e-5, "the peer computes in float32, as the reference does"


def test_the_diffusers_peer_computes_what_we_compute():
    weights, inputs = (
        random_weights(ONE_BLOCK, CPU),
        random_inputs(ONE_BLOCK, VideoSize(64, 32, 5), CPU),
    )
    ours = load_transformer(as_checkpoint(weights), torch.float32).model

    theirs = next(c for c in peers.contenders("diffusers") if c.setting == "bf16-sdpa")

    with torch.inference_mode():
        error = relative_error(theirs.load(ONE_BLOCK, weights)(*inputs), ours(*inputs))
    assert 1e-4 < error < 0.02


def test_peers_that_cannot_run_are_refused_in_words(tmp_path):
    with pytest.raises(RequestError, match="holds no ComfyUI"):
        peers.contenders(f"comfyui={tmp_path}")
    with pytest.raises(RequestError, match="peer 'sora' is unknown"):
        peers.contenders("sora")


def test_random_weights_are_the_same_each_time_and_differ_between_blocks():
    one, two = (random_weights(TINY, CPU) for _ in range(2))

    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["blocks.0.ffn.0.weight"], one["blocks.1.ffn.0.weight"])
    codes = quantised(two, "fp8")
    assert not two and codes["blocks.0.ffn.0.weight"].dtype == torch.float8_e4m3fn
    assert codes["blocks.0.ffn.0.weight_scale"].shape == (TINY.ffn_dim, 1)


def planted(tmp_path: Path, name: str, **changes: object) -> Path:
    line = {"case": "forward_8bit", "card": "H200", "seconds": 2.0, "ratio": 0.7, "peak_gib": 20.0}
    path = tmp_path / f"{name}.jsonl"
    earlier = json.dumps(line | changes | {"ratio": 9.0, "seconds": 9.0})
    path.write_text(earlier + "\n\n" + json.dumps(line | changes) + "\n")
    return path


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 0, "ratio 1.000 times, peak_gib 1.000 times"),
        ({"ratio": 0.77}, 1, "ratio 1.100 times, peak_gib 1.000 times WORSE"),
        ({"ratio": 0.72, "seconds": 5.0}, 0, "ratio 1.029"),
        ({"peak_gib": 25.0}, 1, "peak_gib 1.250 times WORSE"),
        ({"card": "H100"}, 0, "new, nothing to compare with"),
        ({"peer": "a slower one", "ratio": 0.4}, 0, "seconds 1.000"),
    ],
)
def test_a_planted_regression_is_found_and_nothing_else(tmp_path, capsys, changes, code, words):
    old, new = planted(tmp_path, "old"), planted(tmp_path, "new", **changes)

    assert regress.main([str(old), str(new)]) == code
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "apart"),
    [
        ("attention_8bit", {"row": ["gluon", "triton"]}),
        ("glue-gelu", {"form": ["bf16", "fp8"]}),
        ("memory", {"budget_gb": [8.0, 12.0]}),
        ("host_end_to_end", {"flags": [[], ["--lowvram"]]}),
    ],
)
def test_a_regression_of_one_row_is_not_hidden_by_the_next(tmp_path, capsys, case, apart):
    (name, (slow, well)) = next(iter(apart.items()))
    line = {"case": case, "card": "H200", "ratio": 0.7}
    for file, ratio in (("old", 0.7), ("new", 0.9)):
        rows = [line | {name: slow, "ratio": ratio}, line | {name: well}]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert regress.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "2 cases, 1 worse" in capsys.readouterr().out


def test_a_picture_of_bars_and_one_of_curves_are_drawn(tmp_path):
    path = tmp_path / "lines.jsonl"
    rows = [{"case": "a", "seconds": 2.0, "who": "x", "card": "c", "tokens": 100, "floor": 1.0}]
    rows += [{"case": "a", "seconds": 5.0, "ratio": 2.5, "peer": "x", "tokens": 900, "floor": 3.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"blocked_by": "no"}]))

    for name, more in (("bars", []), ("curves", ["--over", "tokens", "--floor", "floor"])):
        assert plot.main([str(path), str(tmp_path / f"{name}.png"), *more]) == 0

    colors = {}
    for name in ("bars", "curves"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            colors[name] = {color for _, color in picture.getcolors(9999)}
    assert {(0x20, 0x60, 0xC0), (0xB8, 0xB8, 0xB8)} <= colors["bars"]
    assert (0x20, 0x60, 0xC0) in colors["curves"]


def test_a_cold_start_tells_its_stages_beside_the_raw_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.memory.TINY", ONE_BLOCK)

    def in_this_process(path, options, plain):
        arguments = ["--child", str(path), "--device", "cpu", "--size", SIZE]
        return cold_start.load_and_step(cold_start.make_parser().parse_args(arguments))

    monkeypatch.setattr(cold_start, "run_child", in_this_process)
    out = tmp_path / "cold.jsonl"

    cold_start.main(["--tiny", "--device", "cpu", "--folder", str(tmp_path), "--out", str(out)])

    (line,) = lines(out)
    assert line["case"] == "cold_start" and line["file_bytes"] > 10**5
    assert line["ratio"] == line["seconds"] / line["floor_seconds"]
    stages = [line[name] for name in ("imported", "loaded", "weights_there", "first_step")]
    assert stages == sorted(stages)
    assert [path.name for path in tmp_path.iterdir()] == ["cold.jsonl"], "the file is removed"


def test_videos_are_timed_stage_by_stage(tmp_path):
    out = tmp_path / "lines.jsonl"

    end_to_end.main(
        ["--tiny", "--device", "cpu", "--size", "32x32x5", "--videos", "3", "--out", str(out)]
    )

    (line,) = lines(out)
    assert set(line["stages"]) == {"text", "image", "sampling", "decode"}
    assert line["steps"] == 4 and len(line["videos"]) == line["warm_from"] == 3
    assert line["seconds"] == pytest.approx(line["videos"][2]["seconds"], abs=1e-3)
    assert line["seconds"] == pytest.approx(sum(line["stages"].values()), rel=0.2, abs=0.05)
    without = [line[name] for name in ("seconds_without_text", "seconds_without_text_and_clip")]
    assert without[0] == pytest.approx(line["seconds"] - line["stages"]["text"], abs=1e-3)
    assert without[1] == pytest.approx(without[0] - line["clip_seconds"], abs=1e-3)


def test_whole_videos_stand_beside_each_setting_of_a_peer_apart(tmp_path, monkeypatch):
    out = tmp_path / "lines.jsonl"
    offered = [slowed(name, "8bit", 0.0, stock=name != "b") for name in ("a", "b", "c")]
    timed = {"a": {"seconds": 2.0}, "b": {"seconds": 1.0}, "c": {"blocked_by": "no such card"}}
    monkeypatch.setattr(end_to_end, "contenders", lambda _name: offered)
    ours = {"case": "end_to_end", "seconds": 6.0, "seconds_without_text_and_clip": 5.0}
    monkeypatch.setattr(end_to_end, "measure", lambda _options: ours)
    monkeypatch.setattr(end_to_end, "time_vae", lambda *_: (0.5, 1.5))
    monkeypatch.setattr(end_to_end, "time_one", lambda _course, peer: timed[peer.setting])
    arguments = ["--tiny", "--device", "cpu", "--size", "32x32x5"]

    end_to_end.main([*arguments, "--peer", "x", "--setting", "c", "b", "a", "d", "--out", str(out)])

    alone, absent, blocked, fast, slow = lines(out)
    assert alone == ours and "ratio" not in blocked
    assert absent["peer_setting"] == "d" and "no such setting" in absent["peer_blocked_by"]
    assert [line["peer_setting"] for line in (blocked, fast, slow)] == ["c", "b", "a"]
    assert [line["peer_seconds"] for line in (fast, slow)] == [6.0, 10.0]
    assert [line["peer_stock"] for line in (fast, slow)] == [False, True]
    assert slow["ratio"] == pytest.approx(ours["seconds"] / 10)
    assert slow["ratio_same_parts"] == pytest.approx(ours["seconds_without_text_and_clip"] / 10)
    assert slow["ratios"] == {"b": fast["ratio"], "a": slow["ratio"]}
    assert len(regress.latest([ours, fast, slow])) == 3, "each is compared with its own kind"


def test_growth_is_told_against_the_operations_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "FRAMES", (5, 9))
    monkeypatch.setattr(scale, "TINY", ONE_BLOCK)
    out, picture = tmp_path / "scale.jsonl", tmp_path / "scale.png"

    chosen = ["--repeats", "1", "--series", "frames", "batch"]
    scale.main([*TRY, *chosen, "--out", str(out), "--plot", str(picture)])

    found = lines(out)
    assert [(line["series"], line["size"][2], line["batch"]) for line in found] == [
        ("frames", 5, 1),
        ("frames", 9, 1),
        *(("batch", scale.SHORT, count) for count in scale.BATCHES),
    ]
    by_batch = [line["petaflop"] for line in found[2:]]
    assert by_batch == pytest.approx([by_batch[0] * count for count in scale.BATCHES])
    assert all(line["ratio"] > 0 for line in found)
    with Image.open(picture) as drawn:
        assert drawn.size == (plot.WIDTH, plot.HEIGHT)
