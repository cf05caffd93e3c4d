"""The demo transformer in every number format: detected, loaded, with a LoRA, and judged.

    python -m benchmarks.formats --out benchmarks/results/formats.jsonl --ggml libggml-base.so

For each format a file is made from the demo in float16 (`--source`, or the shipped file with its
codes multiplied out) and compared with it: the velocity at one noise level, the effect of a LoRA
of random pairs on every linear of the blocks, and the judge's score of four-step clips, paired
(same prompts, same noise; `--prompts 0` does not ask it). Appends one JSON line for each format and
writes the table of all lines in OUT beside it (`.md`), the last line of each format. `--ggml` is
the shared library of ggml (in any build of llama.cpp or whisper.cpp), whose quantiser writes K and
IQ types. CPU, float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from lightx2v_core.assemble import load_text_encoder, load_transformer, load_vae
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.errors import LightX2VError
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import LoraFile, read_lora
from lightx2v_core.presets import DEMO_FILES, DEMO_FOLDER, make_plan, preset_for
from lightx2v_core.quant.linear import DequantisedLinear
from lightx2v_core.sampling.loop import make_noise, sample
from lightx2v_core.wan.model import WanModel
from training.captions import plain_prompt, stories
from training.family import add_world, world_of
from training.files import plain_file
from training.intervals import Interval, paired_interval
from training.judge import judge
from training.measures import clip_scores
from training.questions import unseen_scenes
from training.worlds import World

from .format_files import SOURCE, Form, forms
from .lines import commit

SIGMA = 0.9375  # of the forward that is compared
PROBE_SEED, LORA_SEED = 11, 12
RANK, LORA_EFFECT = 8, 0.05
DRAWN = 24  # scenes drawn together, so that fewer prompts are the first of them
LORA_FITS = 3  # times the scale is corrected: the effect is nearly linear in it
Line = dict[str, object]


@dataclass(eq=False)
class Exam:
    """Prompts, the noise of each, and what turns a model into scores, which are remembered by the
    weights: formats without loss would give the same clips again."""

    folder: Path
    prompts: int
    source: Path  # in 16 bits
    world: World
    probe_BCTHW: Tensor = field(init=False)
    known: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        info = detect(open_checkpoint(self.source))
        preset = preset_for(info)
        self.plan, self.shape = make_plan(preset), preset.size.latent_shape()
        self.scenes = unseen_scenes(max(self.prompts, DRAWN), self.world, self.world.exam_split)
        self.vae = load_vae(self.folder / DEMO_FILES["vae"])
        encoder = load_text_encoder(self.folder / DEMO_FILES["text"], dtype=torch.float32)
        texts = [plain_prompt(story) for story in stories(self.scenes[: max(self.prompts, 1)])]
        with torch.inference_mode():
            self.text_BSE = encoder.encode(texts)
        self.probe_BCTHW = make_noise(self.shape, Generator().manual_seed(PROBE_SEED))

    @torch.inference_mode()
    def velocity(self, model: WanModel) -> Tensor:
        """Of the first prompt, on noise alone, at SIGMA."""
        timestep = torch.tensor([1000.0 * SIGMA])
        return model(self.probe_BCTHW, timestep, self.text_BSE[:1], None)

    def scores(self, model: WanModel, weights: str) -> Tensor:
        """Share of what was asked that each clip shows, 0 to 1; B. Equal `weights`, equal clips."""
        if weights not in self.known:
            each = [self._score(model, index) for index in range(self.prompts)]
            self.known[weights] = torch.tensor(each)
        return self.known[weights]

    def _score(self, model: WanModel, index: int) -> float:
        text = self.text_BSE[index : index + 1]

        def denoise(x: Tensor, sigma: float, _step: int) -> Tensor:
            return model(x, torch.tensor([1000.0 * sigma]), text, None)

        rng = Generator().manual_seed(index)
        latent = sample(denoise, make_noise(self.shape, rng), self.plan, rng)
        with torch.inference_mode():
            clip = self.vae.decode(latent)
        verdict = judge(clip, self.scenes[index : index + 1], self.world)
        return float(clip_scores(verdict)["all"])


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What every format is compared with."""

    lora: LoraFile
    velocity: Tensor
    effect: Tensor  # of the LoRA on the velocity
    scores_B: Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = forms(options.ggml)
    if unknown := set(options.schemes or ()) - set(rows):
        raise SystemExit(f"no format is called {', '.join(unknown)}; there are {', '.join(rows)}")
    chosen = options.schemes or list(rows)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about: Line = {"prompts": options.prompts, "torch": torch.__version__, "commit": commit()}
    with tempfile.TemporaryDirectory(prefix="lightx2v-") as folder:
        shipped = options.source or options.folder / DEMO_FILES["t2v"]
        plain = plain_file(shipped, Path(folder))
        world = world_of(options.folder, options.world)
        exam = Exam(options.folder, options.prompts, plain, world)
        reference = refer(exam, Path(folder))
        for number, name in enumerate(chosen, start=1):
            started = time.perf_counter()
            place = Path(folder) / str(number)
            place.mkdir()
            line = {"format": name, **measure(exam, reference, rows[name], place), **about}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            seconds = time.perf_counter() - started
            print(f"{number}/{len(chosen)} {seconds:.0f} s {json.dumps(line)}", flush=True)
    table = markdown(options.out.read_text(encoding="utf-8"), list(rows))
    options.out.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=DEMO_FOLDER, help="the demo family")
    parser.add_argument("--source", type=Path, metavar="FILE", help="in place of its demo_t2v")
    add_world(parser)
    parser.add_argument("--schemes", nargs="+", metavar="FORMAT", help="these rows alone")
    parser.add_argument("--ggml", type=Path, metavar="libggml-base.so", help="for K and IQ types")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def refer(exam: Exam, folder: Path) -> Reference:
    """The source's figures, and a LoRA that changes its velocity by LORA_EFFECT."""
    model = load_transformer(exam.source).model
    velocity = exam.velocity(model)
    scale = 1.0
    for _ in range(LORA_FITS + 1):
        lora = read_lora(write_lora(model, folder / "random_rank8.safetensors", scale))
        apply_loras(model, [(lora, 1.0)])
        effect = exam.velocity(model) - velocity
        scale *= LORA_EFFECT / _ratio(effect, velocity)
    apply_loras(model, [])
    return Reference(lora, velocity, effect, exam.scores(model, digest(model)))


