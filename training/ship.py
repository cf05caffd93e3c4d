"""The family as it is shipped, from a folder of what training wrote.

    python -m training.ship --from DIR               files into lightx2v_core/demo
    python -m training.ship --from DIR --videos      and the stored videos of the bases
    python -m training.ship --from DIR --judge 48    and what the judge says of the 8-bit forms
    python -m training.ship --from DIR --table FILE  and the samplers of a table.json into the card

DIR holds teacher_t2v, demo_t2v, demo_i2v, demo_distill_lora, demo_high_noise_lora,
demo_low_noise_lora, demo_vae and demo_umt5. Transformers and text encoder go through the product's
own `quantize`; LoRAs and VAE keep their numbers. Every file is loaded by the product before the
old ones are replaced; all together may have LIMIT_BYTES. Sizes go to metrics.json beside them,
with the scores and the world that the stage `package` left in DIR, and as tables into the card.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lightx2v_core.assemble import load_text_encoder, load_transformer, load_vae
from lightx2v_core.checkpoint.convert import quantise_file, write_safetensors
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.cli import main as product
from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.media import contact_sheet, read_video
from lightx2v_core.presets import DEMO_FILES, DEMO_FOLDER, preset_for
from lightx2v_core.quant.quantise import WRITTEN
from lightx2v_core.text.tokenizer import SPIECE_MODEL

from .card import table_of_scores, tables_of_samplers, write_card
from .family import METRICS, read_metrics, world_of
from .files import FAMILIES, TEACHERS, TITLES
from .forms import judge_forms, table_of_forms
from .package import LIMIT_BYTES
from .samplers import DISTILL_LORA
from .worlds import WORLDS

BASE = "demo-base"  # the release of an undistilled model
PLAIN_FORM = "fp16"  # in place of a scheme: as it is
MAKEFILE = Path(__file__).parents[1] / "Makefile"
VIDEO_SIZE: list[str] = []  # arguments of the stored videos; none: that of the preset


@dataclass(frozen=True, slots=True)
class Part:
    """One file of the family: what training may call it, what its metadata and the card say."""

    names: tuple[str, ...]
    title: str
    about: str
    release: str = "demo"
    task: str | None = None
    expert: str | None = None
    packed: bool = False  # its linears become 8-bit codes

    def metadata(self) -> dict[str, str]:
        said = {
            "modelspec.title": self.title,
            "modelspec.license": "Apache-2.0",
            "lightx2v.release": self.release,
        }
        if self.task:
            said |= {"lightx2v.task": self.task, "lightx2v.family": FAMILIES[self.task]}
        return said | ({"lightx2v.expert": self.expert} if self.expert else {})


# By the keys of DEMO_FILES.
PARTS = {
    "t2v": Part(
        (DEMO_FILES["t2v"],),
        TITLES["demo_t2v"],
        "words to video in four steps; width 256, 5 blocks, ffn 512, 2 heads of 128",
        task="t2v",
        packed=True,
    ),
    "i2v": Part(
        (DEMO_FILES["i2v"],),
        TITLES["demo_i2v"],
        "picture and words to video in four steps; 36 input channels, no CLIP, as Wan 2.2 A14B",
        task="i2v",
        packed=True,
    ),
    "vae": Part(
        (DEMO_FILES["vae"],),
        TITLES["demo_vae"],
        "Wan 2.1 VAE, 16 wide; latent statistics folded to the official mean and std",
    ),
    "text": Part(
        (DEMO_FILES["text"],),
        TITLES["demo_umt5"],
        "UMT5, width 256, 2 layers, with its own SentencePiece model",
        packed=True,
    ),
    "base": Part(
        (TEACHERS["t2v"], "base_t2v.safetensors"),
        "LightX2V demo text-to-video base, 50 steps",
        "the teacher of the first: words to video in 50 steps with CFG 3",
        release=BASE,
        task="t2v",
        packed=True,
    ),
    "lora": Part(
        (DISTILL_LORA, DEMO_FILES["lora"]),
        "LightX2V demo text-to-video distillation LoRA, 4 steps",
        "on the base: words to video in four steps",
        task="t2v",
    ),
    **{
        side: Part(
            (DEMO_FILES[side],),
            f"LightX2V demo text-to-video {side}-noise expert, a LoRA on the base, 4 steps",
            f"on the base: the expert of two that walks the {steps} two of four steps",
            task="t2v",
            expert=side,
        )
        for side, steps in (("high", "first"), ("low", "last"))
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    sources = find_all(options.source, options.lora)
    metrics = read_scores(options)
    tables = {"scores": table_of_scores(metrics)}
    if options.table:
        tables |= tables_of_samplers(options.table)
    if options.videos:
        find_teacher(options.source, "i2v")
    options.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lightx2v-ship-", dir=options.to) as place:
        folder = Path(place)
        for key, source in sources.items():
            write_part(PARTS[key], source, folder / DEMO_FILES[key], options)
        check_files(folder)
        sizes = {name: (folder / name).stat().st_size for name in DEMO_FILES.values()}
        check_sizes(sizes)
        is_new = not all(is_same(folder / name, options.to / name) for name in sizes)
        for name in sizes:
            (folder / name).replace(options.to / name)
    write_metrics(options.to, metrics, sizes, [] if is_new else None)
    tables = {"files": table_of_files(options.to, sizes), **tables}
    for name, table in tables.items():
        write_card(options.to, name, table)
    if options.videos:
        make_videos(options.source, options.to)
    if options.judge:
        lines = judge_parts(options, sources, metrics["world"])
        write_metrics(options.to, metrics, sizes, lines)
    judged = read_metrics(options.to)["forms"]
    not_yet = "Not judged yet: add `--judge 48` to the command."
    write_card(options.to, "forms", table_of_forms(judged) if judged else not_yet)


def is_same(path: Path, other: Path) -> bool:
    return other.is_file() and path.read_bytes() == other.read_bytes()


def judge_parts(options: argparse.Namespace, sources: dict[str, Path], world: str) -> list[dict]:
    """What was shipped beside what it was made from, wherever that came from."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for key, source in sources.items():
            (folder / PARTS[key].names[0]).symlink_to(source.resolve())
        words = ["--world", world, *(["--smoke"] if options.smoke else [])]
        device = torch.device(options.device)
        return judge_forms(folder, options.to, options.judge, device, words)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.ship",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, forms = parser.add_argument, (*WRITTEN, PLAIN_FORM)
    add("--from", dest="source", type=Path, required=True, help="the folder of a trained family")
    add("--to", type=Path, default=DEMO_FOLDER, help="where it is shipped")
    add("--scheme", choices=forms, default="int8", help="of the transformers")
    add("--text-scheme", choices=forms, default="int8", help="of the text encoder")
    add("--lora", type=Path, help="another distillation LoRA than that in the folder")
    add("--world", choices=WORLDS, help="that it was trained on, where its metrics.json is silent")
    add("--table", type=Path, metavar="FILE", help="table.json of training.table, for the card")
    add("--videos", action="store_true", help="what the bases make of `make demo`'s prompts")
    add("--judge", type=int, metavar="PROMPTS", help="compare shipped forms and source by them")
    add("--device", default="cpu", help="of the judge's clips")
    add("--smoke", action="store_true", help="tiny sizes, as of training.run")
    return parser


