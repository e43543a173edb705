#!/usr/bin/env bash
# Predicted heatmaps for a tree of images, as an array of Slurm jobs, one share each, and a last job that writes the index.
#
#   jobs=$(sbatch --parsable --array=0-7 scripts/slurm_predict_gaze.sh output_dir/gaze/best.pth data/mimic)
#   sbatch --dependency=afterany:$jobs scripts/slurm_predict_gaze.sh output_dir/gaze/best.pth data/mimic
#
# The number of shares is that of the array. Shares never write one file twice; one that was stopped goes on when it is
# put back into the queue, and the last job makes whatever is left. Further flags go to predict_gaze.py:
# --real data/reflacx --batch_size 64. On nodes without GPU: --gpus-per-node=0, and --device cpu as a further flag.
#SBATCH --nodes=1 --ntasks=1 --gpus-per-node=1
#SBATCH --job-name=gaze
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
# sbatch runs a copy of this file that lies elsewhere, and is called in the repository.
CDPATH='' cd "$(dirname "$0")/.." 2> /dev/null || :
[ -e scripts/venv.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
[ -e scripts/venv.sh ] || { echo "error: $PWD is not the repository; call sbatch in its root" >&2; exit 1; }

if [[ $# -lt 2 ]]; then
    echo "usage: sbatch [--array=0-7] scripts/slurm_predict_gaze.sh BEST.pth TREE [flags of predict_gaze.py]" >&2
    exit 1
fi
weights=$1
tree=$2
shift 2
shard=()
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    first=${SLURM_ARRAY_TASK_MIN:-0}
    count=${SLURM_ARRAY_TASK_COUNT:-1}
    if [[ $((SLURM_ARRAY_TASK_MAX - first + 1)) -ne $count ]]; then
        echo "error: --array: needs consecutive numbers, such as 0-7" >&2
        exit 1
    fi
    shard=(--shard "$((SLURM_ARRAY_TASK_ID - first))/$count")
fi
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
PYTHON=${PYTHON:-.venv/bin/python}
exec "$PYTHON" scripts/predict_gaze.py --weights "$weights" --tree "$tree" ${shard[@]+"${shard[@]}"} "$@"
