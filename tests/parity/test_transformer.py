"""Our transformer against diffusers' on the same small random weights, in float32."""

from __future__ import annotations

import pytest
import torch

from lightx2v_core.checkpoint.layouts import to_diffusers
from lightx2v_core.wan.config import WanConfig
from tests.conftest import VARIANTS, relative_error, tiny_inputs, tiny_model
from tests.tolerances import FLOAT32_PARITY


def reference_model(config: WanConfig) -> torch.nn.Module:
    transformers = pytest.importorskip("diffusers").WanTransformer3DModel
    return transformers(
        patch_size=(1, 2, 2),
        num_attention_heads=config.num_heads,
        attention_head_dim=128,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=256,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        cross_attn_norm=True,
        eps=1e-6,
        image_dim=1280 if config.clip_tokens else None,
        added_kv_proj_dim=config.dim if config.clip_tokens else None,
        pos_embed_seq_len=514 if config.clip_tokens == 514 else None,
    ).eval()


@torch.inference_mode()
def test_every_variant_equals_diffusers_in_float32(variant):
    config = VARIANTS[variant]
    ours, theirs = tiny_model(variant), reference_model(config)
    renamed = {to_diffusers(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(renamed, strict=True)
    inputs = tiny_inputs(config)
    clip = inputs["clip_BSE"]
    if config.clip_tokens == 514:  # diffusers wants the two images' tokens in separate batch rows
        clip = clip.reshape(-1, 257, 1280)

    actual = ours(**inputs)
    expected = theirs(
        hidden_states=inputs["x_BCTHW"],
        timestep=inputs["timestep_B"],
        encoder_hidden_states=inputs["text_BSE"],
        encoder_hidden_states_image=clip,
        return_dict=False,
    )[0]

    assert actual.dtype == torch.float32
    assert relative_error(actual, expected) <= FLOAT32_PARITY
