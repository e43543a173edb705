#!/usr/bin/env bash
# The whole chain of scripts/reproduce.sh on made-up data: raw gaze to heatmaps, a gaze predictor and a tree of images
# that it fills, pretraining on both, and a table of what the encoder is worth on labelled images. Two to three minutes on two
# quiet CPU cores once .venv is there. Everything lands in output_dir/demo/, anew in each run; the same numbers come out
# each time. Nothing in it is of medical use: the models are tiny, the chests and the gaze invented.
set -euo pipefail
CDPATH='' cd "$(dirname "$0")/.."
source scripts/venv.sh
out=output_dir/demo
rm -rf "$out"

echo "== Made-up studies: REFLACX's layout with simulated gaze, further images without gaze, RSNA's"
make=("$PYTHON" scripts/make_phantom.py --width 128 --height 128 --lesion_kinds mass consolidation --lesion_size 1.5)
"${make[@]}" --out "$out/raw" --n_images 96 --dwell_ratio 15 --shared_images 16 --readers 2 --lesion_contrast 1.5
"${make[@]}" --out "$out/raw/more" --n_images 16 --seed 1 --shared_images 0 --lesion_contrast 1.5
"${make[@]}" --out "$out/raw" --layout rsna --format jpg --n_images 240 --lesion_kinds consolidation \
  --lesion_size 1 --normal_fraction 0.5

# Nothing of what the environment may have set for a real run.
unset NIH CHEXPERT SIIM COVIDX GPUS ACCEPT_DAMAGED
REFLACX=$out/raw/reflacx IMAGES=$out/raw/mimic MORE_IMAGES=$out/raw/more/mimic PREDICTED_GAZE=yes RSNA=$out/raw/rsna \
  OUT=$out DEVICE=cpu WORKERS=0 PRETRAINED=none MODEL=cxrmim_vit_tiny_patch16 EPOCHS=40 BATCH_SIZE=16 QUIET=yes \
  PREPARE_FLAGS="--size 128" MIMIC_FLAGS="--size 128 --views all" \
  PRETRAIN_FLAGS="--input_size 96 --cache_size 128 --min_crop_ratio 1 --lr 1.5e-3 --warmup_epochs 2 --image_every 0" \
  GAZE_FLAGS="--backbone resnet18 --weights none --input_size 96 --epochs 8 --batch_size 8" \
  DOWNSTREAM_FLAGS="--split folds --img_size 96" COMPARE=random METHODS=probe FRACTIONS=1 SEEDS=43 PICTURES="0 1" \
  bash scripts/reproduce.sh

"$PYTHON" scripts/plot_log.py "$out/pretrain" --out "$out/loss.png"
tail -n 1 "$out/steps/pictures.txt"
cat <<EOF

Look at these in $out/:
  pictures.png, loss.png           image, gaze, mask, HOG targets and predictions; loss by epoch
  gaze/examples.png, metrics.png   readers' gaze beside the predicted one, on images that it did not train on
  results.png, table.md            an encoder after two minutes of pretraining, and random weights, which are better here:
                                   these made-up lesions show in the gray values themselves
EOF
