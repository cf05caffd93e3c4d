#!/bin/bash
# The HTTP service, on port 8000 of this machine alone unless told otherwise.

# Set both paths here, or in the environment: the folder of this pack, and the model folder.
lightx2v_path=${lightx2v_path:-}
model_path=${model_path:-}

source "${lightx2v_path:-$(dirname "$0")/../..}/scripts/base/base.sh"

exec "${python}" -m lightx2v_core.api_server \
    --model_cls "${model_cls:-wan2.1_distill}" \
    --task "${task:-t2v}" \
    --model_path "${model_path}" \
    --config_json "${config_json:-${lightx2v_path}/configs/distill/wan_t2v_distill_4step_cfg.json}" \
    --port "${port:-8000}" \
    --nproc_per_node 1 \
    "$@"
