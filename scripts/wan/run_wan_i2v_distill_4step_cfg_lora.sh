#!/bin/bash
# A picture and words to video with Wan 2.1 14B and the distillation LoRA.

# Set both paths here, or in the environment: the folder of this pack, and the model folder.
lightx2v_path=${lightx2v_path:-}
model_path=${model_path:-}

source "${lightx2v_path:-$(dirname "$0")/../..}/scripts/base/base.sh"

"${python}" -m lightx2v_core.infer \
    --model_cls wan2.1_distill \
    --task i2v \
    --model_path "${model_path}" \
    --config_json "${config_json:-${lightx2v_path}/configs/distill/wan_i2v_distill_4step_cfg_lora.json}" \
    --prompt "${prompt:-A white cat in sunglasses sits on a surfboard at the beach and looks into the camera.}" \
    --image_path "${image_path:?Error: image_path is not set; give the start image}" \
    --save_result_path "${save_result_path:-${lightx2v_path}/save_results/wan_i2v_distill_4step_cfg_lora.mp4}" \
    "$@"
