"""The rows of docs/messages.md: what other tools say, and the mistake that is made here.

python -m tests.messages.table    writes the table anew, with what is said now.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.messages import produce

PAGE = Path(__file__).parents[2] / "docs/messages.md"

WRAPPER = "kijai/ComfyUI-WanVideoWrapper"
COMFYUI = "Comfy-Org/ComfyUI"
LIGHTX2V = "ModelTC/LightX2V"
WAN2GP = "deepbeepmeep/Wan2GP"


class Row(NamedTuple):
    """`make` makes the mistake in an empty folder and returns what is said; `check` is a host test
    that needs a running ComfyUI and reproduces it too, or alone."""

    before: str
    seen: str
    make: Callable[[Path], str] | None
    check: str = ""
    told: str = ""  # where `check` alone reproduces it


GROUPS = {
    "LoRA": (
        Row(
            "lora key not loaded: diffusion_model.img_emb.proj.0.diff_b",
            f"{WRAPPER}#889",
            produce.image_keys_in_a_lora,
            "comfyuis_own_loader_names_every_key_that_is_left_out",
        ),
        Row(
            "lora key not loaded: lora_unet_blocks_22.self_attn.k.alpha",
            f"{WRAPPER}#869",
            produce.underscores_in_a_lora,
            "comfyuis_own_loader_names_every_key_that_is_left_out",
        ),
        Row(
            "Lora '…' contains unexpected module keys, it is likely that this Lora is for a "
            "different model : '['blocks.0.cross_attn.norm_k_img.diff'",
            f"{WAN2GP}#524",
            produce.clip_norms_in_a_lora,
        ),
        Row(
            "No compatible weight was found in Lora file 'loras\\high_noise_model.safetensors'.",
            f"{WAN2GP}#677",
            produce.lora_of_another_model,
        ),
        Row(
            "ValueError: Set LoRA node does not use low_mem_load and can't merge LoRAs, disable "
            "'merge_loras'.",
            f"{WRAPPER}#924",
            produce.lora_on_fp8,
        ),
    ),
    "Models, latents, pictures and prompts that do not go together": (
        Row(
            "Given groups=1, weight of size [1536, 16, 1, 2, 2], expected input[1, 36, 22, 60, "
            "104] to have 16 channels, but got 36 channels instead",
            f"{WRAPPER}#521",
            produce.start_image_on_t2v,
        ),
        Row(
            "…weight of size [5120, 36, 1, 2, 2], expected input[1, 68, 25, 40, 30] to have 36 "
            "channels, but got 68…",
            f"{WRAPPER}#2003",
            produce.more_channels_than_i2v_takes,
        ),
        Row(
            "…weight of size [48, 48, 1, 1, 1], expected input[1, 16, 21, 80, 80] to have 48 "
            "channels, but got 16…",
            f"{COMFYUI}#13670",
            produce.vae_of_5b,
            "the_vae_of_the_5b_model_fails_in_comfyui_with_numbers_of_channels",
        ),
        Row(
            "…weight of size [5120, 48, 1, 2, 2], expected input[1, 16, 21, 60, 104] to have 48 "
            "channels, but got 16…",
            f"{COMFYUI}#7781",
            produce.control_model,
        ),
        Row(
            "mat1 and mat2 shapes cannot be multiplied (77x768 and 4096x5120)",
            f"{COMFYUI}#7114",
            produce.clip_l_text,
            "a_wrong_text_encoder_fails_in_comfyui_with_the_sides_of_two_matrices",
        ),
        Row(
            "mat1 and mat2 shapes cannot be multiplied (10x3584 and 4096x5120)",
            f"{COMFYUI}#9774",
            produce.text_of_a_language_model,
        ),
        Row(
            "The size of tensor a (45) must match the size of tensor b (44) at non-singleton "
            "dimension 3",
            f"{WRAPPER}#106",
            produce.odd_height,
        ),
        Row(
            "shape '[5, 65, 8, 36, 8]' is invalid for input of size 759200",
            f"{COMFYUI}#8362",
            produce.sides_no_model_makes,
        ),
        Row(
            "Sizes of tensors must match except in dimension 0. Expected size 104 but got size 52 "
            "for tensor number 1 in the list.",
            f"{WRAPPER}#923",
            produce.latent_of_5b,
        ),
        Row(
            "… Expected size 21 but got size 22 for tensor number 1 in the list.",
            f"{WRAPPER}#1561",
            produce.other_frames,
        ),
    ),
    "Files": (
        Row(
            "Invalid T5 text encoder model, fp8 scaled is not supported by this node",
            f"{WRAPPER}#504",
            produce.scaled_fp8_text_encoder,
        ),
        Row(
            "KeyError: 'blocks.1.pos_embedding.embedding.weight'",
            f"{WRAPPER}#1030",
            produce.t5_not_umt5,
        ),
        Row(
            "clip vision file is invalid and does not contain a valid vision model.",
            f"{WRAPPER}#463",
            produce.vae_as_clip_vision,
        ),
        Row(
            "KeyError: 'patch_embedding.weight'",
            f"{LIGHTX2V}#731",
            produce.only_blocks,
            "blocks_alone_are_no_model_to_comfyui_either",
        ),
        Row(
            "Error while deserializing header: MetadataIncompleteBuffer",
            f"{COMFYUI}#3225",
            produce.half_a_file,
            "half_a_file_fails_in_comfyui_in_the_words_of_safetensors",
        ),
        Row(
            "Error while deserializing header: HeaderTooLarge",
            "kijai/ComfyUI-LuminaWrapper#21",
            produce.lfs_pointer,
            "half_a_file_fails_in_comfyui_in_the_words_of_safetensors",
        ),
    ),
    "Card, memory, kernels": (
        Row(
            "Can't import SageAttention: No module named 'sageattention'",
            f"{WRAPPER}#10",
            produce.no_sage,
        ),
        Row(
            "type fp8e4nv not supported in this architecture. The supported fp8 dtypes are "
            "('fp8e4b15', 'fp8e5')",
            f"{WRAPPER}#1030",
            produce.fp8_on_an_a100,
        ),
        Row(
            "fp8e4nv data type is not supported on CUDA arch < 89",
            f"{WRAPPER}#228",
            produce.fp8_on_an_a100,
        ),
        Row(
            "Cannot find a working triton installation. Either the package is not installed or it "
            "is too old.",
            "pytorch/pytorch#136361",
            produce.no_triton,
        ),
        Row(
            "Failed to find C compiler. Please specify via CC environment variable.",
            f"{WRAPPER}#32",
            produce.no_compiler,
        ),
        Row(
            "torch._dynamo hit config.recompile_limit (64)",
            f"{COMFYUI}#9289",
            produce.nothing_compiled,
        ),
        Row(
            "Unsupported CUDA architecture: sm120",
            f"{COMFYUI}#7494",
            produce.kernel_of_an_older_card,
        ),
        Row(
            "please install flash_attn3 first.",
            "ModelTC/ComfyUI-Lightx2vWrapper#4",
            produce.no_required_attention,
        ),
        Row(
            "Allocation on device / Got an OOM, unloading all loaded models.",
            f"{WRAPPER}#653",
            produce.card_too_small,
            "out_of_memory_twice_tells_the_cheapest_changes_where_the_host_shows_the_error",
        ),
        Row(
            "(no text; Reconnecting…, the process is gone at the low-noise load)",
            f"{COMFYUI}#9086",
            produce.ram_too_small,
        ),
        Row(
            "The generation of the video has encountered an error: it is likely that you have "
            "unsufficient RAM and / or Reserved RAM allocation should be reduced",
            f"{WAN2GP}#1653",
            produce.ram_too_small,
        ),
        Row(
            "Tried to unpin tensor not pinned by ComfyUI",
            f"{COMFYUI}#11775",
            produce.no_host_pinning,
        ),
        Row(
            "Expected all tensors to be on the same device, but found at least two devices, cpu "
            "and cuda:0!",
            f"{WRAPPER}#780",
            produce.moved_by_another_add_on,
        ),
    ),
    "The pack and ComfyUI": (
        Row(
            "cannot import name 'Wan22' from 'comfy.latent_formats'",
            f"{WRAPPER}#984",
            produce.old_comfyui,
            "an_older_comfyui_is_refused_with_one_sentence",
        ),
        Row(
            "cannot import name 'dict_to_device' from …",
            f"{WRAPPER}#879",
            produce.files_of_two_versions,
        ),
        Row(
            "No module named lightx2v.models.video_encoders",
            f"{LIGHTX2V}, pull request 420",
            produce.no_lightx2v_import,
        ),
        Row(
            "'NoneType' object has no attribute 'model' (CLIPVisionEncode)",
            f"{COMFYUI}#7401",
            None,
            "clip_vision_is_optional_and_an_i2v_model_runs_without_it",
            "clip_vision_output of Image To Video may be left open; for a model that has a use for "
            "it: this Wan 2.1 image-to-video model runs without its CLIP vision input",
        ),
        Row(
            "InterruptProcessingException (an error dialog)",
            "VraethrDalkr/ComfyUI-TripleKSampler#6",
            None,
            "an_interrupt_stops_between_two_blocks",
            "nothing: the interrupt passes through as it is",
        ),
    ),
}

INTRODUCTION = """# Messages

What goes wrong with Wan models elsewhere, in the words of that program, and what is said here of
the same mistake. The third column is what the code says today: `tests/messages` makes each mistake
on small files and compares. Where a row names a test, that test makes it in a real ComfyUI; one
with *comfyui* in its name has the first column from ComfyUI's own nodes too.
Written by `python -m tests.messages.table`.
"""


def rows() -> list[Row]:
    return [row for group in GROUPS.values() for row in group]


def said(row: Row, folder: Path) -> str:
    text = row.told if row.make is None else row.make(folder)
    return text.replace(str(folder) + "/", "")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def line(row: Row, text: str) -> str:
    test = f"`{row.check}`" if row.check else ""
    return f"| {cell(row.before)} | {row.seen} | {cell(text)} | {test} |"


def page() -> str:
    parts = [INTRODUCTION]
    for title, group in GROUPS.items():
        head = f"## {title}\n\n| Elsewhere | Seen in | Here | Test in ComfyUI |\n|---|---|---|---|"
        lines = []
        for row in group:
            with tempfile.TemporaryDirectory() as folder:
                lines.append(line(row, said(row, Path(folder))))
        parts.append("\n".join((head, *lines)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
