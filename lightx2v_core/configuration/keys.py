"""Every key of LightX2V's configurations for Wan, and what becomes of it here.

Collected from the code and configs/ of ModelTC/LightX2V at f8aee98b (2026-08-21), and from older
versions of its four documented distill configurations. docs/lightx2v.md is made from this table.
"""

from __future__ import annotations

from typing import NamedTuple

READ, MAPPED, IGNORED, NOT_YET = "read", "mapped", "ignored", "not yet"
FATES = {
    READ: "means here what it means there",
    MAPPED: "means something near to it here",
    IGNORED: "has no effect here",
    NOT_YET: "is refused where it asks for something",
}


class Key(NamedTuple):
    """`form` is the kind of value (see FORMS in read.py); `what` a phrase for tables and notes."""

    fate: str
    form: str
    what: str


_SHAPES = "sizes of the model are read from the tensors of its file"
_OTHER_KERNEL = "the same function by another kernel; the fastest that runs here is taken"
_CACHING = "only with feature_caching"
_MEMORY = (
    "memory is planned from true sizes: what fits stays on the card, the rest streams; --vram_gb "
    "limits it"
)
_ATTENTION = (
    "sage_attn*: SageAttention where it is installed; torch_sdpa: PyTorch's; every other name: "
    "the exact attention that runs here"
)
_SPARSE = "settings of a sparse attention, in place of which the exact one is computed"
_ENCODER = "chooses the file by its first part; weights become full ones while loading"
_PARALLEL = "several GPUs are not used yet: the same frames come from one"
_OTHER_MODELS = "of another model family"

