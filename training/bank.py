"""Stage `bank`: clips as latents, image conditions and caption ids, kept in the device's memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Generator, Tensor, nn

from lightx2v_core.conditioning import frame_mask
from lightx2v_core.datatypes import VideoSize
from lightx2v_core.wan.vae import WanVae

from .captions import caption, misheard, stories
from .context import Context
from .files import TEXT, read_weights
from .progress import Clock
from .text import TextStates, encode_rows
from .vocabulary import CaptionRows, learn_pieces
from .world import sample_scenes

WORDINGS = 4  # captions per clip


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Clean latents and what belongs to them."""

    latent_BCTHW: Tensor
    ids_BS: Tensor
    image_BCTHW: Tensor | None  # mask and first-frame latent, 20 channels
    text: TextStates | None  # of those ids, where the bank knows them


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Everything in float16 and int16; `sample` gives float32."""

    latent_NCTHW: Tensor
    picture_NCTHW: Tensor | None  # latent of the first frame and grey ones
    ids_NWS: Tensor
    mask_1CTHW: Tensor
    states_NWSE: Tensor | None = None  # what the text encoder says about `ids_NWS`
    bias_NWS: Tensor | None = None

    def __len__(self) -> int:
        return self.latent_NCTHW.shape[0]

    def sample(
        self, count: int, rng: Generator, with_image: bool, frames: int | None = None
    ) -> Batch:
        """Random clips with a random wording each; `frames` latent frames, None for all."""
        device = self.latent_NCTHW.device
        rows = torch.randint(len(self), (count,), generator=rng, device=device)
        wording = torch.randint(WORDINGS, (count,), generator=rng, device=device)
        ids = self.ids_NWS[rows, wording].long()
        image = None
        if with_image:
            if self.picture_NCTHW is None:
                raise ValueError("this bank was made without image conditions")
            image = with_mask(self.picture_NCTHW[rows].float(), self.mask_1CTHW)
        text = None
        if self.states_NWSE is not None and self.bias_NWS is not None:
            states = self.states_NWSE[rows, wording].float()
            text = TextStates(states, self.bias_NWS[rows, wording])
        return Batch(self.latent_NCTHW[:, :, :frames][rows].float(), ids, image, text)

    @torch.no_grad()
    def with_states(self, transformer: nn.Module, chunk: int = 1024) -> Bank:
        """The same bank, its captions encoded once; float16."""
        states, biases = [], []
        for ids in self.ids_NWS.flatten(0, 1).split(chunk):
            text = encode_rows(transformer, ids.long())
            states.append(text.states_BSE.half())
            biases.append(text.bias_BS)
        shape = (-1, self.ids_NWS.shape[1])
        return replace(
            self,
            states_NWSE=torch.cat(states).unflatten(0, shape),
            bias_NWS=torch.cat(biases).unflatten(0, shape),
        )


def with_mask(picture_BCTHW: Tensor, mask_1CTHW: Tensor) -> Tensor:
    """The 20 channels an image model takes beside the noise: mask, then latent."""
    return torch.cat((mask_1CTHW.expand(len(picture_BCTHW), -1, -1, -1, -1), picture_BCTHW), dim=1)


def condition_mask(context: Context) -> Tensor:
    """1 4 T H W: the first frame is given."""
    size = VideoSize(context.sizes.side, context.sizes.side, context.sizes.frames)
    return frame_mask(size, {0}).to(context.device)


def picture_latents(context: Context, vae: WanVae, pixels_BCFHW: Tensor) -> Tensor:
    """Latents of clips that keep only their first frame and are grey after it."""
    padded = torch.zeros_like(pixels_BCFHW)
    padded[:, :, 0] = pixels_BCFHW[:, :, 0]
    return context.encode(vae, padded)


def caption_rows(context: Context) -> CaptionRows:
    """The vocabulary of the text encoder if there is one already, else a new one."""
    for folder in (context.out, context.source):
        if folder is not None and (folder / TEXT).is_file():
            model = read_weights(folder / TEXT)["spiece_model"]
            return CaptionRows(model.numpy().tobytes(), context.world)
    return CaptionRows(learn_pieces(context.seed, world=context.world), context.world)


def bank_of(context: Context) -> Bank:
    if context.bank is None:
        raise RuntimeError("there is no bank of clips; put the stage bank before this one")
    return context.bank


@torch.no_grad()
def fill_bank(context: Context, minutes: float, with_images: bool) -> None:
    """Render and encode until the time is up or the bank is full."""
    clock, sizes = Clock(minutes, reserve=5), context.sizes
    vae = context.load_vae()
    rng = Generator().manual_seed(context.draws + 1000)
    rows, words = caption_rows(context), Random(context.draws)
    latents, pictures, ids = [], [], []
    count = 0
    while count < sizes.bank_clips and not (clock.is_over and count >= sizes.teacher_batch):
        scenes = sample_scenes(sizes.chunk, rng, context.world)
        pixels = context.render(scenes.to(context.device)).to(context.dtype)
        latents.append(context.encode(vae, pixels).half())
        if with_images:
            pictures.append(picture_latents(context, vae, pixels).half())
        told = [misheard(story, context.world.slip_share, words) for story in stories(scenes)]
        captions = [caption(story, words) for story in told for _ in range(WORDINGS)]
        ids.append(rows(captions).to(torch.int16).unflatten(0, (-1, WORDINGS)))
        count += sizes.chunk
    context.bank = Bank(
        torch.cat(latents),
        torch.cat(pictures) if pictures else None,
        torch.cat(ids).to(context.device),
        condition_mask(context),
    )
    latent = context.bank.latent_NCTHW
    bad = int((~latent.float().flatten(1).isfinite().all(dim=1)).sum())
    if bad:
        raise RuntimeError(f"{bad} of {count} latents of the bank are not finite")
    context.journal.note(
        "bank",
        clips=count,
        clips_per_second=round(count / clock.elapsed, 1),
        mean=float(latent[:512].float().mean()),
        std=float(latent[:512].float().std()),
    )