def write_lora(model: WanModel, path: Path, scale: float) -> Path:
    """Random pairs of RANK for every linear of the blocks, in the names that ComfyUI writes."""
    rng, tensors = Generator().manual_seed(LORA_SEED), {}
    for name, module in model.named_modules():
        if not (name.startswith("blocks.") and isinstance(module, torch.nn.Linear)):
            continue
        down = torch.randn(RANK, module.in_features, generator=rng) * module.in_features**-0.5
        up = torch.randn(module.out_features, RANK, generator=rng) * RANK**-0.5
        tensors[f"diffusion_model.{name}.lora_down.weight"] = down
        tensors[f"diffusion_model.{name}.lora_up.weight"] = scale * up
    save_file(tensors, path)
    return path


def measure(exam: Exam, reference: Reference, form: Form, folder: Path) -> Line:
    """One row; `blocked_by` says why a file was not made or not loaded."""
    line: Line = {"writer": form.writer}
    try:
        path = form.make(exam.source, folder)
        line["scheme"] = detect(open_checkpoint(path)).scheme
        line["detected"] = line["scheme"] == form.scheme
        line["file_bytes"] = _bytes(path)
        loaded = load_transformer(path)
        line["memory_bytes"] = loaded.residency.total_bytes
        return line | _compare(exam, reference, loaded.model)
    except LightX2VError as error:
        return line | {"blocked_by": str(error)}


