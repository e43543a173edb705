#!/usr/bin/env bash
# The whole way on made-up data: raw REFLACX layout -> processed tree -> pretraining -> picture.
# A few minutes on two CPU cores once .venv is there. Everything lands in output_dir/demo/, anew
# in each run; the same numbers come out each time. Nothing in it is of medical use.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
out=output_dir/demo
rm -rf "$out"

echo "== 1. A phantom study in the raw REFLACX layout, with one real radiograph (simulated gaze)"
"$PYTHON" scripts/make_phantom.py --out "$out/raw" --n_images 47 --real_radiograph

echo "== 2. Prepare it: heatmaps from fixations, 8-bit images, the list reflacx.json"
"$PYTHON" scripts/prepare_reflacx.py --raw "$out/raw/reflacx" --images "$out/raw/mimic" --out "$out/data"

echo "== 3. Pretrain a tiny model"
"$PYTHON" run_pretrain.py --model cxrmim_vit_tiny_patch16 --pretrained none \
  --data_path "$out/data" --preload --gaze_weighted --output_dir "$out/run" \
  --batch_size 8 --epochs 40 --warmup_epochs 2 --blr 4e-2 --num_workers 2 --image_every 0

echo "== 4. Look at what it does (the real radiograph is the last entry of the list)"
"$PYTHON" scripts/visualize.py "$out/run/checkpoint-39.pth" --data_path "$out/data" \
  --index 47 0 1 2 --out "$out/pictures.png"

"$PYTHON" - "$out" <<'PYTHON'
import json, sys
out = sys.argv[1]
losses = [json.loads(line)["train_loss"] for line in open(f"{out}/run/log.txt")]
print(f"""
Made:
  {out}/raw/       the study: images (JPG and one DICOM), fixations, ellipses, metadata
  {out}/data/      the processed tree that training reads
  {out}/run/       checkpoint-39.pth, log.txt, args.json, TensorBoard events
  {out}/pictures.png   image, gaze, mask, HOG target and prediction
loss: {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last""")
if not losses[-1] < losses[0]:
    sys.exit("error: the loss has not fallen")
PYTHON
