from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from training.replay import Plain, Replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]


def test_replayed_gradients_are_those_of_plain_steps() -> None:
    """Three steps each: the same draws, losses and gradients, while the weights change."""
    torch.manual_seed(0)
    recorded = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).cuda()
    plain = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).cuda()
    plain.load_state_dict(recorded.state_dict())
    rngs = [Generator("cuda").manual_seed(5) for _ in range(2)]

    def loss_of(model: nn.Module, rng: Generator) -> Tensor:
        return model(torch.randn(32, 64, device="cuda", generator=rng)).square().mean()

    replay = Replay(lambda: loss_of(recorded, rngs[0]), list(recorded.parameters()), rngs[0])
    once = Plain(lambda: loss_of(plain, rngs[1]))
    for rng in rngs:
        rng.manual_seed(9)

    for _ in range(3):
        losses = [float(replay()), float(once())]
        pairs = list(zip(recorded.parameters(), plain.parameters(), strict=True))

        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            for parameter in (p for pair in pairs for p in pair):
                parameter -= 0.1 * parameter.grad
        for _, theirs in pairs:
            theirs.grad = None
