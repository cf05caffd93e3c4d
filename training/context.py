"""What every stage is given: sizes, folders, device, journal, and the clips it may use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lightx2v_core.wan.vae import WanVae

from .files import VAE, find, read_vae
from .progress import Journal
from .ranks import SEED_STRIDE
from .sizes import Sizes
from .world import Scenes, render
from .worlds import PLAIN, World

if TYPE_CHECKING:
    from .bank import Bank

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(slots=True, eq=False)
class Context:
    """`source` is a folder with files of earlier stages; `out` is looked at first."""

    sizes: Sizes
    out: Path
    source: Path | None
    device: torch.device
    seed: int  # of first weights, and of the draws of a process that trains alone
    journal: Journal
    _: KW_ONLY
    rank: int = 0  # among the processes that train one model
    world: World = PLAIN
    cfg: float = 3.0  # guidance of the teacher
    rollout: str = "euler"  # of distribution matching
    lr: float | None = None  # of the VAE; None is the recipe's own
    compiles: bool | None = None  # the transformer's blocks; None until it was timed
    bank: Bank | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    workers: int = 1  # parts of the work that are done at once, by `each`

    @property
    def draws(self) -> int:
        """Seed of everything drawn at random in training: another one in each rank."""
        return self.seed + SEED_STRIDE * self.rank

    @property
    def dtype(self) -> torch.dtype:
        """What the matmuls and convolutions of training compute in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def each(self, work: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
        """`work` of every item without gradients, in their order. On a CPU some at once, each in
        one thread: threads that share one small product spend their time waiting for each other,
        most of all where other programs take their turns."""
        if self.workers == 1:
            with torch.no_grad():
                return [work(item) for item in items]
        without_gradients = partial(torch.set_grad_enabled, False)  # which is of each thread
        with ThreadPoolExecutor(self.workers, initializer=without_gradients) as pool:
            return list(pool.map(work, items))

    def render(self, scenes: Scenes) -> Tensor:
        """BCFHW in [-1, 1] float32."""
        return render(scenes, self.sizes.side, self.sizes.side, self.sizes.frames)

    def load_vae(self) -> WanVae:
        """The VAE of an earlier stage, in the compute dtype."""
        return read_vae(find(VAE, self.out, self.source)).to(self.device, self.dtype)

    @torch.no_grad()
    def encode(self, vae: WanVae, pixels_BCFHW: Tensor) -> Tensor:
        """Normalised latents, some clips at a time, each as one chunk."""
        step = self.sizes.chunk
        latents = self.sizes.latent_shape[1]
        parts = pixels_BCFHW.split(step)
        return torch.cat([vae.encode(part, latents_per_chunk=latents) for part in parts])

    @torch.no_grad()
    def decode(self, vae: WanVae, latent_BCTHW: Tensor) -> Tensor:
        """Pixels, some clips at a time, each as one chunk."""
        latents = self.sizes.latent_shape[1]
        parts = latent_BCTHW.split(self.sizes.chunk)
        return torch.cat([vae.decode(part, latents_per_chunk=latents) for part in parts])