def find_all(folder: Path, lora: Path | None = None) -> dict[str, Path]:
    """Every part, or the end with the names of all that are missing."""
    found, missing = {}, []
    for key, part in PARTS.items():
        paths = [lora] if lora and key == "lora" else [folder / name for name in part.names]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            missing.append(" or ".join(path.name for path in paths))
        else:
            found[key] = path
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}; nothing was changed")
    return found


def write_part(part: Part, source: Path, target: Path, options: argparse.Namespace) -> None:
    """Into `target` with the part's own metadata, in the scheme asked for."""
    scheme = PLAIN_FORM
    if part.packed:
        scheme = options.scheme if part.task else options.text_scheme
    relabelled = target if scheme == PLAIN_FORM else target.with_suffix(f".{PLAIN_FORM}")
    relabel(source, relabelled, part)
    if scheme != PLAIN_FORM:
        plain = relabelled.replace(target.with_name(f"plain_{target.name}"))
        quantise_file(plain, target, scheme)
        plain.unlink()
    target.chmod(0o644)


def relabel(source: Path, target: Path, part: Part) -> None:
    """A copy that says what the part is; the same bytes where it says so already, and each time."""
    checkpoint = open_checkpoint(source)
    said, wanted = checkpoint.metadata, part.metadata()
    if wanted.items() <= said.items():
        shutil.copyfile(source, target)
        return
    kept = {k: v for k, v in said.items() if k == "lightx2v.base"}
    tensors = (checkpoint.tensors({name: name})[name] for name in checkpoint.headers)
    metadata = {"format": "pt", **kept, **wanted}
    write_safetensors(target, dict(checkpoint.headers), tensors, metadata)


@torch.no_grad()
def check_files(folder: Path) -> None:
    """Each file through the product's loaders, and the presets that follow from them."""
    paths = {key: folder / name for key, name in DEMO_FILES.items()}
    load_vae(paths["vae"])
    load_text_encoder(paths["text"]).encode(["a red circle"])
    for key in ("t2v", "i2v"):
        _expect(paths[key], "demo-4step", preset_for(load_transformer(paths[key]).info).name)
    base = load_transformer(paths["base"])
    _expect(paths["base"], "demo-base", preset_for(base.info).name)
    for key in ("lora", "high", "low"):
        (report,) = apply_loras(base.model, [(read_lora(paths[key]), 1.0)])
        if report.failed:
            raise SystemExit(f"{report.describe()}: not all of it finds a place in the base")
        info = detect(open_checkpoint(paths[key]))
        _expect(paths[key], "demo-4step", preset_for(base.info, [info]).name)
        _expect(paths[key], PARTS[key].expert, info.expert)


