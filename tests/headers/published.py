"""The published files, each with a header reconstructed from the code that writes it.

No published file was at hand: `written_by` names file, line and commit of the code that wrote such
a file, or that reads it where the writer is not public.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lightx2v_core.checkpoint.layouts import to_diffusers
from tests.headers.formats import (
    cast,
    clip,
    comfy_quant,
    extracted_lora,
    lightx2v_fp8,
    lightx2v_int8,
    nvfp4,
    pairs_only,
    prefixed,
    scaled_fp8,
    umt5,
)
from tests.headers.reconstruct import Header, reconstruct

X = "ModelTC/LightX2V at f8aee98b, "
SCALED = X + "tools/convert/converter.py:373-447 and tools/convert/quant/quant.py:26-80"
COMFY = "ComfyUI 0.18.1, "
KIJAI = "read by kijai/ComfyUI-WanVideoWrapper at 33175770, nodes_model_loading.py, loadmodel"
EXTRACTED = X + "tools/extract/lora_extractor.py:232-363"


@dataclass(frozen=True)
class Fixture:
    """One file: its folder and name, its header, who wrote it, and what is to be found in it."""

    label: str
    make: Callable[[], Header]
    written_by: str
    expected: str  # family task expert size scheme release preset, "-" for none or unknown
    dialect: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def note(self) -> str:
        return f"reconstructed from {self.written_by}"


T2V_13, T2V_21, I2V_21 = "wan2.1_t2v_1.3b", "wan2.1_t2v_14b", "wan2.1_i2v_14b"
FLF_21, I2V_22, T2V_22 = (
    "wan2.1_flf2v_14b",
    "wan2.2_i2v_a14b_high_noise",
    "wan2.2_t2v_a14b_low_noise",
)
L2V, SCALED_FP8, QUANT = "LightX2V", "ComfyUI (scaled_fp8)", "ComfyUI (comfy_quant)"
OFFICIAL = "Wan-Video/Wan2.1 wan/modules/model.py and wan/configs/*.py, as in reconstruct.py"
SAVED = COMFY + "comfy/supported_models_base.py:110 and comfy/sd.py save_checkpoint"
NVFP4 = (
    X + "tools/convert/quant/quant.py:128-145, read at lightx2v/common/ops/mm/mm_weight.py:966-1066"
)
COMFY_LORA = COMFY + "comfy_extras/nodes_lora_extract.py:66-84"
COMFY_FP8 = COMFY + "comfy/utils.py:1353-1414"
SEKO = X + "tools/extract/convert_lightning_to_x2v_lora.py:60-80"
T5 = X + "lightx2v/models/input_encoders/hf/wan/t5/model.py:190-483"
CLIP = X + "lightx2v/models/input_encoders/hf/wan/xlm_roberta/model.py:121-393"
SPLIT = X + "tools/convert/converter.py:860-890"
META = {"_quantization_metadata": '{"layers": {"blocks.0.ffn.0": {"format": "float8_e4m3fn"}}}'}
D, D7 = "distill-4step", "distill-4step-720p"

TRANSFORMERS = (
    Fixture(
        "Wan2.1-T2V-14B/diffusion_pytorch_model.safetensors",
        lambda: reconstruct(T2V_21, "F32"),
        OFFICIAL,
        "wan2.1 t2v - 14B fp32 base base-t2v-14b",
    ),
    Fixture(
        "Wan2.2-I2V-A14B/high_noise_model",
        lambda: reconstruct(I2V_22, "F32"),
        OFFICIAL,
        "wan2.2 i2v high 14B fp32 base base-i2v-a14b",
    ),
    Fixture(
        "Wan2.2-T2V-A14B/low_noise_model",
        lambda: reconstruct(T2V_22, "F32"),
        OFFICIAL,
        "wan2.2 t2v low 14B fp32 base base-t2v-a14b",
    ),
    Fixture(
        "x/wan2.1_t2v_14B_bf16.safetensors",
        lambda: reconstruct(T2V_21),
        SAVED,
        "wan2.1 t2v - 14B bf16 base base-t2v-14b",
    ),
    Fixture(
        "x/wan2.1_i2v_480p_14B_fp16.safetensors",
        lambda: prefixed(reconstruct(I2V_21, "F16"), "model.diffusion_model."),
        SAVED,
        "wan2.1 i2v - 14B fp16 base base-i2v-480p",
    ),
    Fixture(
        "x/wan2.1_flf2v_720p_14B_fp16.safetensors",
        lambda: reconstruct(FLF_21, "F16"),
        SAVED,
        "wan2.1 flf2v - 14B fp16 base base-flf2v",
    ),
    Fixture(
        "x/wan2.1_t2v_14B_fp8_e4m3fn.safetensors",
        lambda: cast(T2V_21),
        SAVED,
        "wan2.1 t2v - 14B fp8-cast base base-t2v-14b",
    ),
    Fixture(
        "x/wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
        lambda: scaled_fp8(I2V_22, "F16"),
        COMFY_FP8,
        "wan2.2 i2v high 14B fp8-tensor base base-i2v-a14b",
        SCALED_FP8,
    ),
    Fixture(
        "x/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        lambda: comfy_quant(T2V_22),
        COMFY_FP8,
        "wan2.2 t2v low 14B fp8-tensor base base-t2v-a14b",
        QUANT,
    ),
    Fixture(
        "x/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        lambda: lightx2v_fp8(T2V_22),
        COMFY_FP8,
        "wan2.2 t2v low 14B fp8-row base base-t2v-a14b",
        "ComfyUI (metadata)",
        META,
    ),
    Fixture(
        "I2V/Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
        lambda: scaled_fp8(I2V_22, "BF16"),
        KIJAI,
        "wan2.2 i2v high 14B fp8-tensor base base-i2v-a14b",
        SCALED_FP8,
    ),
    Fixture(
        "T2V/Wan2_1-T2V-14B_fp8_e4m3fn_scaled_KJ.safetensors",
        lambda: scaled_fp8(T2V_21, "BF16"),
        KIJAI,
        "wan2.1 t2v - 14B fp8-tensor base base-t2v-14b",
        SCALED_FP8,
    ),
    Fixture(
        "I2V/Wan2_1-I2V-14B-480p_fp8_e5m2_scaled_KJ.safetensors",
        lambda: cast(I2V_21, "F8_E5M2"),
        KIJAI,
        "wan2.1 i2v - 14B fp8-e5m2 base base-i2v-480p",
    ),
    Fixture(
        "x/wan2.1_t2v_14b_lightx2v_4step.safetensors",
        lambda: reconstruct(T2V_21),
        OFFICIAL,
        f"wan2.1 t2v - 14B bf16 distill {D}",
    ),
    Fixture(
        "x/wan2.1_i2v_480p_lightx2v_4step.safetensors",
        lambda: reconstruct(I2V_21),
        OFFICIAL,
        f"wan2.1 i2v - 14B bf16 distill {D}",
    ),
    Fixture(
        "x/wan2.1_i2v_720p_scaled_fp8_e4m3_lightx2v_4step.safetensors",
        lambda: lightx2v_fp8(I2V_21),
        SCALED,
        f"wan2.1 i2v - 14B fp8-row distill {D7}",
        L2V,
    ),
    Fixture(
        "x/wan2.1_t2v_14b_int8_lightx2v_4step.safetensors",
        lambda: lightx2v_int8(T2V_21),
        SCALED,
        f"wan2.1 t2v - 14B int8-row distill {D}",
        L2V,
    ),
    Fixture(
        "x/wan2.1_i2v_480p_scaled_fp8_e4m3_lightx2v_4step_comfyui.safetensors",
        lambda: scaled_fp8(I2V_21),
        SCALED,
        f"wan2.1 i2v - 14B fp8-tensor distill {D}",
        SCALED_FP8,
    ),
    Fixture(
        "x/wan2.1_i2v_480p_nvfp4_lightx2v_4step.safetensors",
        lambda: nvfp4(I2V_21),
        NVFP4,
        f"wan2.1 i2v - 14B nvfp4 distill {D}",
        L2V,
    ),
    Fixture(
        "x/wan2.1_t2v_1_3b_nvfp4_lightx2v_4step.safetensors",
        lambda: nvfp4(T2V_13),
        NVFP4,
        f"wan2.1 t2v - 1.3B nvfp4 distill {D}",
        L2V,
    ),
    Fixture(
        "x/Wan2_1-T2V-14B_nvfp4.safetensors",
        lambda: nvfp4(T2V_21, "comfy"),
        COMFY + "comfy/quant_ops.py (nvfp4)",
        "wan2.1 t2v - 14B nvfp4 - -",
        "ComfyUI",
    ),
    Fixture(
        "x/wan2.2_i2v_A14b_high_noise_lightx2v_4step.safetensors",
        lambda: reconstruct(I2V_22),
        OFFICIAL,
        f"wan2.2 i2v high 14B bf16 distill {D}",
    ),
    Fixture(
        "x/wan2.2_i2v_A14b_low_noise_scaled_fp8_e4m3_lightx2v_4step.safetensors",
        lambda: lightx2v_fp8(I2V_22),
        SCALED,
        f"wan2.2 i2v low 14B fp8-row distill {D}",
        L2V,
    ),
    Fixture(
        "x/wan2.2_i2v_A14b_high_noise_int8_lightx2v_4step_1030.safetensors",
        lambda: lightx2v_int8(I2V_22),
        SCALED,
        f"wan2.2 i2v high 14B int8-row distill-1030 {D}",
        L2V,
    ),
    Fixture(
        "x/wan2.2_i2v_A14b_low_noise_lightx2v_4step_720p_260412.safetensors",
        lambda: reconstruct(I2V_22),
        OFFICIAL,
        f"wan2.2 i2v low 14B bf16 distill-260412 {D7}",
    ),
    Fixture(
        "Wan2.2-Distill-Models/wan2.2_i2v_A14b_high_noise_int8_lightx2v_4step_split",
        lambda: lightx2v_int8(I2V_22),
        SPLIT,
        f"wan2.2 i2v high 14B int8-row distill {D}",
        L2V,
    ),
    Fixture(
        "distill_models/distill_model.safetensors",
        lambda: reconstruct(T2V_21),
        OFFICIAL,
        f"wan2.1 t2v - 14B bf16 step-cfg-distill {D}",
    ),
    Fixture(
        "Wan2.2-T2V-A14B-4steps-250928-dyno/Wan2.2-T2V-A14B-4steps-250928-dyno-high-lightx2v.safetensors",
        lambda: reconstruct(T2V_22),
        OFFICIAL,
        f"wan2.2 t2v high 14B bf16 lightning-250928-dyno {D}",
    ),
    Fixture(
        "x/self_forcing_fp8.safetensors",
        lambda: prefixed(lightx2v_fp8(T2V_13), "model."),
        SCALED,
        "wan2.1 t2v - 1.3B fp8-row self-forcing self-forcing-4step",
        L2V,
    ),
    Fixture(
        "diffusers/diffusion_pytorch_model.safetensors",
        lambda: {to_diffusers(k): v for k, v in reconstruct(FLF_21).items()},
        X + "tools/convert/converter.py:38-311",
        "wan2.1 flf2v - 14B bf16 - -",
    ),
    Fixture("x/model.safetensors", lambda: reconstruct(T2V_21), OFFICIAL, "- t2v - 14B bf16 - -"),
)
LORAS = (
    Fixture(
        "x/wan2.1_i2v_lora_rank64_lightx2v_4step.safetensors",
        lambda: extracted_lora(I2V_21, 64),
        EXTRACTED,
        f"wan2.1 i2v - 14B bf16 distill {D}",
    ),
    Fixture(
        "x/wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors",
        lambda: extracted_lora(T2V_21, 64),
        EXTRACTED,
        f"wan2.1 t2v - 14B bf16 distill {D}",
    ),
    Fixture(
        "x/wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022.safetensors",
        lambda: extracted_lora(I2V_21, 64),
        EXTRACTED,
        f"wan2.2 i2v low 14B bf16 distill-1022 {D}",
    ),
    Fixture(
        "x/wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors",
        lambda: pairs_only(T2V_22, 64),
        EXTRACTED,
        f"wan2.2 t2v high 14B bf16 distill-1217 {D}",
    ),
    Fixture(
        "Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/low_noise_model.safetensors",
        lambda: pairs_only(T2V_22, 64, "F32", alpha=True),
        SEKO,
        f"wan2.2 t2v low 14B fp32 lightning-seko-v1.1 {D}",
    ),
    Fixture(
        "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/high_noise_model.safetensors",
        lambda: pairs_only(I2V_22, 64, "F32", alpha=True),
        SEKO,
        f"wan2.2 i2v high 14B fp32 lightning-seko-v1 {D}",
    ),
    Fixture(
        "loras/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",
        lambda: pairs_only(T2V_21, 32, "F16"),
        COMFY_LORA,
        f"wan2.1 t2v - 14B fp16 step-cfg-distill {D}",
    ),
    Fixture(
        "Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16.safetensors",
        lambda: extracted_lora(I2V_21, 128),
        COMFY_LORA,
        f"- i2v - 14B bf16 step-cfg-distill {D}",
    ),
    Fixture(
        "Lightx2v/lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank256_bf16.safetensors",
        lambda: pairs_only(T2V_21, 256),
        COMFY_LORA,
        f"- t2v - 14B bf16 step-cfg-distill-v2 {D}",
    ),
    Fixture(
        "loras/wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors",
        lambda: pairs_only(I2V_22, 64),
        SAVED,
        f"wan2.2 i2v low 14B bf16 lightx2v-v1 {D}",
    ),
    Fixture(
        "loras/style.safetensors",
        lambda: pairs_only(T2V_13, 16),
        SAVED,
        "- - - 1.3B bf16 - -",
    ),
)
PARTS = (
    Fixture(
        "x/models_t5_umt5-xxl-enc-bf16.pth",
        lambda: umt5("official"),
        T5,
        "umt5 - - xxl bf16 umt5-xxl -",
    ),
    Fixture(
        "x/models_t5_umt5-xxl-enc-fp8.pth",
        lambda: umt5("official", "F8_E4M3", "weight_scale"),
        SCALED + "; :1133",
        "umt5 - - xxl fp8-row umt5-xxl -",
        L2V,
    ),
    Fixture(
        "x/models_t5_umt5-xxl-enc-int8.pth",
        lambda: umt5("official", "I8", "weight_scale"),
        SCALED + "; :1133",
        "umt5 - - xxl int8-row umt5-xxl -",
        L2V,
    ),
    Fixture(
        "x/umt5_xxl_fp16.safetensors",
        lambda: umt5("huggingface", "F16"),
        "transformers 4.57 models/umt5/modeling_umt5.py, UMT5EncoderModel",
        "umt5 - - xxl fp16 umt5-xxl -",
    ),
    Fixture(
        "x/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        lambda: umt5("huggingface", "F8_E4M3", "scale_weight") | {"scaled_fp8": ((0,), "F8_E4M3")},
        COMFY_FP8,
        "umt5 - - xxl fp8-tensor umt5-xxl -",
        SCALED_FP8,
    ),
    Fixture(
        "x/umt5-xxl-enc-fp8_e4m3fn.safetensors",
        lambda: umt5("official", "F8_E4M3"),
        KIJAI,
        "umt5 - - xxl fp8-cast umt5-xxl -",
    ),
    Fixture(
        "x/models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
        lambda: clip("official"),
        CLIP,
        "clip - - ViT-H/14 fp16 clip-vit-h -",
    ),
    Fixture(
        "x/models_clip_open-clip-xlm-roberta-large-vit-huge-14-fp8.pth",
        lambda: clip("official", "F8_E4M3", True),
        SCALED + "; :1134-1138",
        "clip - - ViT-H/14 fp8-row clip-vit-h -",
        L2V,
    ),
    Fixture(
        "x/clip_vision_h.safetensors",
        lambda: clip("huggingface"),
        "transformers 4.57 models/clip/modeling_clip.py, CLIPVisionModel",
        "clip - - ViT-H/14 fp16 clip-vit-h -",
    ),
)
