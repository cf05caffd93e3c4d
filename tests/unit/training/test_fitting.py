from __future__ import annotations

import torch
from torch import Generator, nn

from lightx2v_core.wan.model import WanModel
from tests.conftest import fill
from training.bank import Bank
from training.denoising import Denoiser
from training.fitting import Recipe, make_optimizers
from training.muon import Muon, orthogonalised
from training.replay import Plain
from training.sizes import SMOKE
from training.teacher import flow_loss
from training.text import empty_rows, encode_rows, new_encoder
from training.vocabulary import CaptionRows, learn_pieces


def matrices() -> list[nn.Parameter]:
    rng = Generator().manual_seed(1)
    shapes = ((16, 32), (16, 32), (32, 16), (24, 24))
    return [nn.Parameter(torch.randn(*shape, generator=rng)) for shape in shapes]


def test_muon_on_stacked_matrices_equals_torchs_on_single_ones() -> None:
    ours, theirs = matrices(), matrices()
    stacked = Muon(ours, lr=1e-2, weight_decay=0.01)
    single = torch.optim.Muon(
        theirs, lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    rng = Generator().manual_seed(2)

    for _ in range(4):
        for our, their in zip(ours, theirs, strict=True):
            our.grad = torch.randn(our.shape, generator=rng)
            their.grad = our.grad.clone()
        stacked.step()
        single.step()

    for our, their in zip(ours, theirs, strict=True):
        # Both round to bfloat16 in between, in an order of products that may differ.
        torch.testing.assert_close(our, their, atol=2e-4, rtol=0)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    tall = torch.randn(3, 40, 20, generator=Generator().manual_seed(3))

    values = torch.linalg.svdvals(orthogonalised(tall).float())

    assert values.shape == (3, 20)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.4


def test_only_the_matrices_of_blocks_go_to_muon() -> None:
    model = WanModel(SMOKE.transformer(takes_image=False))

    adam, muon = make_optimizers([model], Recipe(lr=1.0, matrix_lr=1.0))

    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    in_adam = {id(p) for group in adam.param_groups for p in group["params"]}
    assert id(model.blocks[0].ffn[0].weight) in in_muon
    assert id(model.head.head.weight) in in_adam
    assert in_muon.isdisjoint(in_adam)
    assert len(in_muon | in_adam) == len(list(model.parameters()))


def small_bank() -> tuple[Bank, nn.Module]:
    rows = CaptionRows(learn_pieces(seed=3, count=300))
    text = new_encoder(SMOKE, rows.model, rows.size, seed=1).requires_grad_(False).transformer
    latent = torch.randn(3, *SMOKE.latent_shape, generator=Generator().manual_seed(4)).half()
    wordings = [f"{word} {number}" for word in ("red", "green", "blue") for number in "abcd"]
    ids = rows(wordings).to(torch.int16).unflatten(0, (3, 4))
    return Bank(latent, None, ids, torch.zeros(1, 4, *SMOKE.latent_shape[1:])), text


def test_captions_encoded_once_are_what_encoding_them_each_time_gives() -> None:
    bank, text = small_bank()

    batch = bank.with_states(text).sample(8, Generator().manual_seed(5), with_image=False)

    expected = encode_rows(text, batch.ids_BS)
    assert batch.text is not None
    # The bank keeps float16.
    torch.testing.assert_close(batch.text.states_BSE, expected.states_BSE, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.text.bias_BS, expected.bias_BS)


def test_stills_are_the_first_latent_frames_of_clips() -> None:
    bank, _ = small_bank()

    stills = bank.sample(8, Generator().manual_seed(6), with_image=False, frames=1)

    clips = bank.sample(8, Generator().manual_seed(6), with_image=False)
    assert stills.latent_BCTHW.shape[2] == 1
    assert torch.equal(stills.latent_BCTHW, clips.latent_BCTHW[:, :, :1])


def test_a_dropped_caption_leaves_no_trace_in_the_loss() -> None:
    bank, text = small_bank()
    batch = bank.with_states(text).sample(4, Generator().manual_seed(5), with_image=False)
    assert batch.text is not None
    empty = encode_rows(text, empty_rows(1, torch.device("cpu")))

    replaced = batch.text.replaced(torch.tensor([True, False, True, False]), empty)

    assert torch.equal(replaced.states_BSE[0], empty.states_BSE[0])
    assert torch.equal(replaced.bias_BS[2], empty.bias_BS[0])
    assert torch.equal(replaced.states_BSE[1], batch.text.states_BSE[1])


def test_a_detached_loss_comes_with_its_gradients() -> None:
    bank, text = small_bank()
    bank = bank.with_states(text)
    model = fill(WanModel(SMOKE.transformer(takes_image=False))).requires_grad_(True)
    empty = encode_rows(text, empty_rows(1, torch.device("cpu")))

    def loss_of() -> torch.Tensor:
        rng = Generator().manual_seed(7)
        batch = bank.sample(2, rng, with_image=False)
        return flow_loss(Denoiser(model, torch.float32), empty, batch, rng)

    expected = torch.autograd.grad(loss_of(), model.head.head.weight)[0]
    loss = Plain(loss_of)()

    assert not loss.requires_grad
    torch.testing.assert_close(model.head.head.weight.grad, expected)
