"""Stage `vae`: the small Wan VAE, and the folding of its latent statistics.

Folding moves measured mean and deviation of each latent channel into the last convolution of the
encoder and the first of the decoder. Then the statistics that every Wan program applies give
latents of mean 0 and deviation 1, and no program needs to know that this VAE is another one.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lightx2v_core.wan.vae import LATENT_MEAN, LATENT_STD, VaeConfig, WanVae
from lightx2v_core.wan.vae_layers import AttentionBlock, ResidualBlock, Stream

from .context import Context
from .files import VAE, read_vae, save_weights
from .fitting import Recipe, fit
from .judge import judge, psnr
from .places import TRAVEL_FRAMES, UNIT
from .progress import Clock
from .sheets import save_sheet
from .sizes import Sizes
from .world import Scenes, render, sample_scenes

RECIPE = Recipe(lr=1e-3, warmup=100, decay=0.998)
SHORT_PART = 0.85  # of the time, with short clips
LATENT_NOISE = 0.2  # at most, in deviations of a channel: the decoder learns to forgive
NOISE_FROM = 0.4  # of the time: at first it has enough to learn
OBJECT_WEIGHT = 6.0  # of a fully saturated pixel above a grey one: objects are few pixels
JITTER = 20  # pixels between the middle of a crop and the object, at most
PADDED_SHARE = 8  # one clip in so many is a picture and grey frames, as image conditions are


class Roundtrip(nn.Module):
    """Pixels to latent to pixels, whole clips in one chunk, noise on the latent between."""

    def __init__(self, vae: WanVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels_BCFHW: Tensor, noise_BCTHW: Tensor, level_B: Tensor) -> Tensor:
        vae = self.vae
        mean = vae.conv1(vae.encoder(pixels_BCFHW, Stream()))[:, : vae.config.z_dim]
        spread = mean.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
        noise = noise_BCTHW * spread * level_B.view(-1, 1, 1, 1, 1)
        return vae.decoder(vae.conv2(mean + noise.to(mean.dtype)), Stream()).float()


def train_vae(context: Context, minutes: float) -> None:
    clock = Clock(minutes, reserve=20)
    sizes, device = context.sizes, context.device
    rng = Generator().manual_seed(context.draws)
    noise_rng = Generator(device).manual_seed(context.draws)
    vae = first_vae(context).to(device)
    trip = Roundtrip(vae)

    def loss_at(fraction: float) -> Tensor:
        is_short = fraction < SHORT_PART
        batch = sizes.short_batch if is_short else sizes.vae_batch
        frames = sizes.short_frames if is_short else sizes.frames
        scenes = sample_scenes(batch, rng, context.world).to(device)
        pace = (TRAVEL_FRAMES - 1) / (sizes.frames - 1)
        pixels = render(scenes, sizes.side, sizes.side, frames, pace)
        if is_short:
            pixels = crop_around(pixels, scenes, sizes.short_side, rng)
        pixels[: batch // PADDED_SHARE, :, 1:] = 0.0
        side = pixels.shape[-1] // 8
        shape = (batch, vae.config.z_dim, (frames - 1) // 4 + 1, side, side)
        noise = torch.randn(shape, generator=noise_rng, device=device)
        level = torch.rand(batch, generator=noise_rng, device=device)
        level = level * (LATENT_NOISE if fraction > NOISE_FROM else 0.0)
        # Weights stay float32; the convolutions see them in the compute dtype.
        weights = {name: p.to(context.dtype) for name, p in trip.named_parameters()}
        inputs = (pixels.to(context.dtype), noise, level)
        return picture_loss(torch.func.functional_call(trip, weights, inputs), pixels)

    def save(averages: list[nn.Module]) -> None:
        save_weights(context.out / VAE, averages[0].state_dict())

    recipe = RECIPE if context.lr is None else replace(RECIPE, lr=context.lr)
    result = fit("vae", [vae], loss_at, recipe, clock, context.journal, save)
    trained = result.averages[0]
    assert isinstance(trained, WanVae), "the average of a VAE is one"
    finish(context, trained)


def first_vae(context: Context) -> WanVae:
    """An earlier command's, to go on from, else a new one."""
    if context.source is None or not (context.source / VAE).is_file():
        return new_vae(context.sizes, context.seed)
    vae = read_vae(context.source / VAE).train()
    for module in vae.modules():
        # New ones are the identity there and stay it.
        module.requires_grad_(not isinstance(module, AttentionBlock))
    return vae


def new_vae(sizes: Sizes, seed: int) -> WanVae:
    """Starts as a well-conditioned linear map: orthogonal kernels, and branches that add nothing.

    From PyTorch's own start the first hundreds of steps find no more than each clip's mean colour.
    """
    torch.manual_seed(seed)
    vae = WanVae(VaeConfig(sizes.vae_dim, sizes.vae_dim))
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.orthogonal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.residual[6].weight)
        elif isinstance(module, AttentionBlock):
            # Stays the identity: the model is then the same for a crop and for the whole.
            nn.init.zeros_(module.proj.weight)
            module.requires_grad_(False)
    return vae


