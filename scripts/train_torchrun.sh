#!/usr/bin/env bash
# Train in several processes of this machine. The same command again, after a crash or a kill, goes on where the run stopped,
# in the same folder, to the same bits; of a finished run it does nothing.
#
#     NPROC=2 scripts/train_torchrun.sh NAME --config configs/digits.yaml --trainer.sync_batchnorm true
#
# NAME is the experiment, whose folder below logs/ holds this run alone. All further options are those of `project fit`; they count
# at the first start, later ones go by the run's config.yaml. NPROC is the number of GPUs, else 1; PYTHON the interpreter.
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
