from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.wan.model import WanModel
from tests.conftest import fill
from training.adapters import Adapters, detach
from training.denoising import STUDENT_SIGMAS, Denoiser, generate
from training.dmd import Question, Scores, critic_loss, roll_out, student_loss
from training.sizes import SMOKE
from training.text import TextStates

TEXT = TextStates(torch.zeros(2, 4, SMOKE.text_dim), torch.zeros(2, 4))


def small_model() -> WanModel:
    return fill(WanModel(SMOKE.transformer(takes_image=False)))


def question(seed: int = 1) -> Question:
    noise = torch.randn(2, *SMOKE.latent_shape, generator=Generator().manual_seed(seed))
    return Question(noise, TEXT, None)


def gaussian_score(mean: float, deviation: float):
    """The exact velocity of data that is normal in every value."""

    def velocity(x: Tensor, sigma_B: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        alpha, variance = 1 - sigma, deviation**2
        share = alpha * variance / (alpha**2 * variance + sigma**2)
        clean = mean + share * (x - alpha * mean)
        return (x - clean) / sigma

    return velocity


def test_an_euler_rollout_to_the_last_step_is_what_the_sampler_makes() -> None:
    denoiser, asked = Denoiser(small_model(), torch.float32), question()

    clean = roll_out(denoiser, asked, 3, "euler", Generator())

    expected = generate(denoiser, asked.noise_BCTHW, (TEXT, TEXT), None, STUDENT_SIGMAS)
    torch.testing.assert_close(clean, expected, atol=1e-5, rtol=1e-5)


def test_only_the_exit_step_carries_gradients() -> None:
    calls = []

    def student(x: Tensor, sigma_B: Tensor, text: TextStates, image: Tensor | None) -> Tensor:
        calls.append((round(float(sigma_B[0]), 4), torch.is_grad_enabled()))
        return x

    roll_out(student, question(), 2, "renoise", Generator().manual_seed(2))

    assert calls == [(1.0, False), (0.9375, False), (0.8333, True)]


def test_an_unknown_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match="'heun' is none of euler, renoise"):
        roll_out(Denoiser(small_model(), torch.float32), question(), 0, "heun", Generator())


def test_a_student_follows_the_scores_to_the_data() -> None:
    """Normal clips around 3 start at 0; with exact scores of both sides they arrive."""
    place = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([place], lr=400.0)
    rng, asked = Generator().manual_seed(3), question()
    noise = 0.5 * asked.noise_BCTHW

    for _ in range(60):
        scores = Scores(
            gaussian_score(0, 1), gaussian_score(float(place.detach()), 0.5), gaussian_score(3, 0.5)
        )
        loss = student_loss(scores, place + noise, asked, rng)
        optimizer.zero_grad()
        loss.backward()
        place.grad.clamp_(-5e-4, 5e-4)
        optimizer.step()

    assert float(place.detach()) == pytest.approx(3.0, abs=0.25)


def test_equal_scores_leave_the_student_where_it_is() -> None:
    clean = torch.randn(2, *SMOKE.latent_shape, requires_grad=True)
    same = gaussian_score(0.0, 1.0)

    loss = student_loss(Scores(same, same, same), clean, question(), Generator().manual_seed(4))

    (gradient,) = torch.autograd.grad(loss, clean)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-9)
    assert float(gradient.abs().max()) < 1e-9


def test_the_critic_is_at_its_best_with_the_score_of_the_clips() -> None:
    rng = Generator().manual_seed(5)
    clean = 2 + 0.5 * torch.randn(16, *SMOKE.latent_shape, generator=rng)

    def loss_with(mean: float) -> float:
        fake = gaussian_score(mean, 0.5)
        scores = Scores(fake, fake, fake)
        return float(critic_loss(scores, clean, question(), Generator().manual_seed(6)))

    assert loss_with(2.0) < loss_with(1.5) and loss_with(2.0) < loss_with(2.5)


def test_new_adapters_change_nothing_and_trained_ones_are_a_lora_file(tmp_path: Path) -> None:
    model, asked = small_model().requires_grad_(False), question()
    sigma = torch.tensor([0.9, 0.9])
    denoiser = Denoiser(model, torch.float32)
    before = denoiser(asked.noise_BCTHW, sigma, TEXT, None)
    adapters = Adapters(model, rank=4, seed=1)
    adapters.attach(model)
    assert torch.equal(denoiser(asked.noise_BCTHW, sigma, TEXT, None), before)
    with torch.no_grad():
        for up in adapters.up:
            up.normal_(std=0.05, generator=Generator().manual_seed(7))
    trained = denoiser(asked.noise_BCTHW, sigma, TEXT, None).detach()

    adapters.save(tmp_path / "lora.safetensors", "a test")

    detach(model)
    assert torch.equal(denoiser(asked.noise_BCTHW, sigma, TEXT, None), before)
    apply_loras(model, [(read_lora(tmp_path / "lora.safetensors"), 1.0)])
    read = denoiser(asked.noise_BCTHW, sigma, TEXT, None)
    assert not torch.allclose(read, before, atol=1e-3)
    # The file is float16.
    torch.testing.assert_close(read, trained, atol=5e-3, rtol=5e-3)
