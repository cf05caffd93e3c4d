"""Makes lightx2v_latents.safetensors again, with LightX2V's own code on a CPU.

    python -m tests.parity.record_lightx2v LIGHTX2V_CHECKOUT

Its constants (sizes of T5 and VAE), its CUDA calls and the imports of what is not installed are
replaced; its arithmetic is not. Wants torchvision and the packages its runner imports.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import tempfile
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.layouts import T5, arrange, wide_picture, write_config
from tests.random_demo import random_files
from training.sizes import DEMO

THEIRS = Path(__file__).parent / "lightx2v_latents.safetensors"
SEED = 42
PROMPTS = {
    "t2v": "a large blue circle moving right on a dark background",
    "i2v": "a red circle moving right on a dark background",
}
# Plain PyTorch in place of its kernels.
ON_CPU = {
    **{f"{name}_type": "torch_sdpa" for name in ("self_attn_1", "cross_attn_1", "cross_attn_2")},
    "use_image_encoder": False,
    "rope_type": "torch_complex_rope",
    **dict.fromkeys(("layer_norm_type", "rms_norm_type", "modulate_type"), "torch"),
}


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    import_torchvision()
    pieces = load_file(THEIRS)["spiece_model"]
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        files = random_files(home, bytes(pieces.tolist()))
        folders = {task: arrange(home / task, task, files=files) for task in PROMPTS}
        vocabulary = load_file(files("text"))["token_embedding.weight"].shape[0]
        prepare(checkout, vocabulary)
        latents = {task: record(folder, task, home) for task, folder in folders.items()}
    save_file({**latents, "spiece_model": pieces}, THEIRS)


def bare(name: str, folder: Path | None = None, **inside: object) -> None:
    """A package without its __init__, which would import everything there is."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=folder is not None)
    if folder is not None:
        module.__path__ = [str(folder)]
    module.__dict__.update(inside)
    sys.modules[name] = module


def import_torchvision() -> None:
    """One built for CUDA registers kernels that a PyTorch for the CPU does not have."""
    register = torch.library.register_fake
    torch.library.register_fake = lambda *_, **__: lambda function: function
    import torchvision  # noqa: F401

    torch.library.register_fake = register


def prepare(checkout: Path, vocabulary: int) -> None:
    """Its modules, for a CPU, in float32, with the demo's sizes."""
    sys.path.insert(0, str(checkout))
    empty, cpu = torch.empty, torch.cpu
    bare("lightx2v", checkout / "lightx2v")
    bare("lightx2v.disagg", checkout / "lightx2v/disagg")
    bare("lightx2v.disagg.disagg_mixin", DisaggMixin=type("DisaggMixin", (), {}))
    from lightx2v_platform.base import global_var

    global_var.AI_DEVICE = global_var.PLATFORM = "cpu"
    torch.empty = lambda *sizes, pin_memory=False, **more: empty(*sizes, **more)
    torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor
    for name, made in {"empty_cache": None, "mem_get_info": (1 << 40, 1 << 40)}.items():
        setattr(cpu, name, lambda *_, made=made: made)
    cpu.memory_reserved = cpu.memory_allocated = lambda *_: 0
    from lightx2v.utils import envs

    for name in ("BF16", "bf16", "torch.bfloat16"):
        envs.DTYPE_MAP[name] = torch.float32
    os.environ["SENSITIVE_LAYER_DTYPE"] = "FP32"
    set_sizes(vocabulary)


def set_sizes(vocabulary: int) -> None:
    import lightx2v.models.input_encoders.hf.wan.t5.model as t5
    import lightx2v.models.runners.wan.wan_distill_runner  # noqa: F401
    import lightx2v.models.runners.wan.wan_runner as runner
    import lightx2v.models.video_encoders.hf.wan.vae as vae

    sizes = {"dim": DEMO.text_dim, "dim_attn": DEMO.text_dim, "dim_ffn": DEMO.text_ffn}
    layers = {"encoder_layers": DEMO.text_layers, "decoder_layers": DEMO.text_layers}
    heads = {"vocab_size": vocabulary, "num_heads": DEMO.text_heads}
    t5.umt5_xxl = partial(t5.umt5_xxl, **sizes, **layers, **heads)
    vae._video_vae = partial(vae._video_vae, dim=DEMO.vae_dim)
    plain = t5.T5EncoderModel

    class InFloat32(plain):
        def __init__(self, *given: object, dtype: object = None, **more: object) -> None:
            super().__init__(*given, dtype=torch.float32, **more)

    t5.T5EncoderModel = runner.T5EncoderModel = InFloat32
    t5.HuggingfaceTokenizer = Pieces


class Pieces:
    """Our tokenizer: transformers' class for UMT5 wants the folder that was released."""

    def __init__(self, name: str, seq_len: int | None = None, **_: object) -> None:
        from lightx2v_core.text.tokenizer import read_tokenizer

        self.tokenizer, self.length = read_tokenizer(Path(name), {}, Path(name)), seq_len

    def __call__(self, texts: list[str], **_: object) -> object:
        from lightx2v_core.text.clean import clean_prompt

        return self.tokenizer([clean_prompt(text) for text in texts], self.length)


def record(folder: Path, task: str, home: Path) -> torch.Tensor:
    """The latent that its runner hands to its VAE, C T H W."""
    from lightx2v.utils.input_info import init_empty_input_info, update_input_info_from_dict
    from lightx2v.utils.registry_factory import RUNNER_REGISTER
    from lightx2v.utils.set_config import set_config

    shape = {
        "dim": DEMO.dim,
        "ffn_dim": DEMO.ffn_dim,
        "freq_dim": 256,
        "num_heads": DEMO.dim // 128,
    }
    shape |= {"in_dim": 36 if task == "i2v" else 16, "out_dim": 16, "num_layers": DEMO.layers}
    shape |= {"text_len": 512, "text_dim": DEMO.text_dim, "eps": 1e-6, "model_type": task}
    (folder / "config.json").write_text(json.dumps(shape))
    assert (folder / T5).is_file()
    weights = str(folder / "distill_models/distill_model.safetensors")
    config = write_config(home / f"{task}.json", **ON_CPU, dit_original_ckpt=weights)
    image = str(wide_picture(home / "picture.png")) if task == "i2v" else ""
    asked: dict[str, Any] = {
        **{"model_cls": "wan2.1_distill", "task": task, "support_tasks": []},
        **{"model_path": str(folder), "config_json": str(config), "use_prompt_enhancer": False},
        **{"prompt": PROMPTS[task], "negative_prompt": "", "image_path": image, "seed": SEED},
        **{"save_result_path": None, "return_result_tensor": True, "target_shape": []},
    }
    settings = set_config(types.SimpleNamespace(**asked))
    settings["warmup"] = False
    info = init_empty_input_info(task, [])
    torch.set_grad_enabled(False)
    runner = RUNNER_REGISTER[settings["model_cls"]](settings)
    runner.init_modules()
    runner.model.to_cuda()
    kept, decode = [], runner.run_vae_decoder
    runner.run_vae_decoder = lambda latents: kept.append(latents.float().clone()) or decode(latents)
    update_input_info_from_dict(info, asked)
    runner.run_pipeline(info)
    print(task, tuple(kept[0].shape), float(kept[0].std()))
    return kept[0]


if __name__ == "__main__":
    main()