_TABLE: tuple[tuple[str, str, str, str], ...] = (
    # Schedule and guidance.
    ("infer_steps", READ, "count", "number of steps where there is no denoising_step_list"),
    ("denoising_step_list", READ, "numbers", "the steps, before shift; decides their number"),
    ("sample_shift", READ, "number", "shift of the schedule"),
    ("enable_cfg", READ, "flag", "CFG; false for every distilled model"),
    ("sample_guide_scale", READ, "scale", "CFG scale, only with enable_cfg; of a pair both equal"),
    ("boundary_step_index", READ, "count", "steps of the high-noise expert"),
    ("boundary", IGNORED, "any", "boundary_step_index decides for distilled experts"),
    ("scheduler_type", READ, "text", "WanStepDistillScheduler, for model_cls wan2.1"),
    ("num_train_timesteps", IGNORED, "any", "1000 in every Wan model"),
    ("sample_solver", IGNORED, "any", "Euler on the distilled list, as LightX2V at f8aee98b"),
    ("enable_dynamic_cfg", NOT_YET, "flag", "needs a model with guidance_embedding tensors"),
    ("cfg_scale", IGNORED, "any", "only with enable_dynamic_cfg"),
    ("seed", READ, "count", "where the command line gives none"),
    # Size of the video.
    ("target_height", READ, "count", "height, or with target_width the area of a start image"),
    ("target_width", READ, "count", "width, see target_height"),
    ("target_video_length", READ, "count", "frames, 4n + 1"),
    ("fps", READ, "count", "frames per second of the file; 16 unless given"),
    ("target_fps", IGNORED, "any", "of models driven by sound; use fps"),
    ("resize_mode", READ, "text", "how a start image decides the size"),
    ("resolution", READ, "text", "480p, 540p or 720p, for resize_mode adaptive"),
    ("bucket_shape", READ, "object", "sizes by aspect ratio, for resize_mode"),
    ("fixed_area", READ, "text", "480p or 720p, for resize_mode"),
    ("fixed_shape", READ, "numbers", "height and width, for resize_mode fixed_shape"),
    ("max_area", IGNORED, "any", "of the 5B model"),
    ("video_duration", IGNORED, "any", "of models driven by sound"),
    ("text_len", READ, "count", "512, which every Wan model has"),
    ("changing_resolution", NOT_YET, "flag", "early steps at a lower resolution"),
    ("changing_resolution_steps", IGNORED, "any", "only with changing_resolution"),
    ("resolution_rate", IGNORED, "any", "only with changing_resolution"),
    ("video_frame_interpolation", NOT_YET, "object", "interpolate the finished file instead"),
    ("video_super_resolution", NOT_YET, "object", "enlarge the finished file instead"),
    # The transformer and its LoRAs.
    ("dit_original_ckpt", READ, "path", "file or folder of the transformer"),
    ("dit_quantized", READ, "flag", "take the quantised transformer"),
    ("dit_quantized_ckpt", READ, "path", "its file or folder"),
    ("dit_quant_scheme", MAPPED, "text", "number format; the multiplying kernel is chosen here"),
    ("dit_distill_ckpt", READ, "path", "older name of dit_original_ckpt for distilled models"),
    ("mm_config", MAPPED, "object", "older form of dit_quantized, dit_quant_scheme and more"),
    ("weight_auto_quant", READ, "flag", "quantise a full file while loading: fp8 and int8"),
    ("high_noise_original_ckpt", READ, "path", "the high-noise expert"),
    ("low_noise_original_ckpt", READ, "path", "the low-noise expert"),
    ("high_noise_quantized_ckpt", READ, "path", "the quantised high-noise expert"),
    ("low_noise_quantized_ckpt", READ, "path", "the quantised low-noise expert"),
    ("lora_configs", READ, "loras", "LoRAs: path, strength, and name of the expert"),
    ("lora_path", READ, "paths", "older form of lora_configs: one path or several"),
    ("strength_model", READ, "number", "strength of lora_path"),
    ("lora_dynamic_apply", MAPPED, "flag", "a LoRA is computed exactly beside the weights always"),
    ("adapter_model_path", NOT_YET, "path", "adapter files of models driven by sound"),
    ("model_cls", MAPPED, "text", "the command line decides"),
    ("task", MAPPED, "text", "the command line decides"),
    ("model_path", MAPPED, "text", "the command line decides"),
    # Text encoder, CLIP, VAE.
    ("t5_original_ckpt", READ, "path", "text encoder"),
    ("t5_quantized", READ, "flag", "take the quantised text encoder"),
    ("t5_quantized_ckpt", READ, "path", "its file"),
    ("t5_quant_scheme", MAPPED, "text", _ENCODER),
    (
        "t5_tokenizer_path",
        READ,
        "path",
        "tokenizer; else google/umt5-xxl, or in the encoder's file",
    ),
    ("use_image_encoder", READ, "flag", "false: no CLIP, as Wan 2.2 has none"),
    ("clip_original_ckpt", READ, "path", "CLIP image encoder"),
    ("clip_quantized", READ, "flag", "take the quantised CLIP"),
    ("clip_quantized_ckpt", READ, "path", "its file"),
    ("clip_quant_scheme", MAPPED, "text", _ENCODER),
    (
        "use_31_block",
        IGNORED,
        "any",
        "Wan reads the states after 31 blocks; nothing else is offered",
    ),
    ("clip_attn_type", IGNORED, "any", _OTHER_KERNEL),
    ("clip_precast_patch_input", IGNORED, "any", "of the precision there"),
    ("vae_path", READ, "path", "VAE"),
    ("vae_name", READ, "text", "file name to search for the VAE by"),
    ("use_lightvae", READ, "flag", "search lightvaew2_1; widths are read from the file"),
    ("lightvae_pruning_rate", IGNORED, "any", _SHAPES),
    ("lightvae_encoder_path", NOT_YET, "path", "of the 5B model"),
    ("lightvae_encoder_vae_pth", NOT_YET, "path", "of the 5B model"),
    ("use_tae", READ, "flag", "decode with a tiny VAE"),
    ("tae_path", READ, "path", "its file; else taew2_1"),
    ("need_scaled", MAPPED, "flag", "by the file's name: lighttaew2_1 needs it, taew2_1 does not"),
    ("vae_type", IGNORED, "any", "the file tells"),
    ("vae_dtype", IGNORED, "any", "bf16 on a card that has it, else fp16; fp32 on a CPU"),
    ("vae_weight_dtype", IGNORED, "any", "see vae_dtype"),
    ("use_stream_vae", IGNORED, "any", "the VAE always streams through time"),
    # Attention and kernels.
    ("self_attn_1_type", MAPPED, "text", _ATTENTION),
    ("cross_attn_1_type", MAPPED, "text", "one attention for all, by self_attn_1_type"),
    ("cross_attn_2_type", MAPPED, "text", "one attention for all, by self_attn_1_type"),
    ("attention_type", MAPPED, "text", "older name of self_attn_1_type"),
    ("layer_norm_type", IGNORED, "any", _OTHER_KERNEL),
    ("rms_norm_type", IGNORED, "any", _OTHER_KERNEL),
    ("tp_rms_norm_type", IGNORED, "any", _OTHER_KERNEL),
    ("tp_mm_type", IGNORED, "any", _OTHER_KERNEL),
    ("modulate_type", IGNORED, "any", _OTHER_KERNEL),
    ("rope_type", IGNORED, "any", _OTHER_KERNEL),
    ("causal_rope_type", IGNORED, "any", _OTHER_KERNEL),
    ("mxfp8_fuse_enable", IGNORED, "any", _OTHER_KERNEL),
    ("nvfp4_ffn_split_n_workaround", IGNORED, "any", _OTHER_KERNEL),
    ("weight_scale_granularity", IGNORED, "any", "the scales in the file tell"),
    ("use_compile", IGNORED, "any", _OTHER_KERNEL),
    ("compile", IGNORED, "any", _OTHER_KERNEL),
    ("compile_shapes", IGNORED, "any", _OTHER_KERNEL),
    ("general_sparse_attn_setting", IGNORED, "any", _SPARSE),
    ("dynamic_sparse_attn_setting", IGNORED, "any", _SPARSE),
    ("draft_attn_sparsity_ratio", IGNORED, "any", _SPARSE),
    ("nbhd_attn_setting", IGNORED, "any", _SPARSE),
    ("rainfusion", IGNORED, "any", _SPARSE),
    ("rainfusion_attn_setting", IGNORED, "any", _SPARSE),
    ("sol_attn_setting", IGNORED, "any", _SPARSE),
    ("sparge", IGNORED, "any", _SPARSE),
    ("sparge_ckpt", IGNORED, "any", _SPARSE),
    ("sparge_attn_setting", IGNORED, "any", _SPARSE),
    ("sparse_type", IGNORED, "any", _SPARSE),
    ("spas_flash_attn4_setting", IGNORED, "any", _SPARSE),
    ("spas_sage_attn2_setting", IGNORED, "any", _SPARSE),
    ("spas_sage_attn3_setting", IGNORED, "any", _SPARSE),
    ("svg_sparsity", IGNORED, "any", _SPARSE),
    ("svg_context_length", IGNORED, "any", _SPARSE),
    ("svg_num_sampled_rows", IGNORED, "any", _SPARSE),
    ("svg_sample_mse_max_row", IGNORED, "any", _SPARSE),
    # Memory.
    ("cpu_offload", MAPPED, "flag", _MEMORY),
    ("offload_granularity", MAPPED, "text", _MEMORY),
    ("offload_ratio", MAPPED, "number", _MEMORY),
    ("t5_cpu_offload", MAPPED, "flag", _MEMORY),
    ("clip_cpu_offload", MAPPED, "flag", _MEMORY),
    ("vae_cpu_offload", MAPPED, "flag", _MEMORY),
    ("t5_offload_granularity", MAPPED, "text", _MEMORY),
    ("lazy_load", MAPPED, "flag", _MEMORY),
    ("t5_lazy_load", MAPPED, "flag", _MEMORY),
    ("unload_modules", MAPPED, "flag", _MEMORY),
    ("num_disk_workers", MAPPED, "count", _MEMORY),
    ("clean_cuda_cache", MAPPED, "flag", _MEMORY),
    ("empty_cache_min_free_gib", MAPPED, "number", _MEMORY),
    ("empty_cache_min_reclaimable_gib", MAPPED, "number", _MEMORY),
    ("checkpoint_mmap", MAPPED, "flag", _MEMORY),
    ("use_tiling_vae", MAPPED, "flag", "the VAE tiles where the whole picture does not fit"),
    ("vae_offload_cache", MAPPED, "flag", "the VAE tiles where the whole picture does not fit"),
    ("rope_chunk", MAPPED, "flag", _MEMORY),
    ("rope_chunk_size", MAPPED, "count", _MEMORY),
    ("rotary_chunk", MAPPED, "flag", _MEMORY),
    ("rotary_chunk_size", MAPPED, "count", _MEMORY),
    ("use_bfloat16", IGNORED, "any", "bf16 on a card that has it, else fp16; fp32 on a CPU"),
    ("convert_model_dtype", IGNORED, "any", "bf16 on a card that has it, else fp16; fp32 on a CPU"),
    ("weight_dtype", IGNORED, "any", "bf16 on a card that has it, else fp16; fp32 on a CPU"),
    # Several GPUs and machines.
    ("parallel", NOT_YET, "parallel", _PARALLEL),
    ("seq_parallel", IGNORED, "any", _PARALLEL),
    ("cfg_parallel", IGNORED, "any", _PARALLEL),
    ("tensor_parallel", IGNORED, "any", _PARALLEL),
    ("parallel_attn_type", IGNORED, "any", _PARALLEL),
    ("parallel_vae", IGNORED, "any", _PARALLEL),
    ("load_from_rank0", IGNORED, "any", _PARALLEL),
    ("disagg_mode", NOT_YET, "text", "encoder, transformer and decoder on machines of their own"),
    ("disagg_config", IGNORED, "any", "only with disagg_mode"),
    ("sub_servers", IGNORED, "any", "other services are not called; the prompt is used as it is"),
    # Caching between steps and requests.
    ("feature_caching", NOT_YET, "text", "NoCaching, which four steps want anyway"),
    ("teacache_thresh", IGNORED, "any", _CACHING),
    ("coefficients", IGNORED, "any", _CACHING),
    ("use_ret_steps", IGNORED, "any", _CACHING),
    ("magcache_calibration", IGNORED, "any", _CACHING),
    ("magcache_K", IGNORED, "any", _CACHING),
    ("magcache_ratios", IGNORED, "any", _CACHING),
    ("magcache_retention_ratio", IGNORED, "any", _CACHING),
    ("magcache_thresh", IGNORED, "any", _CACHING),
    ("residual_diff_threshold", IGNORED, "any", _CACHING),
    ("downsample_factor", IGNORED, "any", _CACHING),
    ("enable_reuse", IGNORED, "any", "encoders are computed anew for each request"),
    ("use_prompt_enhancer", IGNORED, "any", "the prompt is used as it is"),
    ("warmup", IGNORED, "any", "the first request is the warm-up"),
    ("do_mm_calib", NOT_YET, "flag", "calibration of quantised models"),
    ("ar_config", NOT_YET, "object", "videos in causal chunks (self-forcing)"),
    ("audio_mux_prefer_copy", IGNORED, "any", "of models with sound"),
    ("dummy_model", NOT_YET, "flag", "a model without weights"),
    # What the model's own config.json brings along.
    ("dim", IGNORED, "any", _SHAPES),
    ("ffn_dim", IGNORED, "any", _SHAPES),
    ("freq_dim", IGNORED, "any", _SHAPES),
    ("text_dim", IGNORED, "any", _SHAPES),
    ("in_dim", IGNORED, "any", _SHAPES),
    ("out_dim", IGNORED, "any", _SHAPES),
    ("num_heads", IGNORED, "any", _SHAPES),
    ("num_layers", IGNORED, "any", _SHAPES),
    ("num_channels_latents", IGNORED, "any", _SHAPES),
    ("patch_size", IGNORED, "any", _SHAPES),
    ("vae_stride", IGNORED, "any", _SHAPES),
    ("vae_scale_factor", IGNORED, "any", _SHAPES),
    ("model_type", IGNORED, "any", _SHAPES),
    ("use_img_emb", IGNORED, "any", _SHAPES),
    ("eps", IGNORED, "any", "the same in every Wan model"),
    ("qk_norm", IGNORED, "any", "the same in every Wan model"),
    ("cross_attn_norm", IGNORED, "any", "the same in every Wan model"),
    ("window_size", IGNORED, "any", "the same in every Wan model"),
    ("log_scale", IGNORED, "any", _OTHER_MODELS),
    ("refer_offset_t", IGNORED, "any", _OTHER_MODELS),
    ("refer_offset_h", IGNORED, "any", _OTHER_MODELS),
    ("refer_offset_w", IGNORED, "any", _OTHER_MODELS),
    ("refer_stride", IGNORED, "any", _OTHER_MODELS),
    ("_class_name", IGNORED, "any", _SHAPES),
    ("_diffusers_version", IGNORED, "any", _SHAPES),
)

KEYS = {name: Key(fate, form, what) for name, fate, form, what in _TABLE}
# What the keys of an entry of lora_configs are.
LORA_KEYS = {
    "path": Key(READ, "path", "the file"),
    "strength": Key(READ, "number", "1 unless given"),
    "name": Key(READ, "text", "high_noise_model or low_noise_model, of two experts"),
    "alpha": Key(IGNORED, "any", "the file's own alpha counts, as in LightX2V's code"),
}


def key_table() -> list[str]:
    """The rows of the table in docs/lightx2v.md, in the order of this file."""
    rows = [f"| `{name}` | {key.fate} | {key.what} |" for name, key in KEYS.items()]
    return ["| Key | Here | |", "|---|---|---|", *rows]
