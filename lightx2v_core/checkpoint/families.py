"""Wan models and add-ons this version does not run, by the tensors only they have.

Sources of the names: [C] ComfyUI 0.18.1 comfy/model_detection.py:493-543; [K] loadmodel in
nodes_model_loading.py of kijai/ComfyUI-WanVideoWrapper at 33175770; [L] ModelTC/LightX2V at
f8aee98b, lightx2v/models/networks/wan/weights/pre_weights.py:139-178.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# (pattern at the start of an official name, the family); the first that any tensor has wins.
MARKS = (
    (r"vace_(patch_embedding|blocks)\.", "VACE"),  # C K
    (r"control_adapter\.", "Fun Camera"),  # C K
    (r"patch_embedding_pose\.", "SCAIL"),  # C K
    (r"condition_embedding_align\.", "SteadyDancer"),  # K
    (r"audio_proj\.audio_proj_glob_1\.", "HuMo"),  # C K
    (r"(casual_audio_encoder|audio_injector|cond_encoder)\.", "S2V"),  # C K
    (r"pose_patch_embedding\.|face_adapter\.", "Animate"),  # C K L
    (r"ref_conv\.", "Fun Control"),  # C K
    (r"(multitalk_)?audio_proj\.proj1\.", "MultiTalk or InfiniteTalk"),  # K
    (r"blocks\.\d+\.audio_cross_attn\.", "MultiTalk or InfiniteTalk"),  # K
    (r"blocks\.\d+\.(self_attn\.ref_adapter|cross_attn\.ip_adapter)\.", "Lynx"),  # K
    (r"(proj_model|audio_model|video_model)\.", "FantasyTalking or Ovi"),  # K
    (r"blocks\.\d+\.cross_attn\.(emo_k_proj|ip_adapter_single_stream_)", "FlashPortrait"),  # K
    (r"blocks\.\d+\.(cam_encoder|projector)\.", "ReCamMaster"),  # K
    (r"blocks\.\d+\.control_blocks_dense\.", "LongVie 2"),  # K
    (r"text_projection\.", "Bindweave"),  # K
    (r"image_to_cond\.", "One-to-All"),  # K
    (r"LQ_proj_in\.", "FlashVSR"),  # K
    (r"add_conv_in\.", "extra-latent"),  # K
    (r"fps_embedding\.", "SkyReels V2 diffusion-forcing"),  # K
    (r"guidance_embedding\.", "dynamic-CFG distill"),  # L
    (r"time_embedding_r\.", "mean-flow distill"),  # L
)
LONGCAT_DIM = 4096  # K

# (word in a file's name, family): their headers are those of plain T2V or I2V, or may be.
NAMED = (
    (r"vace", "VACE"),
    (r"phantom", "Phantom"),
    (r"sky_?reels", "SkyReels"),
    (r"fun[ _.-](inp|control|camera|a14b|reward)", "Fun"),
    (r"animate", "Animate"),
    (r"s2v", "S2V"),
    (r"humo", "HuMo"),
    (r"(multi|infini(te)?)_?talk", "MultiTalk or InfiniteTalk"),
    (r"recam_?master", "ReCamMaster"),
    (r"lynx", "Lynx"),
    (r"bindweave", "Bindweave"),
    (r"scail", "SCAIL"),
    (r"causvid|causal", "CausVid"),
    (r"self[ _-]?forcing", "Self-Forcing"),
    (r"nvfp4[ _-]sparse", "sparse-attention"),
)
# Of these the name tells more than the header: they load, and what they lack here is said.
RUNS_AS = {
    "Phantom": "it runs as plain T2V, without reference pictures",
    "SkyReels": "it runs as the plain model its header shows, without diffusion forcing",
    "Fun": "it runs as the plain model its header shows, without control inputs",
    "CausVid": "it was made for chunks of frames in causal order, and runs here as a whole clip",
    "Self-Forcing": "it was made for chunks of frames in causal order, and runs here as a whole "
    "clip",
    "sparse-attention": "it was made for sparse attention (0.9 left out), and runs here with all "
    "of it",
}


def other_family(names: Iterable[str], dim: int = 0) -> str | None:
    """The family this version does not run that tensors of these official names belong to."""
    names = list(names)
    for pattern, family in MARKS:
        matches = re.compile(pattern).match
        if any(matches(name) for name in names):
            return family
    return "LongCat" if dim == LONGCAT_DIM else None


def add_on_family(names: Iterable[str]) -> str | None:
    """The same for a file without a transformer: only by tensors that are inside Wan's blocks."""
    names = [name for name in names if name.startswith(("vace_", "blocks."))]
    return other_family(names)


def named_family(name: str) -> str | None:
    """The family a file's own name speaks of, in lower case."""
    return next(
        (family for word, family in NAMED if re.search(rf"(?<![a-z0-9]){word}(?![a-z])", name)),
        None,
    )
