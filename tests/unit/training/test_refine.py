from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from lightx2v_core.lora.apply import apply_loras
from lightx2v_core.lora.read import read_lora
from lightx2v_core.wan.model import WanModel
from tests.conftest import fill
from training.adapters import Adapters
from training.bank import Batch
from training.denoising import STUDENT_SIGMAS, Denoiser
from training.extract import Weights, extract, save_lora
from training.files import save_weights
from training.refine import EXPERTS, WHOLE, add_differences, matching_loss, step_shares, take_pairs
from training.sizes import SMOKE
from training.text import TextStates

RANK = 128  # that of every linear of the small model, so that nothing is left out
TEXT = TextStates(torch.zeros(4, 4, SMOKE.text_dim), torch.zeros(4, 4))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher and a student that differs from it in every tensor."""
    folder = tmp_path_factory.mktemp("pair")
    paths = (folder / "teacher_t2v.safetensors", folder / "demo_t2v.safetensors")
    model = fill(WanModel(SMOKE.transformer(takes_image=False)))
    save_weights(paths[0], model.state_dict(), "t2v")
    rng = Generator().manual_seed(9)
    for parameter in model.parameters():
        parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=rng))
    save_weights(paths[1], model.state_dict(), "t2v")
    return paths


def load(path: Path) -> WanModel:
    model = WanModel(SMOKE.transformer(takes_image=False))
    weights = Weights(path)
    model.load_state_dict({name: weights[name].float() for name in weights.names})
    return model.requires_grad_(False)


def batch(seed: int) -> Batch:
    clips = torch.randn(4, *SMOKE.latent_shape, generator=Generator().manual_seed(seed))
    return Batch(clips, torch.zeros(4, 4, dtype=torch.long), None, TEXT)


def cut(pair: tuple[Path, Path], rank: int) -> tuple[WanModel, Adapters, dict[str, Tensor]]:
    tensors = extract(Weights(pair[0]), Weights(pair[1]), rank, torch.float32).tensors
    base = load(pair[0])
    adapters = Adapters(base, rank, seed=1)
    rest = take_pairs(adapters, tensors)
    add_differences(base, rest)
    adapters.attach(base)
    return base, adapters, rest


def test_a_cut_of_full_rank_answers_as_the_student(pair: tuple[Path, Path]) -> None:
    base, _, _ = cut(pair, RANK - 1)
    student = load(pair[1])
    x, sigma_B = batch(1).latent_BCTHW, torch.tensor([1.0, 0.9, 0.8, 0.6])

    answer = Denoiser(base, torch.float32)(x, sigma_B, TEXT, None)

    expected = Denoiser(student, torch.float32)(x, sigma_B, TEXT, None)
    # One singular value of 128 is left out, and float32 through two blocks.
    torch.testing.assert_close(answer, expected, atol=2e-2, rtol=2e-2)


def test_matching_brings_a_poor_cut_nearer_to_the_student(pair: tuple[Path, Path]) -> None:
    base, adapters, _ = cut(pair, 4)
    walker = Denoiser(base, torch.float32)
    guide = Denoiser(load(pair[1]), torch.float32)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=2e-3)

    def loss(seed: int) -> Tensor:
        return matching_loss(walker, guide, batch(seed), WHOLE.shares, Generator().manual_seed(3))

    before = loss(5).item()
    for seed in range(10, 25):
        loss(seed).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert loss(5).item() < 0.8 * before


def test_the_file_gives_the_product_what_training_had(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapters, rest = cut(pair, 4)
    path = tmp_path / "lora.safetensors"

    save_lora(path, rest | adapters.published(), {})

    loaded = load(pair[0])
    (report,) = apply_loras(loaded, [(read_lora(path), 1.0)])
    x, sigma_B = batch(1).latent_BCTHW, torch.full((4,), 0.8)
    assert not report.failed
    torch.testing.assert_close(  # float16 in the file
        Denoiser(loaded, torch.float32)(x, sigma_B, TEXT, None),
        Denoiser(base, torch.float32)(x, sigma_B, TEXT, None),
        atol=1e-2,
        rtol=1e-2,
    )


def test_the_experts_divide_the_steps_at_the_boundary() -> None:
    assert [step_shares(name) for name in ("high", "low")] == [one.shares for one in EXPERTS]
    assert EXPERTS[0].shares == (1.0, 1.0, 0.0, 0.0)
    assert EXPERTS[1].shares == (0.0, 0.0, 1.0, 1.0)
    assert len(STUDENT_SIGMAS) == 5
