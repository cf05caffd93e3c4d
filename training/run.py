"""Run stages, each for its minutes: `python -m training.run --out DIR vae:4.5 bank:0.7 t2v:7`.
No stage at all draws the curves of the journal in DIR.

Stages: text, vae, bank, bank-images, t2v, i2v, t2v-student, i2v-student, t2v-dmd, i2v-dmd,
t2v-lora, distill-lora, experts, package. The bank lives in this process only, so it stands before
the stages that train transformers. Files of earlier runs are read from --from.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .autoencoder import train_vae
from .bank import fill_bank
from .context import Context
from .distill import train_dmd
from .dmd import ROLLOUTS
from .family import world_of
from .lora_student import train_lora
from .package import package
from .progress import Journal, release_memory
from .ranks import join, leave
from .reader import train_text
from .refine import train_distill_lora, train_experts
from .sizes import DEMO, SMOKE
from .student import train_student
from .teacher import train_i2v, train_t2v
from .worlds import WORLDS

Stage = Callable[[Context, float], None]
STAGES: dict[str, Stage] = {
    "text": train_text,
    "vae": train_vae,
    "bank": lambda context, minutes: fill_bank(context, minutes, with_images=False),
    "bank-images": lambda context, minutes: fill_bank(context, minutes, with_images=True),
    "t2v": train_t2v,
    "i2v": train_i2v,
    "t2v-student": lambda context, minutes: train_student(context, "t2v", minutes),
    "i2v-student": lambda context, minutes: train_student(context, "i2v", minutes),
    "t2v-dmd": lambda context, minutes: train_dmd(context, "t2v", minutes),
    "i2v-dmd": lambda context, minutes: train_dmd(context, "i2v", minutes),
    "t2v-lora": train_lora,
    "distill-lora": train_distill_lora,
    "experts": train_experts,
    "package": package,
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    plan = [read_stage(word) for word in options.stages]
    rank = join()
    if rank > 0:  # its weights are the first one's; its reports are its own
        options.out = options.out / f"rank{rank}"
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_kernels(device)
    context = Context(
        sizes=SMOKE if options.smoke else DEMO,
        out=options.out,
        source=options.source,
        device=device,
        seed=options.seed,
        journal=Journal(options.out),
        rank=rank,
        world=world_of(named=options.world),
        cfg=options.cfg,
        rollout=options.rollout,
        lr=options.lr,
        compiles={"auto": None, "on": True, "off": False}[options.compile],
    )
    for name, minutes in plan:
        STAGES[name](context, minutes)
        release_memory(device)
        report_memory(context, name)
    context.journal.draw(options.out / "curves.png")
    leave()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.run", description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"STAGE:MINUTES, of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and reports")
    parser.add_argument("--from", dest="source", type=Path, help="folder with earlier files")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--world", choices=WORLDS, help="else that of the shipped family")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to try every stage")
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance of the teacher's paths")
    parser.add_argument("--rollout", choices=ROLLOUTS, default="euler", help="of the dmd stages")
    parser.add_argument("--lr", type=float, help="of the VAE, instead of its recipe's")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    return parser


def read_stage(word: str) -> tuple[str, float]:
    name, _, minutes = word.partition(":")
    if name not in STAGES or not minutes:
        raise SystemExit(f"{word!r} is not STAGE:MINUTES; stages are {', '.join(STAGES)}")
    return name, float(minutes)


def set_kernels(device: torch.device) -> None:
    """Fast float32 products, tuned convolutions, attention that takes a broadcast mask."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.enable_cudnn_sdp(False)
    from torch._dynamo import config

    config.suppress_errors = True  # what cannot be compiled runs as plain code
    config.recompile_limit = 64


def report_memory(context: Context, name: str) -> None:
    if context.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        context.journal.note("memory", after=name, peak_gb=round(peak, 1))
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
