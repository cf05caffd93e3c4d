"""Distribution matching on a published model: one frozen base, two LoRA sets, one card.

The base is read once. With the student's set on it is the student, with the fake score's set on it
is that, with none it is the teacher; blocks are computed again in the backward pass. So a 14B model
needs its 28 GB once, not three times. Text to video.

    python -m training.large --model FILE --states prompts.safetensors --updates 3000 --out DIR
    python -m training.large --random 14B --updates 1 --critic-per-student 1 --out DIR

The second takes random weights and states of the real shapes, to measure memory and seconds.
`--states` holds rows `states` N x 512 x 4096 of the text encoder and `empty` 1 x 512 x 4096.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.assemble import load_transformer
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.wan.config import CLIP_TOKENS, WanConfig
from lightx2v_core.wan.model import WanModel

from .adapters import Adapters, detach
from .conditions import Conditions, add_size, random_conditions, read_conditions
from .denoising import Denoiser
from .dmd import ROLLOUTS, STEPS, Question, Scores, critic_loss, roll_out, student_loss
from .progress import Journal
from .text import TextStates

SIZES = {
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_layers=40),
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_layers=30),
    "tiny": WanConfig(dim=128, ffn_dim=256, num_layers=2, text_dim=64),
}
TASKS = ("t2v", "i2v")
BETAS, WEIGHT_DECAY, CLIP = (0.0, 0.999), 1e-3, 10.0
SAVE_EVERY = 100  # updates of the student
LORA, TITLE = "student_lora.safetensors", "4-step distill LoRA"


@dataclass(slots=True, eq=False)
class Player:
    """One LoRA set, its optimiser, and how its turn went."""

    adapters: Adapters
    optimizer: torch.optim.Optimizer

    @classmethod
    def new(cls, model: WanModel, rank: int, lr: float, seed: int) -> Player:
        adapters = Adapters(model, rank, seed)
        optimizer = torch.optim.AdamW(
            adapters.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        return cls(adapters, optimizer)

    def finish(self, model: WanModel, loss: Tensor) -> float:
        """Backward and one step. Blocks run again in it, so this set must be on the model."""
        self.adapters.attach(model)
        loss.backward()
        nn.utils.clip_grad_norm_(self.adapters.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class Duel:
    """The student and its fake score, on one model."""

    def __init__(self, model: WanModel, options: argparse.Namespace) -> None:
        self.model = model.requires_grad_(False)
        device, dtype = options.device, options.dtype
        self.denoiser = Denoiser(model, dtype, compiles=False, checkpoints=True)
        self.student = Player.new(model, options.rank, options.student_lr, options.seed)
        self.fake = Player.new(model, options.rank, options.fake_lr, options.seed + 1)
        self.rng = Generator(device).manual_seed(options.seed)
        self.cfg, self.rollout = options.cfg, options.rollout

    def scores(self, empty: TextStates, clip_BSE: Tensor | None) -> Scores:
        """The three, for questions with this CLIP picture. Guidance leaves out words alone."""

        def student(x: Tensor, sigma: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
            self.student.adapters.attach(self.model)
            return self.denoiser(x, sigma, text, image, clip_BSE)

        def fake(x: Tensor, sigma: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
            self.fake.adapters.attach(self.model)
            return self.denoiser(x, sigma, text, image, clip_BSE)

        def real(x: Tensor, sigma: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
            detach(self.model)
            # One after the other, for memory.
            wanted = self.denoiser(x, sigma, text, image, clip_BSE)
            unguided = self.denoiser(x, sigma, empty, image, clip_BSE)
            return unguided + self.cfg * (wanted - unguided)

        return Scores(student, fake, real)

    def update_student(self, question: Question, empty: TextStates, exit_step: int) -> float:
        scores = self.scores(empty, question.clip_BSE)
        clean = roll_out(scores.student, question, exit_step, self.rollout, self.rng)
        loss = student_loss(scores, clean, question, self.rng)
        return self.student.finish(self.model, loss)

    def update_fake(self, question: Question, empty: TextStates, exit_step: int) -> float:
        scores = self.scores(empty, question.clip_BSE)
        with torch.no_grad():
            clean = roll_out(scores.student, question, exit_step, self.rollout, self.rng)
        return self.fake.finish(self.model, critic_loss(scores, clean, question, self.rng))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.model is not None and options.conditions is None:
        parser.error("--model learns from prompts: give --conditions, see training.conditions")
    if options.clip and options.task != "i2v":
        parser.error("--clip is a branch of image models: give --task i2v")
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out)
    torch.manual_seed(options.seed)
    model = read_model(options)
    size = VideoSize(options.width, options.height, options.frames)
    size.check()
    conditions = (
        random_conditions(model.config, size)
        if options.conditions is None
        else read_conditions(options.conditions, model.config, size)
    )
    shape, clip = size.latent_shape(model.config.in_dim), model.config.clip_tokens
    journal.note("base", input=str(shape), clip_tokens=clip)
    train(Duel(model, options), conditions, size, options, journal)


def train(
    duel: Duel,
    conditions: Conditions,
    size: VideoSize,
    options: argparse.Namespace,
    journal: Journal,
) -> None:
    """Each turn a random question; the student's set is saved now and then."""
    picks = Generator().manual_seed(options.seed)
    empty = conditions.empty(options.device)
    turns = ("fake",) * options.critic_per_student + ("student",)
    task = "i2v" if duel.model.config.takes_image else "t2v"
    for update in range(1, options.updates + 1):
        for turn in turns:
            step = options.exit_step
            step = int(torch.randint(STEPS, (), generator=picks)) if step is None else step
            row = int(torch.randint(len(conditions), (), generator=picks))
            noise = torch.randn(size.latent_shape(), generator=duel.rng, device=options.device)
            take_turn(duel, turn, conditions.ask(row, noise), empty, step, journal)
        if update % SAVE_EVERY == 0 or update == options.updates:
            duel.student.adapters.save(options.out / LORA, TITLE, task)


