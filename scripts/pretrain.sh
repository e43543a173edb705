#!/usr/bin/env bash
# The paper's pretraining: 400 epochs on one GPU. Edit the lines below; further flags can be given
# behind the command: bash scripts/pretrain.sh --dtype bfloat16
# A second call goes on from the newest checkpoint in output_dir. Several GPUs of this machine, with --batch_size images
# each: GPUS=2 bash scripts/pretrain.sh --batch_size 64. Other nodes: scripts/slurm_pretrain.sh
set -euo pipefail
CDPATH='' cd "$(dirname "$0")/.."
# Set PYTHON to use an environment of your own.
if [ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ]; then
  PYTHON=${PYTHON:-python3}
  [[ $PYTHON == */* && $PYTHON != /* ]] && PYTHON=$OLDPWD/$PYTHON # as seen from where this was called
else
  PYTHON=.venv/bin/python
fi

# One thread per process for the CPU's part: the loader's workers are processes of their own.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

launcher=()
[ "${GPUS:=1}" = 1 ] || launcher=(scripts/launch.py --standalone --nproc_per_node "$GPUS")

# exec, so that a signal to this script reaches the program, or the launcher, which hands it on.
exec "$PYTHON" ${launcher[@]+"${launcher[@]}"} run_pretrain.py \
  --data_path ../data/reflacx-1.0.0/ \
  --output_dir ./output_dir/cxrmim/ \
  --pretrained preTrain/vit_base_p16_224_timm.pth \
  --model cxrmim_vit_base_patch16 \
  --id_list 1 3 9 11 --scale_list 4.0 2.0 1.0 0.5 \
  --decoder_depth 1 --decoder_num_heads 8 --hog_nbins 9 \
  --mask_ratio 0.75 --clinical_ratio 0.5 --gaze_weighted \
  --batch_size 128 --epochs 400 --warmup_epochs 10 --blr 3e-3 --weight_decay 0.05 \
  --num_workers 4 --preload \
  "$@"
