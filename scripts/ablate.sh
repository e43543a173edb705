#!/usr/bin/env bash
# Does the gaze prior help? {attention, random, block} masking x {unweighted, weighted} loss x seeds on a
# made-up study, at tiny scale, then a linear probe for lesion presence and type on a second study.
# A check of the machinery more than of the method: the images are phantoms and the models tiny.
#
#   bash scripts/ablate.sh [OUT]          22 minutes of CPU time, so 11 on 2 idle cores; goes on where it stopped
#   LESION_SIZE=0.6 SEEDS="0 1 2 3 4" bash scripts/ablate.sh output_dir/ablate_small_lesions
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

OUT=${1:-output_dir/ablate}
: "${SEEDS:=0 1 2}" "${N_IMAGES:=128}" "${N_PROBE:=240}" "${EPOCHS:=20}" "${INPUT_SIZE:=96}" "${JOBS:=2}"
# Of the phantom: usual extent and contrast of lesions times these; gaze density inside lesions over outside.
: "${LESION_SIZE:=1.0}" "${LESION_CONTRAST:=1.0}" "${DWELL_RATIO:=6.0}"
: "${LESION_KINDS:=nodule mass consolidation effusion}"
export OMP_NUM_THREADS=1 PYTHON OUT EPOCHS INPUT_SIZE
mkdir -p "$OUT"

settings="$N_IMAGES $N_PROBE $EPOCHS $INPUT_SIZE $LESION_SIZE $LESION_CONTRAST $DWELL_RATIO $LESION_KINDS"
if [ -e "$OUT/settings" ] && [ "$(cat "$OUT/settings")" != "$settings" ]; then
  echo "error: $OUT was made with other settings ($(cat "$OUT/settings")); choose another OUT" >&2
  exit 1
fi
echo "$settings" > "$OUT/settings"

read -r -a kinds <<< "$LESION_KINDS"
study() { # NAME IMAGES SEED: a phantom study, prepared
  if [ ! -e "$OUT/$1/done" ]; then
    rm -rf "${OUT:?}/$1"
    "$PYTHON" scripts/make_phantom.py --out "$OUT/$1/raw" --n_images "$2" --seed "$3" --width 192 --height 192 \
      --shared_images 0 --normal_fraction 0.4 --lesion_kinds "${kinds[@]}" --lesion_size "$LESION_SIZE" \
      --lesion_contrast "$LESION_CONTRAST" --dwell_ratio "$DWELL_RATIO"
    "$PYTHON" scripts/prepare_reflacx.py --raw "$OUT/$1/raw/reflacx" --images "$OUT/$1/raw/mimic" \
      --out "$OUT/$1/tree" --size 192 > "$OUT/$1/prepare.txt"
    touch "$OUT/$1/done"
  fi
}
study pretrain "$N_IMAGES" 100
study probe "$N_PROBE" 200

pretrain() { # NAME MASKING SEED [--gaze_weighted]
  local run=$OUT/runs/$1
  if [ ! -e "$run/backbone.pth" ]; then
    mkdir -p "$run"
    "$PYTHON" run_pretrain.py --data_path "$OUT/pretrain/tree" --model cxrmim_vit_tiny_patch16 --device cpu \
      --input_size "$INPUT_SIZE" --batch_size 16 --epochs "$EPOCHS" --warmup_epochs $((EPOCHS / 10)) --lr 5e-4 \
      --masking "$2" --seed "$3" ${4:+"$4"} --no_cache --num_workers 0 --save_every "$EPOCHS" --output_dir "$run" \
      > "$run/out.txt" 2>&1 || { echo "error: $1 failed, see $run/out.txt" >&2; return 1; }
    "$PYTHON" scripts/export_backbone.py "$run/checkpoint-$((EPOCHS - 1)).pth" "$run/backbone.pth" > /dev/null
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

runs=() weights=()
while read -r name _; do
  runs+=("$OUT/runs/$name") weights+=("$name=$OUT/runs/$name/backbone.pth")
done < "$OUT/runs.txt"
"$PYTHON" run_downstream.py --dataset tree --data_path "$OUT/probe/tree" --split folds --method probe --seeds 0 \
  --weights "${weights[@]}" random pixels --min_positives 10 --normalisation imagenet --device cpu --num_workers 0 \
  --output_dir "$OUT/downstream" > "$OUT/probe.txt"
"$PYTHON" scripts/plot_log.py "${runs[@]}" --out "$OUT/loss.png" > /dev/null
"$PYTHON" scripts/ablate_table.py "$OUT/downstream/results.csv" --out "$OUT/table.csv"
