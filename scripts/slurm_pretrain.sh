#!/usr/bin/env bash
# Pretraining as a Slurm job that saves before its time is up and puts itself back into the queue.
#
#   sbatch scripts/slurm_pretrain.sh                            # the command at the end of this file
#   sbatch scripts/slurm_pretrain.sh --seed 1 --output_dir ...  # further flags, which win
#   OUTPUT_DIR=DIR sbatch --array=0-2 scripts/slurm_pretrain.sh # three runs, with these seeds, in DIR-seedN
#
# One node with more GPUs, or more nodes: edit the next line; ranks meet on the first node.
#SBATCH --nodes=1 --gpus-per-node=1 --ntasks-per-node=1 --cpus-per-task=16
#SBATCH --time=24:00:00 --job-name=cxrmim --output=%x-%j.out --open-mode=append --requeue
# USR1 to this script, 120 s before the time limit: time for a step and a checkpoint.
#SBATCH --signal=B:USR1@120
set -uo pipefail
# sbatch runs a copy of this file that lies elsewhere, and is called in the repository.
CDPATH='' cd "$(dirname "$0")/.." 2> /dev/null || :
[ -e scripts/venv.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit
[ -e scripts/venv.sh ] || { echo "error: $PWD is not the repository; call sbatch in its root" >&2; exit 1; }

OUTPUT_DIR=${OUTPUT_DIR:-./output_dir/cxrmim}
run=(--seed 0 --output_dir "$OUTPUT_DIR" "$@") # of a flag that is given twice the last one counts
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then # a run of its own
    [[ " $*" != *" --seed"* && " $*" != *" --output_dir"* ]] ||
        { echo "error: task N of an array has seed N, in OUTPUT_DIR-seedN: set OUTPUT_DIR for --output_dir and --seed" >&2; exit 1; }
    run+=(--seed "$SLURM_ARRAY_TASK_ID" --output_dir "${OUTPUT_DIR%/}-seed$SLURM_ARRAY_TASK_ID")
fi
export OMP_NUM_THREADS=1
# From Slurm 22.05 on, srun does not take --cpus-per-task from the job and would give a task one CPU.
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
host=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)

# TERM is of scancel, after which the job stays away, or of a preemption, after which Slurm itself requeues it.
requeue=no job='' status=0
trap 'echo "$(date): the time is nearly up; saving, then back into the queue"; requeue=yes; kill -USR1 $job' USR1
trap 'echo "$(date): asked to end; saving a checkpoint"; kill -TERM $job' TERM
srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" scripts/launch.py \
    --nnodes "${SLURM_JOB_NUM_NODES:-1}" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_backend c10d --rdzv_endpoint "$host:$((20000 + ${SLURM_JOB_ID:-0} % 20000))" --rdzv_id "${SLURM_JOB_ID:-0}" \
    run_pretrain.py --batch_size 128 --model cxrmim_vit_base_patch16 --hog_nbins 9 \
    --mask_ratio 0.75 --clinical_ratio 0.5 --epochs 400 --warmup_epochs 10 --blr 3e-3 --weight_decay 0.05 \
    --num_workers 4 --preload --gaze_weighted --id_list 1 3 9 11 --scale_list 4.0 2.0 1.0 0.5 \
    --decoder_depth 1 --decoder_num_heads 8 --data_path "../data/reflacx-1.0.0/" "${run[@]}" &
job=$!
# A trapped signal interrupts wait; the job is still running then, or its own status is still to be had.
while wait "$job"; status=$?; kill -0 "$job" 2> /dev/null; do :; done
if ((status > 128)); then wait "$job" 2> /dev/null; own=$?; ((own == 127)) || status=$own; fi
# The same command goes on from the newest whole checkpoint.
[[ $status -eq 0 || $requeue == no ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