def _compare(exam: Exam, reference: Reference, model: WanModel) -> Line:
    blocks = [m for name, m in model.named_modules() if name.startswith("blocks.")]
    codes = sum(isinstance(module, DequantisedLinear) for module in blocks)
    plain = sum(isinstance(module, torch.nn.Linear) for module in blocks)
    velocity = exam.velocity(model)
    report = apply_loras(model, [(reference.lora, 1.0)])[0]
    effect = exam.velocity(model) - velocity
    apply_loras(model, [])
    removed = torch.equal(exam.velocity(model), velocity)
    unpacked = _unpacked(exam, model)
    bare = exam.velocity(unpacked)
    weights = digest(unpacked if torch.equal(bare, velocity) else model)
    apply_loras(unpacked, [(reference.lora, 1.0)])
    expected = exam.velocity(unpacked) - bare
    scores_B = exam.scores(model, weights)
    return {
        "packed_linears": codes,
        "linears": codes + plain,
        "forward_error": _ratio(velocity - reference.velocity, reference.velocity),
        "lora_matched": report.matched,
        "lora_size": _ratio(effect, reference.effect),
        "lora_error": _ratio(effect - reference.effect, reference.effect),
        "lora_error_unpacked": _ratio(effect - expected, expected),
        "lora_removed": removed,
        **_judged(scores_B, reference.scores_B),
    }


def _judged(scores_B: Tensor, source_B: Tensor) -> Line:
    if not len(scores_B):
        return {}
    paired = paired_interval(scores_B[:, None], source_B[:, None]).scaled(100)
    return {
        "scores": [round(100 * score, 2) for score in scores_B.tolist()],
        "score": 100 * float(scores_B.mean()),
        "difference": [paired.value, paired.low, paired.high],
    }


def digest(model: WanModel) -> str:
    """Equal for models whose tensors have equal values, whatever their dtype."""
    made = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        made.update(name.encode())
        made.update(tensor.float().numpy().tobytes())
    return made.hexdigest()


def _unpacked(exam: Exam, model: WanModel) -> WanModel:
    """A plain float32 model of the weights that the codes in `model` stand for."""
    plain = load_transformer(exam.source).model
    packed = {n: m for n, m in model.named_modules() if isinstance(m, DequantisedLinear)}
    weights = {f"{name}.weight": m.dequantise(torch.float32) for name, m in packed.items()}
    inside = {f"{name}.{leaf}" for name in packed for leaf in ("weight", "weight_scale")}
    rest = {name: t for name, t in model.state_dict().items() if name not in inside}
    wanted = plain.state_dict()
    plain.load_state_dict({k: v for k, v in (rest | weights).items() if k in wanted}, assign=True)
    return plain


def markdown(lines: str, order: list[str]) -> str:
    """The table of the last line of each format, in `order`."""
    last = {line["format"]: line for line in map(json.loads, lines.splitlines())}
    head = (
        *("Format", "Written by", "Detected", "Linears kept packed", "File", "In memory"),
        *(
            "Forward error",
            "LoRA's effect: size, error, against unpacked",
            "Score",
            "Paired difference",
        ),
    )
    rows = [head, ("---",) * len(head)]
    rows += [_row(last[name]) for name in order if name in last]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(line: Line) -> tuple[str, ...]:
    detected = {True: "yes", False: f"as {line.get('scheme')}", None: "not made"}
    start = (str(line["format"]), str(line["writer"]), detected[line.get("detected")])
    if reason := line.get("blocked_by"):
        return (*start, f"no: {reason}", *("not run",) * 6)
    number = partial(_number, line)
    removed = "" if line["lora_removed"] else ", not removed"
    score, difference = "not asked", "not asked"
    if "score" in line:
        score = f"{number('score'):.1f}"
        difference = Interval(*line["difference"]).told("+")
    return (
        *start,
        f"{line['packed_linears']} of {line['linears']}",
        f"{number('file_bytes') / 1e6:.1f} MB",
        f"{number('memory_bytes') / 1e6:.1f} MB",
        f"{number('forward_error'):.2%}",
        f"{number('lora_size'):.3f}, {number('lora_error'):.1%}, "
        f"{number('lora_error_unpacked'):.0e}{removed}",
        score,
        difference if line["format"] != SOURCE else "0 (source)",
    )


def _number(line: Line, key: str) -> float:
    return float(str(line[key]))


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part.norm() / whole.norm())


def _bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    raise SystemExit(main())
