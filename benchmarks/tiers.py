"""The demo model judged in each tier of precision, paired with bf16: same prompts, same noise.

    python -m benchmarks.tiers --device cuda --out tiers.jsonl

Four-step clips of the text-to-video demo by 16-bit and 8-bit linears and attention. Its clips have
320 tokens, and our 8-bit attention leaves fewer than 8,192 to PyTorch; here it is made to take
them. Case `tier_judged` holds score and `difference`, the mean of the paired difference to the
first row in points with the bounds of its 95 % interval over prompts, and `forward_error` to
float32 of the velocity at one noise level; or blocked_by, the reason why a row did not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from lightx2v_core.assemble import load_text_encoder, load_transformer, load_vae
from lightx2v_core.checkpoint.detect import detect
from lightx2v_core.checkpoint.source import open_checkpoint
from lightx2v_core.device import select_device
from lightx2v_core.errors import CapabilityError
from lightx2v_core.ops import eight_bit, sixteen_bit
from lightx2v_core.ops.attention import name_of
from lightx2v_core.presets import DEMO_FILES, DEMO_FOLDER, make_plan, preset_for
from lightx2v_core.quant.quantise import KEEP
from lightx2v_core.sampling.loop import make_noise, sample
from training.captions import plain_prompt, stories
from training.family import world_of
from training.files import plain_file
from training.intervals import mean_interval, paired_interval
from training.judge import judge
from training.measures import clip_scores
from training.questions import unseen_scenes

from .lines import Line, about, add_out, emit, relative_error

SIGMA = 0.9375  # of the forward that is compared
SEED = 21
BATCH = 50  # clips in the transformer together


class Tier(NamedTuple):
    """How the transformer is loaded."""

    quantisation: str
    attention: str


# The first is what the others are compared with.
TIERS = {
    "bf16": Tier(KEEP, "sdpa"),
    "bf16, gluon16": Tier(KEEP, "gluon16"),
    "fp8 linears": Tier("fp8", "sdpa"),
    "fp8 linears, gluon": Tier("fp8", "gluon"),
    "fp8 linears, triton": Tier("fp8", "triton"),
    "int8 linears, gluon": Tier("int8", "gluon"),
}
Velocity = Callable[[Tensor, float], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEMO_FOLDER, help="the demo family")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tiers", nargs="+", choices=tuple(TIERS), default=list(TIERS))
    parser.add_argument("--device", default="auto")
    add_out(parser)
    options = parser.parse_args(arguments)
    device = select_device(options.device)
    least = eight_bit.LEAST_TOKENS, sixteen_bit.LEAST_QUERIES, sixteen_bit.LEAST_KEYS
    eight_bit.LEAST_TOKENS = sixteen_bit.LEAST_QUERIES = sixteen_bit.LEAST_KEYS = 1
    try:
        emit(lines_of(options.folder, options.tiers, options.prompts, device), options.out)
    finally:
        eight_bit.LEAST_TOKENS, sixteen_bit.LEAST_QUERIES, sixteen_bit.LEAST_KEYS = least
    return 0


@torch.inference_mode()
def lines_of(
    folder: Path, tiers: Sequence[str], prompts: int, device: torch.device
) -> Iterator[Line]:
    exam = Exam(folder, prompts, device)
    with TemporaryDirectory() as place:
        # Codes cannot be made of codes: what the shipped ones stand for.
        model = plain_file(folder / DEMO_FILES["t2v"], Path(place))
        exact = load_transformer(model, attention="sdpa").model.to(device)
        expected = exam.velocity(exact)
        first = None
        for name in tiers:
            line: Line = {"case": "tier_judged", "tier": name, "prompts": prompts, **about(device)}
            how = TIERS[name]
            try:
                loaded = load_transformer(
                    model, torch.bfloat16, how.attention, device, quantisation=how.quantisation
                )
            except CapabilityError as refusal:
                yield line | {"blocked_by": str(refusal)}
                continue
            loaded.residency.place(device)
            scores_P1 = exam.scores(loaded.model)
            first = scores_P1 if first is None else first
            score = mean_interval(scores_P1).scaled(100)
            paired = paired_interval(scores_P1, first).scaled(100)
            yield line | {
                "attention": name_of(loaded.model.attend),
                "scheme": how.quantisation,
                "score": [score.value, score.low, score.high],
                "difference": [paired.value, paired.low, paired.high],
                "forward_error": relative_error(exam.velocity(loaded.model), expected),
            }


class Exam:
    """Prompts with their noise, and what turns a model into scores."""

    def __init__(self, folder: Path, prompts: int, device: torch.device) -> None:
        preset = preset_for(detect(open_checkpoint(folder / DEMO_FILES["t2v"])))
        self.plan, self.shape = make_plan(preset), preset.size.latent_shape()
        self.device, self.world = device, world_of(folder)
        scenes = unseen_scenes(prompts, self.world, self.world.exam_split)
        self.scenes = scenes.to(device)
        self.vae = load_vae(folder / DEMO_FILES["vae"]).to(device)
        encoder = load_text_encoder(folder / DEMO_FILES["text"], dtype=torch.float32)
        encoder.transformer.to(device)
        texts = [plain_prompt(story) for story in stories(scenes)]
        parts = [encoder.encode(texts[i : i + BATCH]) for i in range(0, prompts, BATCH)]
        self.text_PSE = torch.cat(parts).to(device)
        self.noise_PCTHW = torch.cat(
            [make_noise(self.shape, Generator().manual_seed(SEED + i)) for i in range(prompts)]
        ).to(device)

    def velocity(self, model: torch.nn.Module) -> Tensor:
        """Of the first prompts on noise alone, at SIGMA."""
        return self._velocity(model, slice(0, BATCH))(self.noise_PCTHW[:BATCH], SIGMA)

    def scores(self, model: torch.nn.Module) -> Tensor:
        """Share of what was asked that each clip shows, 0 to 1; P1."""
        scores = []
        for start in range(0, len(self.noise_PCTHW), BATCH):
            part = slice(start, start + BATCH)
            velocity = self._velocity(model, part)

            def denoise(
                x: Tensor, sigma: float, _step: int, velocity: Velocity = velocity
            ) -> Tensor:
                return velocity(x, sigma)

            rng = Generator().manual_seed(SEED)
            latent = sample(denoise, self.noise_PCTHW[part], self.plan, rng)
            verdict = judge(self.vae.decode(latent), self.scenes[part], self.world)
            scores.append(clip_scores(verdict)["all"])
        return torch.cat(scores)[:, None]

    def _velocity(self, model: torch.nn.Module, part: slice) -> Velocity:
        text = self.text_PSE[part]

        def velocity(x: Tensor, sigma: float) -> Tensor:
            timestep = torch.full((len(x),), 1000.0 * sigma, device=self.device)
            return model(x, timestep, text, None)

        return velocity


if __name__ == "__main__":
    raise SystemExit(main())
