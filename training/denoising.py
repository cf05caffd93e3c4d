"""The transformer as training calls it: velocities, guidance, and samples along a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from lightx2v_core.datatypes import SamplerPlan
from lightx2v_core.ops.attention import Attend
from lightx2v_core.sampling.loop import sample
from lightx2v_core.sampling.schedule import DISTILL_LIST, list_sigmas, shifted
from lightx2v_core.wan.model import BlockInputs, WanBlock, WanModel

from .text import TextStates

SHIFT = 5.0
STUDENT_SIGMAS = list_sigmas(DISTILL_LIST, SHIFT)  # 1, 0.9375, 0.8333, 0.625, 0


def biased_attention(bias_BS: Tensor) -> Attend:
    """Plain attention over the video, and over text with a bias for each text position."""
    text_length = bias_BS.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != text_length:
            return F.scaled_dot_product_attention(q, k, v)
        mask = bias_BS[:, None, None].to(q.dtype).expand(-1, q.shape[1], q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def run_one_block(
    block: WanBlock,
    x: Tensor,
    modulation: Tensor,
    text: Tensor,
    clip: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    bias: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """A block with everything it needs as tensors, so that one compilation serves all blocks."""
    inputs = BlockInputs(modulation, text, clip, rotary, biased_attention(bias), dtype)
    return block(x, inputs)


class Denoiser:
    """Velocity of a model for a batch with one sigma per clip."""

    def __init__(
        self,
        model: WanModel,
        dtype: torch.dtype,
        compiles: bool | None = False,
        checkpoints: bool = False,
    ) -> None:
        """`checkpoints` computes each block a second time in the backward pass, to save memory."""
        self.model = model
        model.compute_dtype = dtype
        run_one = torch.compile(run_one_block, dynamic=False) if compiles else run_one_block
        again = partial(checkpoint, run_one, use_reentrant=False)
        self._run_one = again if checkpoints else run_one

    def __call__(
        self,
        x_BCTHW: Tensor,
        sigma_B: Tensor,
        text: TextStates,
        image_BCTHW: Tensor | None,
        clip_BSE: Tensor | None = None,
    ) -> Tensor:
        others = {x_BCTHW[0, 0].numel() // 4, 0 if clip_BSE is None else clip_BSE.shape[1]}
        assert text.bias_BS.shape[1] not in others, "attention knows its keys by their number"
        entry = x_BCTHW if image_BCTHW is None else torch.cat((x_BCTHW, image_BCTHW), dim=1)

        def run_block(_index: int, block: WanBlock, x: Tensor, inputs: BlockInputs) -> Tensor:
            parts = (inputs.modulation_B6E, inputs.text_BSE, inputs.clip_BSE, inputs.rotary)
            return self._run_one(block, x, *parts, text.bias_BS, inputs.dtype)

        timestep_B = 1000.0 * sigma_B
        return self.model(entry, timestep_B, text.states_BSE, clip_BSE, run_block=run_block)

    def guided(
        self,
        x_BCTHW: Tensor,
        sigma_B: Tensor,
        texts: tuple[TextStates, TextStates],
        image_BCTHW: Tensor | None,
        cfg: float,
    ) -> Tensor:
        """`texts` are the prompts and as many empty ones; both halves in one forward."""
        if cfg == 1.0:
            return self(x_BCTHW, sigma_B, texts[0], image_BCTHW)
        double = torch.cat((x_BCTHW, x_BCTHW))
        images = None if image_BCTHW is None else torch.cat((image_BCTHW, image_BCTHW))
        both = self(double, sigma_B.repeat(2), texts[0].join(texts[1]), images)
        wanted, unguided = both.chunk(2)
        return unguided + cfg * (wanted - unguided)


def training_sigmas(count: int, rng: Generator, device: torch.device) -> Tensor:
    """Sigmas of a uniform draw on the unshifted line."""
    return shift_sigmas(torch.rand(count, generator=rng, device=device).clamp(1e-3, 1.0))


def shift_sigmas(s: Tensor) -> Tensor:
    """The training shift, on numbers between 0 and 1."""
    return SHIFT * s / (1 + (SHIFT - 1) * s)


def per_clip(sigma_B: Tensor) -> Tensor:
    return sigma_B.view(-1, 1, 1, 1, 1)


def path_sigmas(steps: int) -> tuple[float, ...]:
    """Equal parts of the unshifted line, 0 last."""
    return (*(shifted(1 - i / steps, SHIFT) for i in range(steps)), 0.0)


def generate(
    denoiser: Denoiser,
    noise_BCTHW: Tensor,
    texts: tuple[TextStates, TextStates],
    image_BCTHW: Tensor | None,
    sigmas: Sequence[float] = STUDENT_SIGMAS,
    cfg: float = 1.0,
) -> Tensor:
    """Euler samples by the product's own loop."""
    plan = SamplerPlan(tuple(sigmas), cfg=cfg)
    return follow_plan([denoiser], plan, noise_BCTHW, texts, image_BCTHW, Generator())


def follow_plan(
    denoisers: Sequence[Denoiser],
    plan: SamplerPlan,
    noise_BCTHW: Tensor,
    texts: tuple[TextStates, TextStates],
    image_BCTHW: Tensor | None,
    rng: Generator,
) -> Tensor:
    """Samples by the product's own loop; one denoiser, or two experts. `rng` renoises."""
    device = noise_BCTHW.device

    def denoise(x: Tensor, sigma: float, step: int) -> Tensor:
        sigma_B = torch.full((len(x),), sigma, device=device)
        denoiser = denoisers[plan.expert_at(step)]
        return denoiser.guided(x, sigma_B, texts, image_BCTHW, plan.cfg_at(step))

    return sample(denoise, noise_BCTHW, plan, rng).clone()
