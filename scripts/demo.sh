#!/usr/bin/env bash
# The whole chain of scripts/reproduce.sh on made-up data: raw gaze to heatmaps, a gaze predictor and a tree of images
# that it fills, pretraining on both, and a table of what the encoder is worth on labelled images. A few minutes on two
# CPU cores once .venv is there. Everything lands in output_dir/demo/, anew in each run; the same numbers come out each
# time. Nothing in it is of medical use: the models are tiny, the chests and the gaze invented.
set -euo pipefail
CDPATH='' cd "$(dirname "$0")/.."
source scripts/venv.sh
out=output_dir/demo
mkdir -p output_dir
exec 8>> output_dir/.demo.lock # what is started here has it too
status=0
flock --conflict-exit-code 100 --nonblock 8 2> /dev/null || status=$?
[ "$status" != 100 ] || { echo "error: another demo is at work in $out; wait for it" >&2; exit 1; }
rm -rf "$out"

echo "== Made-up studies: REFLACX's layout with one real radiograph (simulated gaze), further images without gaze, RSNA's"
"$PYTHON" scripts/make_phantom.py --out "$out/raw" --n_images 47 --real_radiograph
"$PYTHON" scripts/make_phantom.py --out "$out/raw/more" --n_images 16 --seed 1 --shared_images 0
"$PYTHON" scripts/make_phantom.py --out "$out/raw" --layout rsna --format jpg --n_images 160 --width 210 --height 256 \
  --lesion_kinds consolidation --normal_fraction 0.5

# Nothing of what the environment may have set for a real run.
unset NIH CHEXPERT SIIM COVIDX GPUS PREPARE_FLAGS DOWNSTREAM_FLAGS ACCEPT_DAMAGED
REFLACX=$out/raw/reflacx IMAGES=$out/raw/mimic MORE_IMAGES=$out/raw/more/mimic PREDICTED_GAZE=yes RSNA=$out/raw/rsna \
  OUT=$out DEVICE=cpu WORKERS=2 PRETRAINED=none MODEL=cxrmim_vit_tiny_patch16 EPOCHS=20 BATCH_SIZE=8 \
  PRETRAIN_FLAGS="--warmup_epochs 2 --blr 4e-2 --image_every 0" \
  GAZE_FLAGS="--backbone resnet18 --weights none --input_size 128 --epochs 6 --batch_size 8" \
  MIMIC_FLAGS="--views all" COMPARE=random METHODS=probe FRACTIONS=1 SEEDS="43 44 45" PICTURES="47 0 1 2" QUIET=no \
  bash scripts/reproduce.sh

"$PYTHON" - "$out" <<'PYTHON'
import json, sys
out = sys.argv[1]
losses = [json.loads(line)["train_loss"] for line in open(f"{out}/pretrain/log.txt")]
print(f"""
Look at these in {out}/:
  pictures.png                          image, gaze, mask, HOG targets and what was predicted of them
  gaze/examples.png, gaze/metrics.png   gaze of the readers and predicted, so early hardly more than the mean map
  downstream/rsna-probe/results.png     what the encoder is worth on labelled images: on 24 test images the intervals
                                        are too wide to tell it from random weights
  table.md, results.png                 the same for all data sets and methods together, of which the demo has one
Made on the way: raw/ (the studies), data/ (the trees that training reads), gaze/, pretrain/ (checkpoints, log.txt,
TensorBoard events), backbone.pth, downstream/
loss of pretraining: {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last""")
if not losses[-1] < losses[0]:
    sys.exit("error: the loss has not fallen")
PYTHON
