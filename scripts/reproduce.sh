#!/usr/bin/env bash
# From the original files to the paper's table: prepare, check, fetch weights, pretrain, export, judge on labelled
# images. Give the data that you have in the variables below, here or in the environment:
#
#   REFLACX=reflacx/1.0.0 IMAGES=mimic-cxr-jpg/2.1.0 RSNA=rsna NIH=nih bash scripts/reproduce.sh
#   REFLACX=... IMAGES=... RSNA=... sbatch --gpus-per-node=4 --cpus-per-task=32 --time=48:00:00 scripts/reproduce.sh
#
# Each step prints its command and is skipped once it is done; the same call goes on where it was stopped or killed. A
# step whose command has changed is done again, and so are those that read what it made. OUT/steps/ remembers: without
# OUT/steps/NAME that step is done again too, e.g. prepare where files were added.
#SBATCH --nodes=1 --ntasks=1
#SBATCH --job-name=reproduce
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# USR1 to this script, 120 s before the time limit: the step saves what it has, and the job goes back into the queue.
#SBATCH --signal=B:USR1@120
set -euo pipefail

# --- Data: directories as their sites give them; what is empty is left out
: "${REFLACX:=}" "${IMAGES:=}"
: "${RSNA:=}" "${NIH:=}" "${CHEXPERT:=}" "${SIIM:=}" "${COVIDX:=}"
# yes: go on where damaged files were listed and left out in preparing, which is an error otherwise
: "${ACCEPT_DAMAGED:=no}"
# yes: also train a gaze predictor, fill a tree of all images in MORE_IMAGES with its heatmaps, and pretrain on both
: "${PREDICTED_GAZE:=no}" "${MORE_IMAGES:=$IMAGES}"
# --- Training: the paper's values
: "${OUT:=output_dir/reproduce}" "${EPOCHS:=400}" "${BATCH_SIZE:=128}" "${MODEL:=cxrmim_vit_base_patch16}"
# WORKERS: processes that read images, per GPU
: "${DEVICE:=cuda}" "${GPUS:=auto}" "${WORKERS:=4}"
: "${FRACTIONS:=0.01 0.1 1}" "${SEEDS:=43 44 45}" "${METHODS:=linear}" "${COMPARE=imagenet random}"
# Further flags of each program, split at blanks
: "${PREPARE_FLAGS:=}" "${MIMIC_FLAGS:=}" "${PRETRAIN_FLAGS:=--warmup_epochs 10 --blr 3e-3}" "${GAZE_FLAGS:=}" "${DOWNSTREAM_FLAGS:=}"
# Entries of the REFLACX tree to draw
: "${PICTURES:=0 1 2 3}"
# Initial weights: the ImageNet weights, which are fetched where they are not there; a file; or none
imagenet=preTrain/vit_base_p16_224_timm.pth
: "${PRETRAINED:=$imagenet}"

fail() {
  echo "error: $1" >&2
  exit 1
}

# Paths are as seen from where this is called; sbatch runs a copy of this file that lies elsewhere. Below the repository
# they are told from its root on, so that one place has one name.
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -e scripts/venv.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
[ -e scripts/venv.sh ] || fail "$PWD is not the repository; call sbatch in its root"
data=(REFLACX IMAGES MORE_IMAGES RSNA NIH CHEXPERT SIIM COVIDX)
for variable in "${data[@]}" OUT PRETRAINED; do
  case ${!variable} in
    '' | none | output_dir/reproduce | "$imagenet") ;;
    *) printf -v "$variable" %s "$(cd "$called_from" && realpath -ms --relative-base="$OLDPWD" -- "${!variable}")" ;;
  esac
done

