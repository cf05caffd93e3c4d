#!/usr/bin/env bash
# The demo family on two GPUs in about 23 minutes: training/demo.sh WORK, from the project's root.
# What is worth keeping is in WORK/all at the end.
set -u
work=$1
python=${PYTHON:-python3}

run() { # GPU FOLDER ARGUMENTS...
    local gpu=$1 out=$work/$2
    shift 2
    mkdir -p "$out"
    CUDA_VISIBLE_DEVICES=$gpu PYTHONUNBUFFERED=1 \
        "$python" -m training.run --out "$out" --compile "${COMPILE:-on}" ${EXTRA:-} "$@" > "$out/log.txt" 2>&1
}

mkdir -p "$work/base"
if [ -n "${BASE:-}" ]; then
    # VAE and text encoder from a folder; with CONTINUE=1 the students there start the teachers too.
    cp "$BASE/demo_vae.safetensors" "$BASE/demo_umt5.safetensors" "$work/base"
    if [ "${CONTINUE:-0}" = 1 ]; then
        for task in t2v i2v; do
            cp "$BASE/demo_$task.safetensors" "$work/base/teacher_$task.safetensors"
        done
    fi
else
    # Two learning rates for the VAE; the better one by its reconstructions goes on.
    run 0 text text:"${TEXT_MINUTES:-0.8}" &
    run 0 vae_a --lr 1e-3 vae:"${VAE_MINUTES:-5}" &
    run 1 vae_b --lr 2e-3 --seed 2 vae:"${VAE_MINUTES:-5}" &
    wait
    "$python" - "$work" <<'PY'
import json, shutil, sys
from pathlib import Path

work, best = Path(sys.argv[1]), []
for name in ("vae_a", "vae_b"):
    lines = (work / name / "journal.jsonl").read_text().splitlines()
    exams = [record for record in map(json.loads, lines) if record["stage"] == "vae exam"]
    best += [(exam["judge"] + exam["psnr"], name) for exam in exams]
shutil.copy(work / max(best)[1] / "demo_vae.safetensors", work / "base")
shutil.copy(work / "text" / "demo_umt5.safetensors", work / "base")
print("VAE:", sorted(best))
PY
fi

run 0 t2v --from "$work/base" bank:"${BANK_MINUTES:-0.9}" t2v:"${TEACHER_MINUTES:-8}" t2v-student:"${STUDENT_MINUTES:-2}" \
    t2v-dmd:"${DMD_MINUTES:-4.6}" &
run 1 i2v --from "$work/base" bank-images:"${BANK_MINUTES:-0.9}" i2v:"${TEACHER_MINUTES:-8}" i2v-student:"${STUDENT_MINUTES:-2}" &
wait
mkdir -p "$work/all"
cp "$work"/base/demo_*.safetensors "$work"/t2v/*.safetensors "$work"/i2v/*.safetensors "$work/all"
run 0 all package:0.4
