from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from lightx2v_core.wan.model import WanModel
from lightx2v_core.wan.vae import VaeConfig, WanVae
from lightx2v_core.wan.vae_layers import Stream
from tests.conftest import fill
from training.autoencoder import crop_around, fold_statistics, new_vae
from training.captions import plain_prompt, stories
from training.denoising import STUDENT_SIGMAS, Denoiser
from training.files import widen_input
from training.sizes import SMOKE
from training.student import Paths, chord_loss
from training.text import TextStates, encode_rows, new_encoder, official_tensors
from training.vocabulary import CaptionRows, learn_pieces
from training.world import render, sample_scenes
from training.worlds import PLAIN, WIDE, World


def small_vae() -> WanVae:
    torch.manual_seed(5)
    return WanVae(VaeConfig(4, 4)).requires_grad_(False)


def raw_mean(vae: WanVae, pixels: Tensor) -> Tensor:
    return vae.conv1(vae.encoder(pixels, Stream()))[:, :16]


def test_folding_gives_unit_latents_and_leaves_the_round_trip_as_it_was() -> None:
    vae = small_vae()
    pixels = torch.rand(6, 3, 5, 32, 32, generator=Generator().manual_seed(6)) * 2 - 1
    raw = raw_mean(vae, pixels)
    before = vae.decoder(vae.conv2(raw), Stream()).clamp(-1, 1)

    fold_statistics(vae, raw.mean(dim=(0, 2, 3, 4)), raw.std(dim=(0, 2, 3, 4)))

    latent = vae.encode(pixels)
    torch.testing.assert_close(latent.mean(dim=(0, 2, 3, 4)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(latent.std(dim=(0, 2, 3, 4)), torch.ones(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(vae.decode(latent), before, atol=1e-3, rtol=0)


def test_a_new_vae_gives_a_crop_what_it_gives_the_whole() -> None:
    vae = new_vae(SMOKE, seed=1)

    frozen = [name for name, p in vae.named_parameters() if not p.requires_grad]

    assert frozen and all(".middle.1." in name for name in frozen)
    assert not any(vae.get_parameter(name).any() for name in frozen if "proj.weight" in name)


def test_a_crop_holds_the_object_of_its_clip() -> None:
    scenes = sample_scenes(16, Generator().manual_seed(3))
    pixels = render(scenes, 128, 128, 9)

    cut = crop_around(pixels, scenes, 64, Generator().manual_seed(1))

    middle = cut[:, :, 4]
    saturation = middle.amax(dim=1) - middle.amin(dim=1)
    assert cut.shape == (16, 3, 9, 64, 64)
    assert (saturation.flatten(1).amax(dim=1) > 0.5).all(), "no coloured pixel in some crop"


@pytest.mark.parametrize("world", [PLAIN, WIDE], ids=lambda world: world.name)
def test_short_rows_with_a_bias_equal_the_padded_512_positions(world: World) -> None:
    rows = CaptionRows(learn_pieces(seed=3, count=300, world=world), world)
    encoder = new_encoder(SMOKE, rows.model, rows.size, seed=1).requires_grad_(False)
    scenes = sample_scenes(200, Generator().manual_seed(4), world)
    longest = max(map(plain_prompt, stories(scenes)), key=len)
    prompts = ["a red circle moving right", longest, ""]
    model = fill(WanModel(SMOKE.transformer(takes_image=False)))
    x = torch.randn(3, *SMOKE.latent_shape, generator=Generator().manual_seed(8))
    sigma = torch.tensor([1.0, 0.8333, 0.4])

    short = Denoiser(model, torch.float32)(
        x, sigma, encode_rows(encoder.transformer, rows(prompts)), None
    )

    whole = model(x, 1000 * sigma, encoder.encode(prompts))
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=1e-4)


def test_a_new_text_encoder_keeps_its_weights_under_official_names() -> None:
    rows = CaptionRows(learn_pieces(seed=3, count=300))
    encoder = new_encoder(SMOKE, rows.model, rows.size, seed=1)

    tensors = official_tensors(encoder.transformer)

    assert len(tensors) == 2 + 10 * SMOKE.text_layers
    assert tensors["token_embedding.weight"].shape == (rows.size, SMOKE.text_dim)
    count = sum(tensor.numel() for tensor in tensors.values())
    assert count == sum(p.numel() for p in encoder.transformer.parameters())


def test_an_image_model_starts_as_the_text_model_it_came_from() -> None:
    model = fill(WanModel(SMOKE.transformer(takes_image=False)))
    wide = widen_input(model, SMOKE)
    rng = Generator().manual_seed(9)
    x, image = (torch.randn(1, c, *SMOKE.latent_shape[1:], generator=rng) for c in (16, 20))
    text, timestep = torch.randn(1, 8, SMOKE.text_dim, generator=rng), torch.tensor([900.0])

    velocity = wide(torch.cat((x, image), dim=1), timestep, text)

    torch.testing.assert_close(velocity, model(x, timestep, text))


class Chord:
    """Knows the paths by heart: the velocity that leads from each state to the next."""

    def __init__(self, states_KNCTHW: Tensor) -> None:
        self.states = states_KNCTHW.float()

    def __call__(
        self, x: Tensor, sigma_B: Tensor, text: TextStates, image: Tensor | None
    ) -> Tensor:
        sigmas = torch.tensor(STUDENT_SIGMAS)
        result = []
        for state, sigma in zip(x, sigma_B, strict=True):
            step = int((sigmas - sigma).abs().argmin())
            row = int((self.states[step] - state).abs().flatten(1).sum(1).argmin())
            drop = sigmas[step] - sigmas[step + 1]
            result.append((state - self.states[step + 1, row]) / drop)
        return torch.stack(result)


def test_the_chords_of_the_paths_are_the_students_optimum() -> None:
    rows = CaptionRows(learn_pieces(seed=3, count=300))
    text = new_encoder(SMOKE, rows.model, rows.size, seed=1).requires_grad_(False).transformer
    states = torch.randn(5, 3, *SMOKE.latent_shape, generator=Generator().manual_seed(10)).half()
    paths = Paths(states, encode_rows(text, rows(["a", "b", "c"])), None)

    for own in (False, True):
        loss = chord_loss(Chord(states), paths, 8, own, Generator().manual_seed(11))

        assert float(loss) < 1e-4