def crop_around(pixels_BCFHW: Tensor, scenes: Scenes, side: int, rng: Generator) -> Tensor:
    """A square of `side` pixels from each clip, near the middle of its first object's path."""
    B, _, frames, height, _ = pixels_BCFHW.shape
    middle = scenes.start_BO2[:, 0] + scenes.step_BO2[:, 0] * (frames - 1) / 2
    jitter = torch.randint(-JITTER, JITTER + 1, (B, 2), generator=rng).to(middle)
    corner = (middle * height / UNIT + jitter - side / 2).round().long().clamp(0, height - side)
    reach = torch.arange(side, device=middle.device)
    x, y = (corner[:, axis, None] + reach for axis in (0, 1))
    rows = torch.arange(B, device=middle.device)[:, None, None]
    cut = pixels_BCFHW[rows, :, :, y[:, :, None], x[:, None, :]]  # B H W C F
    return cut.permute(0, 3, 4, 1, 2).contiguous()


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 of the pixels, more where they are coloured, plus a tenth of that of their differences."""
    saturation = (wanted.amax(dim=1, keepdim=True) - wanted.amin(dim=1, keepdim=True)) / 2
    loss = ((made - wanted).abs() * (1 + OBJECT_WEIGHT * saturation)).mean()
    for axis in (2, 3, 4):
        if made.shape[axis] > 1:
            loss = loss + 0.1 * F.l1_loss(made.diff(dim=axis), wanted.diff(dim=axis))
    return loss


@torch.no_grad()
def finish(context: Context, vae: WanVae) -> None:
    """Measure, fold, save, and look at what became of it."""
    sizes = context.sizes
    rng = Generator().manual_seed(context.seed + 1)
    scenes = sample_scenes(sizes.fold_clips, rng, context.world).to(context.device)
    half = copy.deepcopy(vae).to(context.dtype)
    means = []
    for start in range(0, len(scenes), sizes.chunk):
        pixels = context.render(scenes[start : start + sizes.chunk]).to(context.dtype)
        moments = half.conv1(half.encoder(pixels, Stream()))
        means.append(moments[:, : vae.config.z_dim].float())
    raw = torch.cat(means)
    std = raw.std(dim=(0, 2, 3, 4)).clamp_min(1e-4)
    fold_statistics(vae, raw.mean(dim=(0, 2, 3, 4)), std)
    save_weights(context.out / VAE, vae.state_dict())
    examine_vae(context)


@torch.no_grad()
def fold_statistics(vae: WanVae, mean_C: Tensor, std_C: Tensor) -> None:
    """In place; mean and std are those of the encoder's raw mean, measured before."""
    official_mean, official_std = torch.tensor([LATENT_MEAN, LATENT_STD]).to(mean_C)
    gain = official_std / std_C
    channels = slice(0, len(LATENT_MEAN))
    weight, bias = vae.conv1.weight, vae.conv1.bias
    weight[channels] *= gain.view(-1, 1, 1, 1, 1)
    bias[channels] = (bias[channels] - mean_C) * gain + official_mean
    # The decoder first undoes what the encoder now does last.
    weight, bias = vae.conv2.weight, vae.conv2.bias
    bias += weight[:, :, 0, 0, 0] @ (mean_C - official_mean / gain)
    weight /= gain.view(1, -1, 1, 1, 1)


@torch.no_grad()
def examine_vae(context: Context) -> dict[str, float]:
    """Scores of the saved file, as it will be shipped."""
    sizes = context.sizes
    vae = context.load_vae()
    world, rng = context.world, Generator().manual_seed(90_001)
    scenes = sample_scenes(sizes.exam_clips, rng, world, world.exam_split).to(context.device)
    pixels = context.render(scenes)
    latent = context.encode(vae, pixels)
    made = context.decode(vae, latent)
    scores = {
        "psnr": psnr(made, pixels),
        "judge": judge(made, scenes, world).scores()["all"],
        "judge_truth": judge(pixels, scenes, world).scores()["all"],
        "latent_mean": float(latent.mean(dim=(0, 2, 3, 4)).abs().max()),
        "latent_std_low": float(latent.std(dim=(0, 2, 3, 4)).min()),
        "latent_std_high": float(latent.std(dim=(0, 2, 3, 4)).max()),
    }
    context.journal.note("vae exam", **scores)
    rows = {}
    for index in range(min(4, len(scenes))):
        rows[f"truth {index}"], rows[f"vae {index}"] = pixels[index], made[index]
    save_sheet(rows, context.out / "sheet_vae.png")
    return scores
