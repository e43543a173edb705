#!/usr/bin/env bash
# From the original files to the paper's table: prepare, check, fetch weights, pretrain, export, judge on labelled
# images. Give the data that you have in the variables below, here or in the environment:
#
#   REFLACX=reflacx/1.0.0 IMAGES=mimic-cxr-jpg/2.1.0 RSNA=rsna NIH=nih bash scripts/reproduce.sh
#   sbatch --gpus-per-node=4 --cpus-per-task=32 --time=48:00:00 --export=ALL,REFLACX=...,IMAGES=... scripts/reproduce.sh
#
# Each step prints its command and is skipped once it is done; the same call goes on where it was stopped. A step whose
# command has changed is done again, and so are those after it.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source scripts/venv.sh

# --- Data: directories as their sites give them; what is empty is left out
: "${REFLACX:?give the directory of REFLACX, e.g. reflacx-xray-localization/1.0.0}"
: "${IMAGES:?give the directory of the images of MIMIC-CXR-JPG or MIMIC-CXR}"
: "${RSNA:=}" "${NIH:=}" "${CHEXPERT:=}" "${SIIM:=}" "${COVIDX:=}"
# yes: also train a gaze predictor, fill a tree of all images in MORE_IMAGES with its heatmaps, and pretrain on both
: "${PREDICTED_GAZE:=no}" "${MORE_IMAGES:=$IMAGES}"
# --- Training: the paper's values
: "${OUT:=output_dir/reproduce}" "${EPOCHS:=400}" "${BATCH_SIZE:=128}" "${MODEL:=cxrmim_vit_base_patch16}"
: "${DEVICE:=cuda}" "${GPUS:=auto}" "${WORKERS:=4}"
: "${FRACTIONS:=0.01 0.1 1}" "${SEEDS:=43 44 45}" "${METHODS:=linear}" "${COMPARE:=imagenet random}"
# Further flags of each program, split at blanks
: "${PREPARE_FLAGS:=}" "${MIMIC_FLAGS:=}" "${PRETRAIN_FLAGS:=--warmup_epochs 10 --blr 3e-3}" "${GAZE_FLAGS:=}" "${DOWNSTREAM_FLAGS:=}"
# Entries of the REFLACX tree to draw
: "${PICTURES:=0 1 2 3}"
# Initial weights: a file, or none
: "${PRETRAINED:=preTrain/vit_base_p16_224_timm.pth}"

if [ "$GPUS" = auto ]; then
  GPUS=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$OUT/steps"

# A signal goes on to the step that runs, which saves what it has; then this script ends with its status.
set -m
child=
for signal in INT TERM HUP USR1 USR2; do
  # shellcheck disable=SC2064  # the signal's name of now is meant
  trap "[ -z \"\$child\" ] || kill -s $signal -- \"\$child\"" "$signal"
done

redo=no
step() { # NAME COMMAND...: run a command once; a failure ends the script with its name
  local name=$1 status=0 done_mark=$OUT/steps/$1
  shift
  local command
  command=$(printf '%q ' "$@")
  if [ "$redo" = no ] && [ -e "$done_mark" ] && [ "$(cat "$done_mark")" = "$command" ]; then
    echo "== $name: done before"
    return
  fi
  redo=yes # what follows was made from something else
  rm -f "$done_mark"
  echo "== $name"
  echo "$command"
  "$@" &
  child=$!
  while wait "$child"; status=$?; kill -0 "$child" 2> /dev/null; do :; done
  child=
  if [ "$status" -ne 0 ]; then
    echo "error: step '$name' ended with status $status (see above); the same command goes on from here" >&2
    exit "$status"
  fi
  echo "$command" > "$done_mark"
}

torchrun() { # PROGRAM FLAG...: on every GPU of this node
  step "$1" "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS" "${@:2}"
}

# Words of a variable as an array, without file names for its stars.
set -f
# shellcheck disable=SC2206
prepare_flags=($PREPARE_FLAGS) mimic_flags=($MIMIC_FLAGS) pretrain_flags=($PRETRAIN_FLAGS) gaze_flags=($GAZE_FLAGS)
# shellcheck disable=SC2206
downstream_flags=($DOWNSTREAM_FLAGS) fractions=($FRACTIONS) seeds=($SEEDS) methods=($METHODS) compare=($COMPARE) pictures=($PICTURES)
set +f

step prepare "$PYTHON" scripts/prepare_reflacx.py --raw "$REFLACX" --images "$IMAGES" --out "$OUT/data/reflacx" \
  ${prepare_flags[@]+"${prepare_flags[@]}"}
step check "$PYTHON" run_pretrain.py --check_data --preload --data_path "$OUT/data/reflacx"
trees=("$OUT/data/reflacx")

if [ "$PRETRAINED" != none ] && [ ! -e "$PRETRAINED" ]; then
  step weights "$PYTHON" scripts/fetch_weights.py --out "$PRETRAINED"
fi

if [ "$PREDICTED_GAZE" = yes ]; then
  torchrun gaze run_gaze.py --data_path "$OUT/data/reflacx" --output_dir "$OUT/gaze" --device "$DEVICE" \
    --num_workers "$WORKERS" ${gaze_flags[@]+"${gaze_flags[@]}"}
  step prepare_mimic "$PYTHON" scripts/prepare_mimic.py --images "$MORE_IMAGES" --out "$OUT/data/mimic" \
    ${prepare_flags[@]+"${prepare_flags[@]}"} ${mimic_flags[@]+"${mimic_flags[@]}"}
  step predict "$PYTHON" scripts/predict_gaze.py --weights "$OUT/gaze/best.pth" --tree "$OUT/data/mimic" \
    --real "$OUT/data/reflacx" --device "$DEVICE"
  trees+=("$OUT/data/mimic")
fi

torchrun pretrain run_pretrain.py --data_path "${trees[@]}" --preload --gaze_weighted --model "$MODEL" \
  --pretrained "$PRETRAINED" --epochs "$EPOCHS" --batch_size "$BATCH_SIZE" --output_dir "$OUT/pretrain" \
  --device "$DEVICE" --num_workers "$WORKERS" ${pretrain_flags[@]+"${pretrain_flags[@]}"}
step export "$PYTHON" scripts/export_backbone.py "$OUT/pretrain/checkpoint-$((EPOCHS - 1)).pth" "$OUT/backbone.pth"
step pictures "$PYTHON" scripts/visualize.py "$OUT/pretrain/checkpoint-$((EPOCHS - 1)).pth" \
  --data_path "$OUT/data/reflacx" --index "${pictures[@]}" --device cpu --out "$OUT/pictures.png"

results=()
for dataset in rsna nih chexpert siim covidx; do
  variable=${dataset^^}
  if [ -z "${!variable}" ]; then
    continue
  fi
  for method in "${methods[@]}"; do
    step "$dataset-$method" "$PYTHON" run_downstream.py --dataset "$dataset" --data_path "${!variable}" \
      --weights "ours=$OUT/backbone.pth" "${compare[@]}" --method "$method" --fractions "${fractions[@]}" \
      --seeds "${seeds[@]}" --output_dir "$OUT/downstream/$dataset-$method" --device "$DEVICE" \
      --num_workers "$WORKERS" ${downstream_flags[@]+"${downstream_flags[@]}"}
    results+=("$OUT/downstream/$dataset-$method/results.csv")
  done
done
if [ "${#results[@]}" -gt 0 ]; then
  step table "$PYTHON" scripts/summarize_results.py "${results[@]}" --out "$OUT"
  cat "$OUT/table.md"
fi
echo "everything is in $OUT"
