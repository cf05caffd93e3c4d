#!/bin/bash
# Sourced by the other scripts: checks their two paths and makes lightx2v_core importable.

for name in lightx2v_path model_path; do
    if [ -z "${!name}" ]; then
        echo "Error: ${name} is not set; write it at the top of the script, or: ${name}=... bash $0" >&2
        exit 1
    fi
done
if [ ! -d "${lightx2v_path}/lightx2v_core" ]; then
    echo "Error: lightx2v_path ${lightx2v_path} holds no lightx2v_core; give the folder of this pack" >&2
    exit 1
fi

export PYTHONPATH="${lightx2v_path}${PYTHONPATH:+:${PYTHONPATH}}"
export TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python}
