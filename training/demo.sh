#!/usr/bin/env bash
# The demo family: training/demo.sh WORK [base|models|all], from the project's root, on several GPUs.
# `base` trains text encoder and VAE, `models` the two transformers on them and all that comes of
# them. What is worth keeping is in WORK/all at the end.
#   VAE_GPUS=0,1 T2V_GPUS=0,1 I2V_GPUS=2   several GPUs train one model together
#   WORLD=wide                              what the clips show
#   KEEP=DIR                                its VAE and text encoder instead of new ones; teachers
#                                           that lie there too are where the new ones begin
#   START=DIR                               its VAE is where the new one begins
#   TEACHER_MINUTES=8                       and likewise of the other stages, see below
#   IMAGE_MINUTES=10 and likewise           those of the image model, where they are to differ
#   TURNS=1                                 the text-to-video teacher has all of T2V_GPUS first, then
#                                           it is distilled on one beside the image model
#   PACKAGE=0                               no scores at the end; the family cannot be shipped without
#   EXTRA=--smoke COMPILE=off               further arguments of training.run
set -u
work=$1 part=${2:-all}
python=${PYTHON:-python3}
world=${WORLD:-wide}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

run() { # GPUS FOLDER ARGUMENTS...
    local gpus=$1 out=$work/$2 count
    shift 2
    mkdir -p "$out"
    count=$(tr ',' '\n' <<< "$gpus" | wc -l)
    local start=("$python" -m training.run)
    if [ "$count" -gt 1 ]; then
        start=("$python" -m torch.distributed.run --nproc-per-node "$count" --master-port "$((29500 + ${gpus%%,*}))" -m training.run)
    fi
    CUDA_VISIBLE_DEVICES=$gpus PYTHONUNBUFFERED=1 "${start[@]}" \
        --world "$world" --out "$out" --compile "${COMPILE:-on}" ${EXTRA:-} "$@" >> "$out/log.txt" 2>&1
}

t2v=${T2V_GPUS:-0} i2v=${I2V_GPUS:-1}
vae=${VAE_GPUS:-$t2v}
first=${t2v%%,*} second=${i2v%%,*}
mkdir -p "$work/base" "$work/all"

if [ -n "${KEEP:-}" ]; then
    cp "$KEEP/demo_vae.safetensors" "$KEEP/demo_umt5.safetensors" "$work/base"
    for teacher in "$KEEP"/teacher_*.safetensors; do [ ! -f "$teacher" ] || cp "$teacher" "$work/base"; done
elif [ "$part" != models ]; then
    run "$second" text text:"${TEXT_MINUTES:-0.8}" &
    run "$vae" vae ${START:+--from "$START"} vae:"${VAE_MINUTES:-7.5}" &
    wait
    cp "$work/vae/demo_vae.safetensors" "$work/text/demo_umt5.safetensors" "$work/base"
fi
if [ "$part" != base ]; then
    teacher=(bank:"${BANK_MINUTES:-0.9}" t2v:"${TEACHER_MINUTES:-8}")
    distilled=(t2v-student:"${STUDENT_MINUTES:-2}" t2v-dmd:"${DMD_MINUTES:-4.6}")
    if [ "${TURNS:-0}" = 1 ]; then
        run "$t2v" t2v --from "$work/base" "${teacher[@]}"
        run "$first" t2v --from "$work/base" bank:"${SECOND_BANK_MINUTES:-0.5}" "${distilled[@]}" &
    else
        run "$t2v" t2v --from "$work/base" "${teacher[@]}" "${distilled[@]}" &
    fi
    run "$i2v" i2v --from "$work/base" bank-images:"${IMAGE_BANK_MINUTES:-${BANK_MINUTES:-0.9}}" \
        i2v:"${IMAGE_MINUTES:-${TEACHER_MINUTES:-8}}" i2v-student:"${IMAGE_STUDENT_MINUTES:-${STUDENT_MINUTES:-2}}" &
    wait
    cp "$work"/base/demo_*.safetensors "$work"/t2v/*.safetensors "$work"/i2v/*.safetensors "$work/all"
    run "$first" lora --from "$work/all" bank:0.3 distill-lora:"${LORA_MINUTES:-1.3}" &
    run "${EXPERTS_GPU:-$second}" experts --from "$work/all" bank:0.3 experts:"${EXPERTS_MINUTES:-2}" &
    wait
    cp "$work"/lora/*.safetensors "$work"/experts/*.safetensors "$work/all"
    [ "${PACKAGE:-1}" = 0 ] || run "$first" all package:"${PACKAGE_MINUTES:-0.4}"
fi