# --- Whatever can be wrong is told now, not after hours of work
[ $# = 0 ] || fail "$1: this script takes variables in front of it, no words behind it"
if [ -z "$REFLACX" ] || [ -z "$IMAGES" ]; then
  fail "set REFLACX (e.g. reflacx-xray-localization/1.0.0) and IMAGES (MIMIC-CXR-JPG or MIMIC-CXR), and what you have \
of RSNA, NIH, CHEXPERT, SIIM, COVIDX, to the directories of the data; the top of scripts/reproduce.sh says more"
fi
for variable in "${data[@]}"; do
  [ -z "${!variable}" ] || [ -d "${!variable}" ] || fail "$variable=${!variable}: no such directory"
done
[ "$PRETRAINED" = none ] || [ "$PRETRAINED" = "$imagenet" ] || [ -f "$PRETRAINED" ] ||
  fail "PRETRAINED=$PRETRAINED: no such file"
for variable in ACCEPT_DAMAGED PREDICTED_GAZE; do
  [[ ${!variable} =~ ^(yes|no)$ ]] || fail "$variable=${!variable}: expected yes or no"
done
[[ $EPOCHS =~ ^[1-9][0-9]*$ ]] || fail "EPOCHS=$EPOCHS: expected a number from 1"
[[ $GPUS =~ ^(auto|[1-9][0-9]*)$ ]] || fail "GPUS=$GPUS: expected auto or a number from 1"

# Words of a variable as an array, without file names for its stars.
set -f
# shellcheck disable=SC2206
prepare_flags=($PREPARE_FLAGS) mimic_flags=($MIMIC_FLAGS) pretrain_flags=($PRETRAIN_FLAGS) gaze_flags=($GAZE_FLAGS)
# shellcheck disable=SC2206
downstream_flags=($DOWNSTREAM_FLAGS) fractions=($FRACTIONS) seeds=($SEEDS) methods=($METHODS) compare=($COMPARE) pictures=($PICTURES)
set +f
# What to judge with: name of the step, data set, method, directory of the data.
judged=()
for dataset in rsna nih chexpert siim covidx; do
  variable=${dataset^^}
  [ -n "${!variable}" ] || continue
  [ "${#methods[@]}" -gt 0 ] || fail "METHODS is empty; set it to some of linear, probe, finetune"
  for method in "${methods[@]}"; do
    judged+=("$dataset-$method" "$dataset" "$method" "${!variable}")
  done
done
[ "${#judged[@]}" -gt 0 ] || echo "note: none of RSNA, NIH, CHEXPERT, SIIM, COVIDX is set: there will be no table"

# shellcheck source=scripts/venv.sh
OLDPWD=$called_from source scripts/venv.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$DEVICE" != cpu ]; then
  count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  [ "$count" -gt 0 ] || fail "DEVICE=$DEVICE: torch sees no GPU here; DEVICE=cpu runs on the CPU"
  [ "$GPUS" != auto ] || GPUS=$count
  [ "$GPUS" -le "$count" ] || fail "GPUS=$GPUS: torch sees $count here"
fi
[ "$GPUS" != auto ] || GPUS=1
launcher=()
[ "$GPUS" = 1 ] || launcher=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS")

# One at a time in OUT. A step has the lock too: one that outlives a killed script is not disturbed.
refusal=$(mkdir -p "$OUT/steps" 2>&1) || fail "OUT=$OUT: can't be written: ${refusal##*: }"
{ exec 9>> "$OUT/.lock"; } 2> /dev/null || fail "OUT=$OUT: can't be written"
status=0
flock --conflict-exit-code 100 --timeout 2 9 2> /dev/null || status=$?
[ "$status" != 100 ] || fail "OUT=$OUT: $(cat "$OUT/.lock") is at work there; wait for it, or choose another OUT"
[ "$status" = 0 ] || echo "warning: $OUT can't be locked; don't start a second run there" >&2

# A signal goes on to the step that runs, as TERM (torchrun dies of USR1), which saves what it has; then this script ends.
set -m
child='' asked=''
for signal in INT TERM HUP USR1 USR2; do
  # shellcheck disable=SC2064  # the signal's name of now is meant
  trap "asked=$signal; tell" "$signal"
done
# shellcheck disable=SC2329  # called by trap
tell() {
  [ -z "$child" ] || kill -TERM -- "$child" 2> /dev/null || :
}
stop() { # WHERE
  echo "stopped by SIG$asked $1; the same command goes on from here" >&2
  case $asked in
    INT) exit 130 ;;
    TERM) exit 143 ;;
    HUP) exit 129 ;;
  esac
  [ "$asked" != USR1 ] || [ -z "${SLURM_JOB_ID:-}" ] || scontrol requeue "$SLURM_JOB_ID"
  exit 75 # as the programs: unfinished
}

