#!/usr/bin/env bash
# Does the gaze prior help? {attention, random, block} masking x {unweighted, weighted} loss x seeds on a
# made-up study, then a logistic regression for lesion presence and type on a second study.
#
#   bash scripts/ablate.sh [OUT]             tiny models: a check of the machinery; 20 minutes of CPU time
#   PRESET=gpu bash scripts/ablate.sh [OUT]  ViT-B at 224 px, small lesions: docs/ablation.md says how it was sized
#   LESION_SIZE=0.6 SEEDS="0 1 2 3 4" bash scripts/ablate.sh output_dir/ablate_small_lesions
#
# Goes on where it stopped, as scripts/reproduce.sh does. The images are phantoms: what it says is about them.
set -euo pipefail
set -a # for scripts/ablate.py
CALLED_FROM=$PWD
export OMP_NUM_THREADS=1
CDPATH='' cd "$(dirname "$0")/.."

# N_PROBE: images of the second study. PARTS: trees that each study is made in, side by side. JOBS: runs at a time.
case ${PRESET:=cpu} in
  cpu)
    : "${OUT:=${1:-$PWD/output_dir/ablate}}" "${SEEDS:=0 1 2}" "${N_IMAGES:=128}" "${N_PROBE:=240}" "${EPOCHS:=20}"
    : "${INPUT_SIZE:=96}" "${IMAGE_SIZE:=192}" "${MODEL:=tiny}" "${BATCH_SIZE:=16}" "${DEVICE:=cpu}" "${JOBS:=2}"
    : "${WORKERS:=0}" "${PARTS:=1}" "${LESION_SIZE:=1.0}"
    ;;
  gpu)
    : "${OUT:=${1:-$PWD/output_dir/ablate_gpu}}" "${SEEDS:=0 1 2 3 4}" "${N_IMAGES:=2000}" "${N_PROBE:=6000}"
    : "${EPOCHS:=25}" "${INPUT_SIZE:=224}" "${IMAGE_SIZE:=256}" "${MODEL:=base}" "${BATCH_SIZE:=64}" "${JOBS:=2}"
    : "${DEVICE:=cuda}" "${WORKERS:=6}" "${PARTS:=8}" "${LESION_SIZE:=0.6}"
    ;;
  *) echo "error: PRESET=$PRESET: expected cpu or gpu" >&2; exit 1 ;;
esac
# Of the phantom: usual extent and contrast of lesions times these; gaze density inside lesions over outside.
: "${LESION_CONTRAST:=1.0}" "${DWELL_RATIO:=6.0}"
[ $((N_IMAGES % PARTS + N_PROBE % PARTS)) = 0 ] ||
  { echo "error: PARTS=$PARTS: can't share $N_IMAGES and $N_PROBE images evenly" >&2; exit 1; }

WEIGHTS=none
if [ "$MODEL" = base ]; then
  WEIGHTS=preTrain/vit_base_p16_224_timm.pth
  [ -e $WEIGHTS ] || { WEIGHTS=none; echo "no ImageNet weights (scripts/fetch_weights.py): starts from random ones"; }
fi
OLDPWD=$CALLED_FROM source scripts/venv.sh
exec "$PYTHON" scripts/ablate.py # in place of this shell, so that signals reach it