def _expect(path: Path, wanted: str | None, found: str | None) -> None:
    if found != wanted:
        raise SystemExit(f"{path.name} is taken for {found} and not for {wanted}")


def check_sizes(sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        each = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise SystemExit(f"{total:,} bytes are more than {LIMIT_BYTES:,}: {each}")


def write_metrics(
    to: Path, metrics: dict, sizes: dict[str, int], forms: list[dict] | None = None
) -> None:
    """Scores, sizes, and the lines of the judge: new ones, none for files that he has not seen,
    or None where they are those of the last time."""
    total = {"all": sum(sizes.values()), "limit": LIMIT_BYTES}
    said = {**metrics, "bytes": {**sizes, **total}}
    said["forms"] = read_metrics(to).get("forms", []) if forms is None else forms
    (to / METRICS).write_text(json.dumps(said, indent=1) + "\n", "utf-8")


def read_scores(options: argparse.Namespace) -> dict:
    """Of the trained folder, or those of the last time; with the world that both are of."""
    theirs, ours = read_metrics(options.source), read_metrics(options.to)
    metrics = theirs or ours
    if not metrics:
        raise SystemExit(
            f"{options.source} lacks {METRICS} with the scores that the stage `package` gives; "
            "nothing was changed"
        )
    world = world_of(options.source if theirs else options.to, options.world).name
    if (told := metrics.get("world", world)) != world:
        whose = options.source if theirs else f"{options.source} lacks {METRICS}, and {options.to}"
        raise SystemExit(f"{whose} is of the {told} world, not the {world}; nothing was changed")
    return {**metrics, "world": world}


def table_of_files(folder: Path, sizes: dict[str, int]) -> str:
    lines = ["| File | What | Parameters | Format | MB |", "|---|---|---|---|---|"]
    for key, name in DEMO_FILES.items():
        checkpoint = open_checkpoint(folder / name)
        count = sum(math.prod(h.shape) for n, h in checkpoint.headers.items() if is_weight(n))
        row = (f"`{name}`", PARTS[key].about, f"{count / 1e6:.2f} M", detect(checkpoint).scheme)
        lines.append(f"| {' | '.join(row)} | {sizes[name] / 1e6:.2f} |")
    return "\n".join([*lines, f"| all | | | | {sum(sizes.values()) / 1e6:.2f} |"])


def is_weight(name: str) -> bool:
    return name != SPIECE_MODEL and not name.endswith(("weight_scale", "scale_weight"))


def make_videos(source: Path, target: Path) -> None:
    """What the undistilled models make of `make demo`'s prompts and noise by their preset, as
    base_t2v.mp4 and base_i2v.mp4, and what the shipped ones make of them as contact_sheet.png."""
    text = MAKEFILE.read_text("utf-8")
    variables = dict(re.findall(r"^(\w+_PROMPT) = (.+)$", text, re.MULTILINE))
    prompts = {"t2v": variables["DEMO_PROMPT"], "i2v": variables["START_PROMPT"]}
    teachers = {task: find_teacher(source.resolve(), task) for task in prompts}
    target, rows = target.resolve(), []
    with tempfile.TemporaryDirectory() as place, chdir(place), one_thread():
        for key in ("vae", "text"):
            shutil.copyfile(target / DEMO_FILES[key], DEMO_FILES[key])
        for task, prompt in prompts.items():
            base, made = Path(f"base_{task}.safetensors"), Path(f"{task}.mp4")
            relabel(teachers[task], base, Part((), f"LightX2V demo {task} base", "", BASE, task))
            film(task, prompt, base, target / f"base_{task}.mp4")
            film(task, prompt, target / DEMO_FILES[task], made)
            rows.append((prompt, read_video(made)))
    contact_sheet(rows, target / "contact_sheet.png")


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that share a small product wait for each other, beside other programs for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def find_teacher(folder: Path, task: str) -> Path:
    names = (TEACHERS[task], f"base_{task}.safetensors")
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise SystemExit(f"{folder} lacks {names[0]}, whose video is asked for")
    return found


def film(task: str, prompt: str, model: Path, video: Path) -> None:
    """Through the product's command line."""
    words = ["generate", "--task", task, "--model", str(model), "--prompt", prompt, "--seed", "1"]
    start = ["--image", str(DEMO_FOLDER / "start.png")] if task == "i2v" else []
    if product([*words, *start, "--output", str(video), *VIDEO_SIZE]):
        raise SystemExit(f"no video of {model}")


if __name__ == "__main__":
    main()
