#!/usr/bin/env bash
# From the original files to the paper's table: prepare, check, fetch weights, pretrain, export, judge on labelled
# images. Give the data that you have in the variables below, here or in the environment:
#
#   REFLACX=reflacx/1.0.0 IMAGES=mimic-cxr-jpg/2.1.0 RSNA=rsna NIH=nih bash scripts/reproduce.sh
#   REFLACX=... IMAGES=... RSNA=... sbatch --gpus-per-node=4 --cpus-per-task=32 --time=48:00:00 scripts/reproduce.sh
#
# Each step prints its command and is skipped once it is done; the same call goes on where it was stopped or killed. A
# step whose command has changed is done again, and so are those that read what it made. OUT/steps/NAME remembers: without
# it that step is done again too, e.g. prepare where files were added. The steps are in scripts/reproduce.py.
#SBATCH --nodes=1 --ntasks=1
#SBATCH --job-name=reproduce
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# USR1 120 s before the time limit: the step saves what it has, and the job goes back into the queue.
#SBATCH --signal=B:USR1@120
set -euo pipefail

set -a # for scripts/reproduce.py
CALLED_FROM=$PWD
# sbatch runs a copy of this file that lies elsewhere, and is called in the repository.
CDPATH='' cd "$(dirname "$0")/.." 2> /dev/null || :
[ -e scripts/venv.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
[ -e scripts/venv.sh ] || { echo "error: $PWD is not the repository; call sbatch in its root" >&2; exit 1; }

# --- Data: directories as their sites give them; what is empty is left out
: "${REFLACX:=}" "${IMAGES:=}"
: "${RSNA:=}" "${NIH:=}" "${CHEXPERT:=}" "${SIIM:=}" "${COVIDX:=}"
# yes: go on where damaged files were listed and left out in preparing, which is an error otherwise
: "${ACCEPT_DAMAGED:=no}"
# yes: also train a gaze predictor, fill a tree of all images in MORE_IMAGES with its heatmaps, and pretrain on both; on
# that tree alone if MORE_IMAGES is IMAGES, since it then holds REFLACX's images too, with their real gaze
: "${PREDICTED_GAZE:=no}" "${MORE_IMAGES:=$IMAGES}"
# --- Training: the paper's values. BATCH_SIZE: images per step, which the GPUs share
: "${OUT:=$PWD/output_dir/reproduce}" "${EPOCHS:=400}" "${BATCH_SIZE:=128}" "${MODEL:=cxrmim_vit_base_patch16}"
# DEVICE: cuda or cpu; GPUS: of pretraining, auto takes all; WORKERS: processes that read images, per GPU
: "${DEVICE:=cuda}" "${GPUS:=auto}" "${WORKERS:=4}"
# COMPARE: further encoders to judge, imagenet, random, pixels or NAME=FILE; see below for paths
: "${FRACTIONS:=0.01 0.1 1}" "${SEEDS:=43 44 45}" "${METHODS:=linear}" "${COMPARE=imagenet random}"
# Further flags of each program, split at blanks; paths are absolute, or as seen from the repository
: "${PREPARE_FLAGS:=}" "${MIMIC_FLAGS:=}" "${PRETRAIN_FLAGS:=}" "${GAZE_FLAGS:=}" "${DOWNSTREAM_FLAGS:=}"
# Entries of the REFLACX tree to draw
: "${PICTURES:=0 1 2 3}"
# Initial weights: the ImageNet weights, which are fetched where they are not there; a file; or none
: "${PRETRAINED:=$PWD/preTrain/vit_base_p16_224_timm.pth}"
# yes: a line for each step; what it says goes into OUT/steps/NAME.txt
: "${QUIET:=no}"

# shellcheck source=scripts/venv.sh
OLDPWD=$CALLED_FROM source scripts/venv.sh
exec "$PYTHON" scripts/reproduce.py "$@" # in place of this shell, so that signals reach it
