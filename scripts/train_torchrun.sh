#!/usr/bin/env bash
# Train in several processes on this machine. If the run was stopped, the same command continues it in the same
# folder, and the run ends with the same bits as one that was never stopped. If the run is finished, the command does
# nothing.
#
#     NPROC=2 scripts/train_torchrun.sh NAME --config configs/digits.yaml --trainer.sync_batchnorm true
#
# NAME is the experiment: its folder in logs/ must hold no other run. All other options are passed to `project fit` at
# the first start; a restart uses the run's config.yaml. NPROC is the number of processes: by default the number of
# GPUs, or 1 without a GPU. PYTHON is the interpreter, by default python.
set -euo pipefail

if [ $# -lt 2 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: [NPROC=2] scripts/train_torchrun.sh NAME --config FILE [OPTION ...]" >&2
    exit 2
fi
name=$1
shift
folder=${PROJECT_LOGS_DIR:-logs}/$name
processes=${NPROC:-$(nvidia-smi -L 2>/dev/null | wc -l)}
processes=$((processes > 0 ? processes : 1))

start=("$@" --trainer.experiment "$name" --trainer.logs_dir "${PROJECT_LOGS_DIR:-logs}")
if compgen -G "$folder/version_*/config.yaml" >/dev/null; then
    if grep -qs '"test/accuracy"' "$folder"/version_*/summary.json; then
        echo "$folder is finished"
        exit
    fi
    start=(--resume "$folder")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "$processes" -m project \
    fit "${start[@]}" --trainer.devices "$processes" --trainer.strategy ddp
