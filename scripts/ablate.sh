#!/usr/bin/env bash
# Does the gaze prior help? {attention, random, block} masking x {unweighted, weighted} loss x seeds on a
# made-up study, then a logistic regression for lesion presence and type on a second study.
#
#   bash scripts/ablate.sh [OUT]             tiny models: a check of the machinery; 20 minutes of CPU time
#   PRESET=gpu bash scripts/ablate.sh [OUT]  ViT-B at 224 px, small lesions: docs/ablation.md says how it was sized
#   LESION_SIZE=0.6 SEEDS="0 1 2 3 4" bash scripts/ablate.sh output_dir/ablate_small_lesions
#
# Goes on where it stopped. The images are phantoms: what it says is about them.
set -euo pipefail
given=${1:-${OUT:-}} called_from=$PWD
CDPATH='' cd "$(dirname "$0")/.."
source scripts/venv.sh

# PARTS: trees that each study is made in, side by side. GROUPS_OF: what one call of run_downstream.py judges.
case ${PRESET:=cpu} in
  cpu)
    : "${OUT:=output_dir/ablate}" "${SEEDS:=0 1 2}" "${N_IMAGES:=128}" "${N_PROBE:=240}" "${EPOCHS:=20}"
    : "${INPUT_SIZE:=96}" "${IMAGE_SIZE:=192}" "${MODEL:=tiny}" "${BATCH_SIZE:=16}" "${DEVICE:=cpu}" "${JOBS:=2}"
    : "${WORKERS:=0}" "${PARTS:=1}" "${GROUPS_OF:=all}" "${LESION_SIZE:=1.0}"
    ;;
  gpu)
    : "${OUT:=output_dir/ablate_gpu}" "${SEEDS:=0 1 2 3 4}" "${N_IMAGES:=2000}" "${N_PROBE:=6000}" "${EPOCHS:=25}"
    : "${INPUT_SIZE:=224}" "${IMAGE_SIZE:=256}" "${MODEL:=base}" "${BATCH_SIZE:=64}" "${DEVICE:=cuda}" "${JOBS:=2}"
    : "${WORKERS:=6}" "${PARTS:=8}" "${GROUPS_OF:=seed}" "${LESION_SIZE:=0.6}"
    ;;
  *) echo "error: PRESET=$PRESET: expected cpu or gpu" >&2; exit 1 ;;
esac
# As seen from where this is called.
[ -z "$given" ] || OUT=$(root=$PWD && cd "$called_from" && realpath -m --relative-base="$root" -- "$given")
# Of the phantom: usual extent and contrast of lesions times these; gaze density inside lesions over outside.
: "${LESION_CONTRAST:=1.0}" "${DWELL_RATIO:=6.0}" "${LESION_KINDS:=nodule mass consolidation effusion}"

WEIGHTS=none
if [ "$MODEL" = base ]; then
  if [ -e preTrain/vit_base_p16_224_timm.pth ]; then
    WEIGHTS=preTrain/vit_base_p16_224_timm.pth
  else
    echo "no preTrain/vit_base_p16_224_timm.pth (scripts/fetch_weights.py makes it): starts from random weights"
  fi
fi
export OMP_NUM_THREADS=1 PYTHON OUT EPOCHS INPUT_SIZE IMAGE_SIZE MODEL BATCH_SIZE DEVICE WORKERS WEIGHTS
for images in "$N_IMAGES" "$N_PROBE"; do
  ((images % PARTS == 0)) || { echo "error: $images images can't be made in PARTS=$PARTS of one size" >&2; exit 1; }
done
mkdir -p "$OUT"
exec 9>> "$OUT/.lock" # what is started here has it too
status=0
flock --conflict-exit-code 100 --nonblock 9 2> /dev/null || status=$?
[ "$status" != 100 ] || { echo "error: another call is at work in $OUT, or what it started" >&2; exit 1; }

settings="$MODEL from $WEIGHTS, $N_IMAGES and $N_PROBE images of $IMAGE_SIZE px in $PARTS parts, input $INPUT_SIZE px, \
$EPOCHS epochs, batch $BATCH_SIZE; lesions $LESION_SIZE $LESION_CONTRAST $DWELL_RATIO $LESION_KINDS"
if [ -e "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$settings" ]; then
  echo "error: $OUT was made with other settings ($(cat "$OUT/settings")); choose another OUT" >&2
  exit 1
fi
echo "$settings" > "$OUT/settings"

# Findings of readings in phase 2 of REFLACX that the lesions have; the others have no image to learn from.
read -r -a kinds <<< "$LESION_KINDS"
labels=("Any finding")
for kind in "${kinds[@]}"; do
  case $kind in
    nodule | mass) label="Lung nodule or mass" ;;
    effusion) label="Pleural abnormality" ;;
    cardiomegaly) label="Enlarged cardiac silhouette" ;;
    *) label=${kind^} ;;
  esac
  [[ " ${labels[*]} " == *" $label "* ]] || labels+=("$label")
done