def take_turn(
    duel: Duel, turn: str, question: Question, empty: TextStates, step: int, journal: Journal
) -> None:
    """One update with its seconds and peak memory in the journal."""
    on_card = question.noise_BCTHW.is_cuda
    if on_card:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    update = duel.update_student if turn == "student" else duel.update_fake
    loss = update(question, empty, step)  # reading the loss waits for the card
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_card else 0.0
    journal.note(
        f"{turn} update",
        loss=loss,
        exit_step=step,
        seconds=round(seconds, 3),
        peak_gb=round(peak, 1),
    )


def read_model(options: argparse.Namespace) -> WanModel:
    """A file through the product's loader, or random weights of a published size."""
    if options.model is None:
        return random_model(options)
    loaded = load_transformer(options.model, options.dtype)
    if loaded.info.task not in TASKS:
        raise SystemExit(
            f"{options.model} is {loaded.info.describe()}; this trainer takes {' or '.join(TASKS)}"
        )
    return loaded.model.to(options.device)


def random_model(options: argparse.Namespace) -> WanModel:
    """Of `--random`'s size, for `--task`, with a CLIP branch as Wan 2.1 has it if so asked."""
    config = SIZES[options.random]
    if options.task == "i2v":
        clip_tokens = CLIP_TOKENS if options.clip else 0
        config = replace(config, in_dim=2 * config.out_dim + 4, clip_tokens=clip_tokens)
    with torch.device("meta"):
        model = WanModel(config)
    model = model.to(options.dtype).to_empty(device=options.device)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.zeros_(parameter)
    for norm in norms:
        nn.init.ones_(norm.weight)
    return model


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.large", description=__doc__)
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--model", type=Path, help="a Wan transformer, its linears in 16 or 32 bits")
    base.add_argument("--random", choices=tuple(SIZES), help="random weights of this size")
    parser.add_argument("--task", choices=TASKS, default="t2v", help="of random weights")
    parser.add_argument(
        "--clip", action="store_true", help="random i2v weights as Wan 2.1 has them"
    )
    parser.add_argument("--conditions", type=Path, help="of training.conditions; else random ones")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=1, help="of the student")
    parser.add_argument("--critic-per-student", type=int, default=5)
    parser.add_argument("--exit-step", type=int, choices=range(STEPS), help="not a random one")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--student-lr", type=float, default=1e-4)
    parser.add_argument("--fake-lr", type=float, default=2e-5)
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance of the real score")
    parser.add_argument("--rollout", choices=ROLLOUTS, default="euler")
    add_size(parser)
    parser.add_argument("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
