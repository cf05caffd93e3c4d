from __future__ import annotations

import pytest
import torch

from lightx2v_core.datatypes import SamplerPlan
from lightx2v_core.errors import CapabilityError, RequestError
from lightx2v_core.sampling.loop import (
    SOLVERS,
    Rescue,
    find_fault,
    make_noise,
    make_rngs,
    sample,
)
from lightx2v_core.sampling.schedule import DISTILL_LIST, list_sigmas

SIGMAS = list_sigmas(DISTILL_LIST, 5)
SHAPE = (1, 16, 3, 4, 4)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def curved(x: torch.Tensor, sigma: float, step: int) -> torch.Tensor:
    """Some velocity that depends on all three arguments."""
    return torch.sin(3 * x) * sigma + 0.1 * step


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_lands_on_a_point_target(solver):
    target, seen = torch.linspace(-1, 1, 768).view(SHAPE), []

    def true_velocity(x, sigma, step):
        return (x - target) / sigma

    noise = make_noise(SHAPE, generator())
    result = sample(
        true_velocity,
        noise,
        SamplerPlan(SIGMAS, solver),
        generator(),
        lambda event: seen.append((event.step, event.num_steps)),
    )

    torch.testing.assert_close(result, target)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_euler_is_x_plus_the_sigma_difference_times_velocity():
    x = expected = make_noise(SHAPE, generator())
    for step in range(4):
        velocity = curved(expected, SIGMAS[step], step)
        expected = expected + (SIGMAS[step + 1] - SIGMAS[step]) * velocity

    result = sample(curved, x, SamplerPlan(SIGMAS), generator())

    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("split", [1, 2, 3])
def test_two_stages_equal_one_run_bit_for_bit(solver, split):
    plan, noise = SamplerPlan(SIGMAS, solver), make_noise(SHAPE, generator())
    whole = sample(curved, noise, plan, generator(5))

    rng = generator(5)
    first = sample(curved, noise, plan, rng, steps=range(split))
    second = sample(curved, first, plan, rng, steps=range(split, 4))

    assert torch.equal(second, whole)


def test_the_same_seed_gives_the_same_noise_and_another_seed_another():
    first, again, other = (make_noise(SHAPE, generator(seed)) for seed in (7, 7, 8))

    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_renoise_depends_on_the_seed_and_euler_does_not():
    noise = make_noise(SHAPE, generator())

    same = {}
    for solver in SOLVERS:
        one, two = (
            sample(curved, noise, SamplerPlan(SIGMAS, solver), generator(s)) for s in (1, 2)
        )
        same[solver] = torch.equal(one, two)

    assert same == {"euler": True, "renoise": False}


def test_an_exception_in_the_callback_escapes_untouched():
    class Interrupt(Exception):
        pass

    def interrupt(event):
        if event.step == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        sample(curved, make_noise(SHAPE, generator()), SamplerPlan(SIGMAS), generator(), interrupt)


def test_nan_stops_the_run_and_names_the_step():
    def poisoned(x, sigma, step):
        return x * float("nan") if step == 2 else 0.5 * x

    with pytest.raises(CapabilityError, match="not finite after step 3 of 4"):
        sample(poisoned, make_noise(SHAPE, generator()), SamplerPlan(SIGMAS), generator())


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="'heun' is unknown; use euler, renoise"):
        sample(curved, torch.zeros(SHAPE), SamplerPlan(SIGMAS, "heun"), generator())


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_item_of_a_batch_equals_its_own_seed_alone_bit_for_bit(solver):
    def run(seed: int, count: int, first: int = 0) -> torch.Tensor:
        rngs = make_rngs(seed, count, first)
        noise = make_noise((count, *SHAPE[1:]), rngs)
        return sample(curved, noise, SamplerPlan(SIGMAS, solver), rngs)

    batch = run(20, 3)

    for item in range(3):
        assert torch.equal(batch[item : item + 1], run(20 + item, 1))
        assert torch.equal(batch[item : item + 1], run(20, 1, first=item))


def test_the_seed_after_the_largest_is_the_smallest():
    largest, wrapped = make_rngs(2**64 - 1, 2)

    assert largest.initial_seed() == 2**64 - 1
    assert wrapped.initial_seed() == 0


class Backend:
    """A fast row that breaks the latent of step 2, and can be switched off."""

    def __init__(self, value: float, mends: bool = True) -> None:
        self.value, self.mends, self.is_plain, self.steps = value, mends, False, []

    def __call__(self, x: torch.Tensor, sigma: float, step: int) -> torch.Tensor:
        self.steps.append(step)
        velocity = curved(x, sigma, step)
        broken = step == 1 and not (self.is_plain and self.mends)
        return (x - self.value) / sigma if broken else velocity

    def switch(self) -> bool:
        was, self.is_plain = self.is_plain, True
        return not was


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.25])
def test_a_broken_step_is_computed_once_more_with_the_plain_rows(value, caplog):
    backend, noise = Backend(value), make_noise(SHAPE, generator())

    result = sample(
        backend,
        noise,
        SamplerPlan(SIGMAS),
        generator(),
        rescue=Rescue("attention sage", backend.switch),
    )

    assert torch.equal(result, sample(curved, noise, SamplerPlan(SIGMAS), generator()))
    assert backend.steps == [0, 1, 1, 2, 3]
    assert "after step 2 of 4, sigma 0.9375 (attention sage): once more" in caplog.text


def test_what_plain_rows_do_not_mend_ends_with_step_and_backend():
    backend = Backend(float("nan"), mends=False)
    rescue = Rescue("attention sage, matmul fp8_row", backend.switch)

    with pytest.raises(
        CapabilityError, match="not finite after step 2 of 4, .*sage, matmul fp8_row, and with"
    ):
        sample(
            backend, make_noise(SHAPE, generator()), SamplerPlan(SIGMAS), generator(), rescue=rescue
        )

    assert backend.steps == [0, 1, 1]


def test_one_black_frame_among_others_is_found():
    latent = make_noise(SHAPE, generator())
    latent[:, :, 1] = 0.3

    assert find_fault(latent) == "has frames without any variation"
    assert find_fault(make_noise(SHAPE, generator())) is None
