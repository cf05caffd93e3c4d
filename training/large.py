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
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from lightx2v_core.assemble import load_transformer
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.wan.config import TEXT_LEN, WanConfig
from lightx2v_core.wan.model import WanModel

from .adapters import Adapters, detach
from .denoising import Denoiser
from .dmd import ROLLOUTS, STEPS, Question, Scores, critic_loss, roll_out, student_loss
from .progress import Journal
from .text import TextStates

SIZES = {
    "14B": WanConfig(dim=5120, ffn_dim=13824, num_layers=40),
    "1.3B": WanConfig(dim=1536, ffn_dim=8960, num_layers=30),
    "tiny": WanConfig(dim=128, ffn_dim=256, num_layers=2, text_dim=64),
}
BETAS, WEIGHT_DECAY, CLIP = (0.0, 0.999), 1e-3, 10.0
SAVE_EVERY = 100  # updates of the student


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

    def scores(self, empty: TextStates) -> Scores:
        def student(x: Tensor, sigma: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
            self.student.adapters.attach(self.model)
            return self.denoiser(x, sigma, text, image)

        def fake(x: Tensor, sigma: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
            self.fake.adapters.attach(self.model)
            return self.denoiser(x, sigma, text, image)

        def real(x: Tensor, sigma: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
            detach(self.model)
            wanted = self.denoiser(x, sigma, text, image)
            unguided = self.denoiser(x, sigma, empty, image)  # one after the other, for memory
            return unguided + self.cfg * (wanted - unguided)

        return Scores(student, fake, real)

    def update_student(self, question: Question, empty: TextStates, exit_step: int) -> float:
        scores = self.scores(empty)
        clean = roll_out(scores.student, question, exit_step, self.rollout, self.rng)
        loss = student_loss(scores, clean, question, self.rng)
        return self.student.finish(self.model, loss)

    def update_fake(self, question: Question, empty: TextStates, exit_step: int) -> float:
        scores = self.scores(empty)
        with torch.no_grad():
            clean = roll_out(scores.student, question, exit_step, self.rollout, self.rng)
        return self.fake.finish(self.model, critic_loss(scores, clean, question, self.rng))


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    options.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(options.out)
    torch.manual_seed(options.seed)
    model = read_model(options)
    states, empty = read_states(options, model.config)
    duel = Duel(model, options)
    shape = VideoSize(options.width, options.height, options.frames).latent_shape()
    picks = Generator().manual_seed(options.seed)
    for update in range(1, options.updates + 1):
        for turn in ("fake",) * options.critic_per_student + ("student",):
            step = options.exit_step
            step = int(torch.randint(STEPS, (), generator=picks)) if step is None else step
            row = int(torch.randint(len(states.states_BSE), (), generator=picks))
            noise = torch.randn(shape, generator=duel.rng, device=options.device)
            question = Question(noise, states[row : row + 1], None)
            take_turn(duel, turn, question, empty, step, journal)
        if update % SAVE_EVERY == 0 or update == options.updates:
            path = options.out / "student_lora.safetensors"
            duel.student.adapters.save(path, "4-step distill LoRA")


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
    if options.model is not None:
        loaded = load_transformer(options.model, options.dtype)
        if loaded.info.task != "t2v":
            raise SystemExit(
                f"{options.model} is {loaded.info.describe()}; text to video is needed"
            )
        return loaded.model.to(options.device)
    with torch.device("meta"):
        model = WanModel(SIZES[options.random])
    model = model.to(options.dtype).to_empty(device=options.device)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.ones_(parameter)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.zeros_(parameter)
    return model


def read_states(options: argparse.Namespace, config: WanConfig) -> tuple[TextStates, TextStates]:
    """(states of the prompts, those of the empty prompt)."""
    if options.states is not None:
        tensors = load_file(options.states)
        states, empty = tensors["states"], tensors["empty"]
    else:
        states = torch.randn(4, TEXT_LEN, config.text_dim)
        empty = torch.randn(1, TEXT_LEN, config.text_dim)

    def rows(tensor: Tensor) -> TextStates:
        tensor = tensor.to(options.device, torch.float32)
        return TextStates(tensor, torch.zeros(tensor.shape[:2], device=options.device))

    return rows(states), rows(empty)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.large", description=__doc__)
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--model", type=Path, help="a Wan text-to-video transformer")
    base.add_argument("--random", choices=tuple(SIZES), help="random weights of this size")
    parser.add_argument("--states", type=Path, help="safetensors with text states")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=1, help="of the student")
    parser.add_argument("--critic-per-student", type=int, default=5)
    parser.add_argument("--exit-step", type=int, choices=range(STEPS), help="not a random one")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--student-lr", type=float, default=1e-4)
    parser.add_argument("--fake-lr", type=float, default=2e-5)
    parser.add_argument("--cfg", type=float, default=3.0, help="guidance of the real score")
    parser.add_argument("--rollout", choices=ROLLOUTS, default="euler")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
