#!/usr/bin/env bash
# Pretraining as a Slurm job that saves before its time is up and puts itself back into the queue.
#
#   sbatch scripts/slurm_pretrain.sh                            # the command at the end of this file
#   sbatch scripts/slurm_pretrain.sh --seed 1 --output_dir ...  # further flags, which win
#   sbatch --array=0-2 --gres=gpu:1 scripts/slurm_pretrain.sh   # three runs: seed and output_dir per task
#
# One node with more GPUs, or more nodes: edit the next line. --nodes and --gpus-per-node are read from the
# job, so nothing else changes. Ranks meet by torchrun's c10d rendezvous on the first node.
#SBATCH --nodes=1 --gpus-per-node=1
#SBATCH --job-name=cxrmim
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# USR1 to this script, 120 s before the time limit: time for a step and a checkpoint.
#SBATCH --signal=B:USR1@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

OUTPUT_DIR=${OUTPUT_DIR:-./output_dir/cxrmim}
seed=0
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    seed=$SLURM_ARRAY_TASK_ID
    OUTPUT_DIR=$OUTPUT_DIR-seed$seed
fi
export OMP_NUM_THREADS=1
# From Slurm 22.05 on, srun does not take --cpus-per-task from the job and would give a task one CPU.
if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
PYTHON=${PYTHON:-.venv/bin/python}
gpus=${SLURM_GPUS_ON_NODE:-1}
nodes=${SLURM_JOB_NUM_NODES:-1}
host=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)
port=$((20000 + ${SLURM_JOB_ID:-0} % 20000))

# torchrun dies of USR1, but its workers save and exit. So on each node torchrun ignores the signal, and
# this shell, to which srun passes it on, gives it to torchrun's children, the ranks.
read -r -d '' on_each_node <<'NODE'
(trap '' USR1; exec "$@") &
launcher=$!
trap 'pkill -USR1 -P "$launcher"' USR1
while wait "$launcher"; status=$?; kill -0 "$launcher" 2>/dev/null; do :; done
exit "$status"
NODE

requeue=no
job=
pause() {
    echo "$(date): the time is nearly up; saving a checkpoint, then back into the queue"
    requeue=yes
    kill -USR1 "$job"
}
trap pause USR1

srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "$on_each_node" on_each_node \
    "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc_per_node "$gpus" \
    --rdzv_backend c10d --rdzv_endpoint "$host:$port" --rdzv_id "${SLURM_JOB_ID:-0}" \
    run_pretrain.py --batch_size 128 --model cxrmim_vit_base_patch16 --hog_nbins 9 \
    --mask_ratio 0.75 --clinical_ratio 0.5 --epochs 400 --warmup_epochs 10 --blr 3e-3 --weight_decay 0.05 \
    --num_workers 4 --preload --gaze_weighted --id_list 1 3 9 11 --scale_list 4.0 2.0 1.0 0.5 \
    --decoder_depth 1 --decoder_num_heads 8 --data_path "../data/reflacx-1.0.0/" \
    --output_dir "$OUTPUT_DIR" --seed "$seed" "$@" &
job=$!
# A trapped signal interrupts wait; the job is still running then.
while wait "$job"; status=$?; kill -0 "$job" 2>/dev/null; do :; done

if [[ $status -ne 0 && $requeue == yes ]]; then
    # The same command goes on from the newest whole checkpoint.
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
