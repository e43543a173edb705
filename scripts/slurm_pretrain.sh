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
#SBATCH --output=%x-%j.out
# USR1 to this script, 120 s before the time limit: time for a step and a checkpoint.
#SBATCH --signal=B:USR1@120
set -uo pipefail
# sbatch runs a copy of this file that lies elsewhere, and is called in the repository.
CDPATH='' cd "$(dirname "$0")/.." 2> /dev/null || :
[ -e scripts/venv.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit
[ -e scripts/venv.sh ] || { echo "error: $PWD is not the repository; call sbatch in its root" >&2; exit 1; }

OUTPUT_DIR=${OUTPUT_DIR:-./output_dir/cxrmim}
seed=(--seed 0)
flags=()
while (($#)); do
    case $1 in
        --output_dir) OUTPUT_DIR=${2:?--output_dir needs a directory}; shift ;;
        --output_dir=*) OUTPUT_DIR=${1#*=} ;;
        --seed | --seed=*) seed=(); flags+=("$1") ;;
        *) flags+=("$1") ;;
    esac
    shift
done
# In an array each task is a run of its own.
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    if ((${#seed[@]} == 0)); then
        echo "error: the tasks of an array have their number as seed; leave --seed out" >&2
        exit 1
    fi
    seed=(--seed "$SLURM_ARRAY_TASK_ID")
    while [[ $OUTPUT_DIR == */ ]]; do OUTPUT_DIR=${OUTPUT_DIR%/}; done
    OUTPUT_DIR=$OUTPUT_DIR-seed$SLURM_ARRAY_TASK_ID
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
# this shell, to which srun passes it on, gives it to torchrun's children, the ranks. (No pkill: containers
# may lack it.) TERM, of scancel or a preemption, torchrun hands on itself. Either way the shell waits for
# the ranks: when a task's shell ends, Slurm kills what is left of the task.
read -r -d '' on_each_node <<'NODE'
(trap '' USR1; exec "$@") &
launcher=$!
tell_ranks() {
    local stat line fields
    for stat in /proc/[0-9]*/stat; do
        { read -r line < "$stat"; } 2> /dev/null || continue
        read -r -a fields <<< "${line##*) }" # state, parent, ...
        if [[ ${fields[1]} == "$launcher" ]]; then kill -USR1 "${line%% *}"; fi
    done
}
trap tell_ranks USR1
trap 'kill -TERM "$launcher"' TERM
while wait "$launcher"; status=$?; kill -0 "$launcher" 2>/dev/null; do :; done
# Where it ended while the signal was handled, its own status is still to be had.
if ((status > 128)); then wait "$launcher" 2>/dev/null; own=$?; ((own == 127)) || status=$own; fi
exit "$status"
NODE

requeue=no
job=
# shellcheck disable=SC2329 # called by trap
pause() {
    echo "$(date): the time is nearly up; saving a checkpoint, then back into the queue"
    requeue=yes
    [[ -z $job ]] || kill -USR1 "$job"
}
# scancel and preemption send TERM to all of the job, and KILL half a minute later. Slurm itself puts a
# preempted job back into the queue; a cancelled one is to stay away.
# shellcheck disable=SC2329 # called by trap
terminate() {
    echo "$(date): asked to end; saving a checkpoint"
    [[ -z $job ]] || kill -TERM "$job"
}
trap pause USR1
trap terminate TERM

srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c "$on_each_node" on_each_node \
    "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --nproc_per_node "$gpus" \
    --rdzv_backend c10d --rdzv_endpoint "$host:$port" --rdzv_id "${SLURM_JOB_ID:-0}" \
    run_pretrain.py --batch_size 128 --model cxrmim_vit_base_patch16 --hog_nbins 9 \
    --mask_ratio 0.75 --clinical_ratio 0.5 --epochs 400 --warmup_epochs 10 --blr 3e-3 --weight_decay 0.05 \
    --num_workers 4 --preload --gaze_weighted --id_list 1 3 9 11 --scale_list 4.0 2.0 1.0 0.5 \
    --decoder_depth 1 --decoder_num_heads 8 --data_path "../data/reflacx-1.0.0/" \
    --output_dir "$OUTPUT_DIR" ${seed[@]+"${seed[@]}"} ${flags[@]+"${flags[@]}"} &
job=$!
# A trapped signal interrupts wait; the job is still running then.
while wait "$job"; status=$?; kill -0 "$job" 2>/dev/null; do :; done
if ((status > 128)); then wait "$job" 2>/dev/null; own=$?; ((own == 127)) || status=$own; fi

if [[ $status -ne 0 && $requeue == yes ]]; then
    # The same command goes on from the newest whole checkpoint.
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