wait_for() { # PID...: fails where one of them did
  local failed=0
  for pid in "$@"; do wait "$pid" || failed=1; done
  return "$failed"
}
study() { # NAME IMAGES SEED: a phantom study, prepared
  if [ ! -e "$OUT/$1/done" ]; then
    rm -rf "${OUT:?}/$1"
    "$PYTHON" scripts/make_phantom.py --out "$OUT/$1/raw" --n_images "$2" --seed "$3" --width "$IMAGE_SIZE" \
      --height "$IMAGE_SIZE" --shared_images 0 --normal_fraction 0.4 --lesion_kinds "${kinds[@]}" \
      --lesion_size "$LESION_SIZE" --lesion_contrast "$LESION_CONTRAST" --dwell_ratio "$DWELL_RATIO" || return 1
    "$PYTHON" scripts/prepare_reflacx.py --raw "$OUT/$1/raw/reflacx" --images "$OUT/$1/raw/mimic" \
      --out "$OUT/$1/tree" --size "$IMAGE_SIZE" --workers 2 > "$OUT/$1/prepare.txt" || return 1
    touch "$OUT/$1/done"
  fi
}
pids=() probe_trees=()
: > "$OUT/trees.txt"
for ((part = 0; part < PARTS; part++)); do
  suffix=$([ "$PARTS" = 1 ] || echo "-$part")
  study "pretrain$suffix" $((N_IMAGES / PARTS)) $((100 + part)) &
  pids+=($!)
  study "probe$suffix" $((N_PROBE / PARTS)) $((200 + part)) &
  pids+=($!)
  echo "$OUT/pretrain$suffix/tree" >> "$OUT/trees.txt"
  probe_trees+=("$OUT/probe$suffix/tree")
done
wait_for "${pids[@]}" || { echo "error: a study was not made, see above" >&2; exit 1; }

pretrain() { # NAME MASKING SEED [--gaze_weighted]
  local run=$OUT/runs/$1 cache=(--no_cache) trees
  if [ ! -e "$run/backbone.pth" ]; then
    mkdir -p "$run"
    mapfile -t trees < "$OUT/trees.txt"
    [ "$DEVICE" = cpu ] || cache=(--cache_size "$IMAGE_SIZE")
    "$PYTHON" run_pretrain.py --data_path "${trees[@]}" --model "cxrmim_vit_${MODEL}_patch16" --pretrained "$WEIGHTS" \
      --device "$DEVICE" --input_size "$INPUT_SIZE" --batch_size "$BATCH_SIZE" --epochs "$EPOCHS" \
      --warmup_epochs $((EPOCHS / 10)) --lr 5e-4 --masking "$2" --seed "$3" ${4:+"$4"} "${cache[@]}" \
      --num_workers "$WORKERS" --save_every "$EPOCHS" --output_dir "$run" \
      > "$run/out.txt" 2>&1 || { echo "error: $1 failed, see $run/out.txt" >&2; return 1; }
    "$PYTHON" scripts/export_backbone.py "$run/checkpoint-$((EPOCHS - 1)).pth" "$run/backbone.pth" > /dev/null ||
      { echo "error: $1: no export" >&2; return 1; }
    rm -f "$run"/checkpoint-*.pth
  fi
  echo "pretrained $1"
}
export -f pretrain

for seed in $SEEDS; do
  for masking in attention random block; do
    echo "${masking}_unweighted_s$seed $masking $seed"
    echo "${masking}_weighted_s$seed $masking $seed --gaze_weighted"
  done
done > "$OUT/runs.txt"
xargs -P "$JOBS" -L 1 bash -c 'pretrain "$@"' _ < "$OUT/runs.txt"

judge() { # FOLDER WEIGHTS...
  mkdir -p "$1"
  "$PYTHON" run_downstream.py --dataset tree --data_path "${probe_trees[@]}" --split folds --labels "${labels[@]}" \
    --method probe --seeds 0 --weights "${@:2}" --min_positives 10 --normalisation imagenet --device "$DEVICE" \
    --num_workers "$WORKERS" --output_dir "$1" > "$1.txt" || { echo "error: the probe failed, see $1.txt" >&2; return 1; }
}
pids=() results=() alone=(random pixels) groups=(all)
[ "$GROUPS_OF" = all ] || read -r -a groups <<< "$SEEDS"
for group in "${groups[@]}"; do
  weights=()
  while read -r name _ seed _; do # as written above
    if [ "$group" = all ] || [ "$group" = "$seed" ]; then
      weights+=("$name=$OUT/runs/$name/backbone.pth")
    fi
  done < "$OUT/runs.txt"
  folder=$OUT/downstream$([ "$group" = all ] || echo "/s$group")
  judge "$folder" "${weights[@]}" ${alone[@]+"${alone[@]}"} &
  pids+=($!) results+=("$folder/results.csv") alone=()
done
wait_for "${pids[@]}" || exit 1
"$PYTHON" scripts/ablate_table.py "${results[@]}" --out "$OUT/table.csv"
