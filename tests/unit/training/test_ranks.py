"""Two processes that train one model, against one process with the clips of both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from training.fitting import Recipe, fit
from training.progress import Clock, Journal
from training.ranks import join, leave, shared

ROOT = Path(__file__).parents[3]
STEPS, LR = 5, 0.05


class Steps(Clock):
    """Over after so many steps."""

    def __init__(self, last: int) -> None:
        super().__init__(1.0)
        self._left = last

    @property
    def fraction(self) -> float:
        self._left -= 1
        return 1.0 if self._left < 0 else 0.0


def net(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def clips(rank: int) -> torch.Tensor:
    return torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(40 + rank))


def train(folder: Path) -> None:
    """As one of the ranks; only the first begins with the weights of `net(0)`, and each would end
    after another number of steps."""
    rank = join()
    model, mine, drawn = net(rank), clips(rank), iter(range(100))
    clock, recipe = Steps(STEPS + 3 * rank), Recipe(lr=LR, warmup=1, clip=1e9)

    def loss_at(_fraction: float) -> torch.Tensor:
        return model(mine[next(drawn) % STEPS]).square().mean()

    fit("x", [model], loss_at, recipe, clock, Journal(folder), lambda _: None)
    answer = {"weights": model.weight.tolist(), "told": shared(7.5 + rank)}
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    leave()


def test_two_ranks_take_the_steps_of_one_with_the_clips_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alike = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    for name, value in {**alike, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    other = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1", "LOCAL_RANK": "1"},
    )
    train(tmp_path)

    assert other.wait(60) == 0
    model = net(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01)
    for pixels in torch.cat((clips(0), clips(1)), dim=1):
        model(pixels).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["told"] == 7.5
    expected = model.weight.detach()
    torch.testing.assert_close(torch.tensor(first["weights"]), expected, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