write() { # FILE TEXT: whole or not at all
  echo "$2" > "$1.new"
  mv "$1.new" "$1"
}

# NAME PROGRAM FLAG...: run a command once; $made is then what it made, for the steps that read that. Beforehand:
#   from    what it reads: $made of other steps
#   on      flags that say where and how it runs, not what comes out; on_gpus=yes: in one process per GPU
#   place   a directory in which the program goes on; is moved away where something else was begun there
#   afresh  the flag by which the program replaces what it made from something else
from='' on='' on_gpus=no place='' afresh='' # not of the environment
step() {
  local name=$1 mark=$OUT/steps/$1 status=0 own what before machine=() launch=()
  shift
  [ -z "$asked" ] || stop "before step '$name'"
  what=$(printf '%q ' "$@" && printf '\nfrom %s' "${from:-the data}")
  if [ -e "$mark" ] && [ "$(head -n 2 "$mark")" = "$what" ]; then
    echo "== $name: done before"
    made=$(sha256sum < "$mark" | cut -c 1-16)
    return
  fi
  echo "== $name"
  rm -f "$mark"
  if [ "$(cat "$mark.begun" 2> /dev/null)" != "$what" ]; then
    if [ -n "$place" ] && [ -e "$place" ]; then
      before=$place-before-$(date +%Y%m%d-%H%M%S.%N)
      mv "$place" "$before"
      echo "made from something else before: moved to $before"
    fi
    [ -z "$afresh" ] || [ ! -e "$mark.begun" ] || touch "$mark.afresh"
    write "$mark.begun" "$what"
  fi
  [ ! -e "$mark.afresh" ] || machine=("$afresh")
  read -r -a machine <<< "${machine[*]} $on"
  [ "$on_gpus" = no ] || launch=(${launcher[@]+"${launcher[@]}"})
  set -- "$PYTHON" ${launch[@]+"${launch[@]}"} "$@" ${machine[@]+"${machine[@]}"}
  printf '%q ' "$@"
  echo
  echo "process $$ on $HOSTNAME, step $name" > "$OUT/.lock"
  "$@" &
  child=$!
  [ -z "$asked" ] || tell
  # A signal interrupts a wait, after whose end the child's own status is still to be had.
  while :; do
    status=0
    wait "$child" 2> /dev/null || status=$? # bash tells there of a child that was killed
    kill -0 "$child" 2> /dev/null || break
  done
  wait "$child" 2> /dev/null && own=0 || own=$?
  [ "$own" = 127 ] || status=$own
  child=
  if [ "$status" = 0 ]; then
    write "$mark" "$what"$'\n'"done $(date +%s.%N)"
    rm -f "$mark.afresh"
    made=$(sha256sum < "$mark" | cut -c 1-16)
  elif [ -z "$asked" ]; then
    echo "error: step '$name' ended with status $status (see above); the same command goes on from here" >&2
    exit "$status"
  fi
  [ -z "$asked" ] || stop "in step '$name'"
}

accept=
[ "$ACCEPT_DAMAGED" = no ] || accept=--accept_damaged
on=$accept afresh=--overwrite step prepare scripts/prepare_reflacx.py --raw "$REFLACX" --images "$IMAGES" \
  --out "$OUT/data/reflacx" ${prepare_flags[@]+"${prepare_flags[@]}"}
prepared=$made
trees=("$OUT/data/reflacx")
pretrain=(--preload --gaze_weighted --model "$MODEL" --epochs "$EPOCHS" --batch_size "$BATCH_SIZE"
  ${pretrain_flags[@]+"${pretrain_flags[@]}"})
downstream() { # DATASET METHOD DIRECTORY FLAG...
  step "$name" run_downstream.py --dataset "$1" --data_path "$3" --method "$2" --fractions "${fractions[@]}" \
    --seeds "${seeds[@]}" "${@:4}" ${downstream_flags[@]+"${downstream_flags[@]}"}
}
# The flags of what comes later, too, and the tables of the labelled images.
from=$prepared step check run_pretrain.py --check_data --data_path "${trees[@]}" "${pretrain[@]}"
for ((i = 0; i < ${#judged[@]}; i += 4)); do
  name=${judged[i]}-check on="--device $DEVICE" downstream "${judged[@]:i+1:3}" --dry_run --output_dir "$OUT/checks/${judged[i]}"
done
needed=" $PRETRAINED "
[ "${#judged[@]}" = 0 ] || needed+="${compare[*]-} "
if [ ! -e "$imagenet" ] && [[ $needed == *" $imagenet "* || $needed == *" imagenet "* ]]; then
  step weights scripts/fetch_weights.py --out "$imagenet"
fi

if [ "$PREDICTED_GAZE" = yes ]; then
  from=$prepared place=$OUT/gaze on="--device $DEVICE --num_workers $WORKERS" on_gpus=yes step gaze run_gaze.py \
    --data_path "$OUT/data/reflacx" --output_dir "$OUT/gaze" ${gaze_flags[@]+"${gaze_flags[@]}"}
  predictor=$made
  on=$accept afresh=--overwrite step prepare_mimic scripts/prepare_mimic.py --images "$MORE_IMAGES" --out "$OUT/data/mimic" \
    ${mimic_flags[@]+"${mimic_flags[@]}"}
  from="$prepared $predictor $made" afresh=--overwrite on="--device $DEVICE" step predict scripts/predict_gaze.py \
    --weights "$OUT/gaze/best.pth" --tree "$OUT/data/mimic" --real "$OUT/data/reflacx"
  prepared=$made
  trees+=("$OUT/data/mimic")
fi

from=$prepared place=$OUT/pretrain on="--device $DEVICE --num_workers $WORKERS" on_gpus=yes step pretrain run_pretrain.py \
  --data_path "${trees[@]}" --pretrained "$PRETRAINED" --output_dir "$OUT/pretrain" "${pretrain[@]}"
pretrained=$made
checkpoint=$OUT/pretrain/checkpoint-$((EPOCHS - 1)).pth
from=$pretrained step export scripts/export_backbone.py "$checkpoint" "$OUT/backbone.pth"
exported=$made
from=$pretrained step pictures scripts/visualize.py "$checkpoint" --data_path "$OUT/data/reflacx" \
  --index "${pictures[@]}" --device cpu --out "$OUT/pictures.png"

results=() all=
for ((i = 0; i < ${#judged[@]}; i += 4)); do
  folder=$OUT/downstream/${judged[i]}
  from=$exported on="--device $DEVICE --num_workers $WORKERS" name=${judged[i]} downstream "${judged[@]:i+1:3}" \
    --weights "ours=$OUT/backbone.pth" ${compare[@]+"${compare[@]}"} --output_dir "$folder"
  results+=("$folder/results.csv")
  all+="$made "
done
if [ "${#results[@]}" -gt 0 ]; then
  from=$all step table scripts/summarize_results.py "${results[@]}" --out "$OUT"
  cat "$OUT/table.md"
fi
echo "everything is in $OUT"
