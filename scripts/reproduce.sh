#!/usr/bin/env bash
# From the original files to the paper's table: prepare, check, fetch weights, pretrain, export, judge on labelled
# images. Give the data that you have in the variables below, here or in the environment:
#
#   REFLACX=reflacx/1.0.0 IMAGES=mimic-cxr-jpg/2.1.0 RSNA=rsna NIH=nih bash scripts/reproduce.sh
#   REFLACX=... IMAGES=... RSNA=... sbatch --gpus-per-node=4 --cpus-per-task=32 --time=48:00:00 scripts/reproduce.sh
#
# Each step prints its command and is skipped once it is done; the same call goes on where it was stopped or killed. A
# step whose command has changed is done again, and so are those that read what it made. OUT/steps/NAME remembers: without
# it that step is done again too, e.g. prepare where files were added.
#SBATCH --nodes=1 --ntasks=1
#SBATCH --job-name=reproduce
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# USR1 to this script, 120 s before the time limit: the step saves what it has, and the job goes back into the queue.
#SBATCH --signal=B:USR1@120
# shellcheck disable=SC2086,SC2206  # variables of several words are split at blanks, without file names for their stars
set -euof pipefail

# --- Data: directories as their sites give them; what is empty is left out
: "${REFLACX:=}" "${IMAGES:=}"
: "${RSNA:=}" "${NIH:=}" "${CHEXPERT:=}" "${SIIM:=}" "${COVIDX:=}"
# yes: go on where damaged files were listed and left out in preparing, which is an error otherwise
: "${ACCEPT_DAMAGED:=no}"
# yes: also train a gaze predictor, fill a tree of all images in MORE_IMAGES with its heatmaps, and pretrain on both; on
# that tree alone if MORE_IMAGES is IMAGES, since it then holds REFLACX's images too, with their real gaze
: "${PREDICTED_GAZE:=no}" "${MORE_IMAGES:=$IMAGES}"
# --- Training: the paper's values. BATCH_SIZE: images per step, which the GPUs share
: "${OUT:=output_dir/reproduce}" "${EPOCHS:=400}" "${BATCH_SIZE:=128}" "${MODEL:=cxrmim_vit_base_patch16}"
# DEVICE: cuda or cpu; GPUS: of pretraining, auto takes all; WORKERS: processes that read images, per GPU
: "${DEVICE:=cuda}" "${GPUS:=auto}" "${WORKERS:=4}"
# COMPARE: further encoders to judge, imagenet, random, pixels or NAME=FILE; several are split at blanks
: "${FRACTIONS:=0.01 0.1 1}" "${SEEDS:=43 44 45}" "${METHODS:=linear}" "${COMPARE=imagenet random}"
# Further flags of each program, split at blanks; paths in them are absolute
: "${PREPARE_FLAGS:=}" "${MIMIC_FLAGS:=}" "${PRETRAIN_FLAGS:=}" "${GAZE_FLAGS:=}" "${DOWNSTREAM_FLAGS:=}"
# Entries of the REFLACX tree to draw; empty: the first four
: "${PICTURES:=}"
# Initial weights: the ImageNet weights, which are fetched where they are not there; a file; or none
imagenet=preTrain/vit_base_p16_224_timm.pth
: "${PRETRAINED:=$imagenet}"

fail() {
  echo "error: $1" >&2
  exit 1
}

called_from=$PWD
# sbatch runs a copy of this file that lies elsewhere, and is called in the repository.
CDPATH='' cd "$(dirname "$0")/.." 2> /dev/null || :
[ -e scripts/venv.sh ] || cd "${SLURM_SUBMIT_DIR:-.}"
[ -e scripts/venv.sh ] || fail "$PWD is not the repository; call sbatch in its root"

# Paths are as seen from where this is called; below the repository they are told from its root on.
located() { # PATH
  (root=$PWD && cd "$called_from" && realpath -m --relative-base="$root" -- "$1")
}
data=(REFLACX IMAGES MORE_IMAGES RSNA NIH CHEXPERT SIIM COVIDX)
for variable in "${data[@]}" OUT PRETRAINED; do
  case ${!variable} in
    '' | none | output_dir/reproduce | "$imagenet") ;;
    *) printf -v "$variable" %s "$(located "${!variable}")" ;;
  esac
done
compare=()
for word in $COMPARE; do
  case $word in
    *=*) compare+=("${word%%=*}=$(located "${word#*=}")") ;;
    *) compare+=("$word") ;;
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
if [ "$PREDICTED_GAZE" = yes ] && [[ " $PREPARE_FLAGS" == *" --split"* ]]; then
  fail "PREPARE_FLAGS=$PREPARE_FLAGS: PREDICTED_GAZE=yes trains a gaze predictor, which needs all parts; leave out --split"
fi
[ "$PRETRAINED" = none ] || [ "$PRETRAINED" = "$imagenet" ] || [ -f "$PRETRAINED" ] ||
  fail "PRETRAINED=$PRETRAINED: no such file"
matches() { # PATTERN EXPECTED VARIABLE...
  for variable in "${@:3}"; do
    [[ ${!variable} =~ ^($1)$ ]] || fail "$variable=${!variable}: expected $2"
  done
}
matches 'yes|no' 'yes or no' ACCEPT_DAMAGED PREDICTED_GAZE
matches 'cpu|cuda' 'cuda or cpu (CUDA_VISIBLE_DEVICES chooses among GPUs)' DEVICE
matches '[1-9][0-9]{0,8}' 'a number from 1' EPOCHS BATCH_SIZE
matches '[0-9]{1,4}' 'a number from 0' WORKERS
matches 'auto|[1-9][0-9]{0,3}' 'auto or a number from 1' GPUS
matches '[0-9 ]*' 'numbers' PICTURES
# Programs run in the repository, which is not where such a path is meant.
[ . -ef "$called_from" ] || for variable in PREPARE_FLAGS MIMIC_FLAGS PRETRAIN_FLAGS GAZE_FLAGS DOWNSTREAM_FLAGS; do
  for word in ${!variable}; do
    [[ ! ${word#--*=} =~ ^[^-/][^:]*/ && ! -f $called_from/${word#--*=} ]] ||
      fail "$variable: $word: give the absolute path"
  done
done
[[ " $PRETRAIN_FLAGS" != *" --epochs"* ]] || fail "PRETRAIN_FLAGS=$PRETRAIN_FLAGS: set EPOCHS for --epochs"

# What to judge with: name of the step, data set, method, directory of the data.
judged=()
for dataset in rsna nih chexpert siim covidx; do
  variable=${dataset^^}
  [ -n "${!variable}" ] || continue
  [ -n "${METHODS// /}" ] || fail "METHODS is empty; set it to some of linear, probe, finetune"
  for method in $METHODS; do
    judged+=("$dataset-$method" "$dataset" "$method" "${!variable}")
  done
done
[ "${#judged[@]}" -gt 0 ] || echo "note: none of RSNA, NIH, CHEXPERT, SIIM, COVIDX is set: there will be no table"

# shellcheck source=scripts/venv.sh
OLDPWD=$called_from source scripts/venv.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$DEVICE" = cuda ]; then
  count=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  [ "$count" -gt 0 ] || fail "DEVICE=$DEVICE: torch sees no GPU here; DEVICE=cpu runs on the CPU"
  [ "$GPUS" != auto ] || GPUS=$count
  [ "$GPUS" -le "$count" ] || fail "GPUS=$GPUS: torch sees $count here"
fi
[ "$GPUS" != auto ] || GPUS=1
[ $((BATCH_SIZE % GPUS)) = 0 ] || fail "BATCH_SIZE=$BATCH_SIZE: $GPUS GPUs can't share it; set GPUS, or another BATCH_SIZE"
launcher=
[ "$GPUS" = 1 ] || launcher="-m torch.distributed.run --standalone --nproc_per_node $GPUS"

# One at a time in OUT. A step has the lock too: one that outlives a killed script is not disturbed.
refusal=$(mkdir -p "$OUT/steps" 2>&1) || fail "OUT=$OUT: can't be written: ${refusal##*: }"
{ exec 9>> "$OUT/.lock"; } 2> /dev/null || fail "OUT=$OUT: can't be written"
status=0
flock --conflict-exit-code 100 --timeout 2 9 2> /dev/null || status=$?
[ "$status" != 100 ] || fail "OUT=$OUT: $(cat "$OUT/.lock") is at work there; wait for it, or choose another OUT"
[ "$status" = 0 ] || echo "warning: $OUT can't be locked; don't start a second run there" >&2
echo "process $$ on $HOSTNAME" > "$OUT/.lock"

# A signal goes on to the step that runs, as TERM (torchrun dies of USR1), which saves what it has; then this script ends.
set -m # so that Ctrl-C comes here only
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
  if [ "$asked" = USR1 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "error: job $SLURM_JOB_ID is not back in the queue; submit it again" >&2
  fi
  exit 75 # as the programs: unfinished
}
run() { # COMMAND...: its status in $status, after a signal too
  local own
  "$@" &
  child=$!
  [ -z "$asked" ] || tell
  # A signal interrupts a wait, and so does a child that is paused; after its end its own status is still to be had.
  while :; do
    status=0
    wait "$child" 2> /dev/null || status=$? # bash tells there of a child that was killed
    kill -0 "$child" 2> /dev/null || break
    sleep 0.1 || :
  done
  wait "$child" 2> /dev/null && own=0 || own=$?
  [ "$own" = 127 ] || status=$own
  child=
}

write() { # FILE TEXT: whole or not at all
  echo "$2" > "$1.new"
  sync "$1.new" 2> /dev/null || :
  mv "$1.new" "$1"
}

# NAME PROGRAM FLAG...: run a command once; $made then stands for what it made, to the steps that read that. Beforehand:
#   from    what it reads: $made of other steps, and what else decides what comes out
#   on      flags that say where and how it runs, not what comes out; launch: likewise, words before the program
#   place   a directory in which the program goes on; is moved away where something else was begun there
#   afresh  the flag by which the program replaces what it made from something else
# OUT/steps/NAME has three lines: the command, from, and "begun", "begun afresh" or "done" and when. OUT is not named in
# it, so that it can be moved.
from='' on='' launch='' place='' afresh='' # not of the environment
step() {
  local name=$1 mark=$OUT/steps/$1 on=$on what before state=
  shift
  [ -z "$asked" ] || stop "before step '$name'"
  what=$(printf '%q ' "${@//"$OUT"/OUT}" && printf '\nfrom %s' "${from:-the data}")
  if [ -e "$mark" ] && [ "$(head -n 2 "$mark")" = "$what" ]; then
    state=$(sed -n 3p "$mark")
  fi
  if [[ $state == done* ]]; then
    echo "== $name: done before"
  else
    echo "== $name"
    if [ -z "$state" ]; then
      state=begun
      if [ -n "$afresh" ] && [ -e "$mark" ]; then
        state="begun afresh"
      elif [ -n "$place" ] && [ -e "$place" ]; then
        before=$place-before-$(date +%Y%m%d-%H%M%S.%N)
        mv "$place" "$before"
        echo "made from something else before: moved to $before"
      fi
      write "$mark" "$what"$'\n'"$state"
    fi
    [ "$state" = begun ] || on+=" $afresh"
    # Flags of the user come behind $on, and win.
    set -- "$PYTHON" $launch "$1" $on "${@:2}"
    printf '%q ' "$@"
    echo
    echo "process $$ on $HOSTNAME, step $name" > "$OUT/.lock"
    run "$@"
    if [ "$status" = 0 ]; then
      write "$mark" "$what"$'\n'"done $(date +%s.%N)"
    elif [ -z "$asked" ]; then
      echo "error: step '$name' ended with status $status (see above); the same command goes on from here" >&2
      exit "$status"
    fi
    [ -z "$asked" ] || stop "in step '$name'"
  fi
  made=$(sha256sum < "$mark" | cut -c 1-16)
}

judge() { # STEP DATASET METHOD DIRECTORY OUTPUT_DIR FLAG...
  step "$1" run_downstream.py --dataset "$2" --method "$3" --data_path "$4" --output_dir "$5" \
    --fractions $FRACTIONS --seeds $SEEDS "${@:6}" $DOWNSTREAM_FLAGS
}

# In a function, which bash reads whole: this file may be edited while it runs.
chain() {
  accept=
  [ "$ACCEPT_DAMAGED" = no ] || accept=--accept_damaged
  on=$accept afresh=--overwrite step prepare scripts/prepare_reflacx.py --raw "$REFLACX" --images "$IMAGES" \
    --out "$OUT/data/reflacx" $PREPARE_FLAGS
  prepared=$made
  if [ "$PREDICTED_GAZE" = yes ]; then
    on=$accept afresh=--overwrite step prepare_mimic scripts/prepare_mimic.py --images "$MORE_IMAGES" \
      --out "$OUT/data/mimic" $MIMIC_FLAGS
    images=$made
  fi
  trees=("$OUT/data/reflacx")
  pretrain=(--preload --gaze_weighted --warmup_epochs 10 --blr 3e-3 --model "$MODEL" --epochs "$EPOCHS" $PRETRAIN_FLAGS)
  needed=" $PRETRAINED "
  [ "${#judged[@]}" = 0 ] || needed+="$COMPARE "
  if [ ! -e "$imagenet" ] && [[ $needed == *" $imagenet "* || $needed == *" imagenet "* ]]; then
    step weights scripts/fetch_weights.py --out "$imagenet"
  fi

  # The flags of what comes later, too, and the tables of the labelled images, and the encoders to compare with.
  from="$prepared, batches of $BATCH_SIZE" on="--batch_size $BATCH_SIZE" \
    step check run_pretrain.py --check_data --data_path "${trees[@]}" "${pretrain[@]}"
  for ((i = 0; i < ${#judged[@]}; i += 4)); do
    on="--device $DEVICE" judge "${judged[i]}-check" "${judged[@]:i+1:3}" "$OUT/checks/${judged[i]}" --dry_run \
      ${compare[@]+--weights "${compare[@]}"}
  done

  if [ "$PREDICTED_GAZE" = yes ]; then
    from=$prepared place=$OUT/gaze on="--device $DEVICE --num_workers $WORKERS" step gaze run_gaze.py \
      --data_path "$OUT/data/reflacx" --output_dir "$OUT/gaze" $GAZE_FLAGS
    predictor=$made
    from="$prepared $predictor $images" afresh=--overwrite on="--device $DEVICE" step predict scripts/predict_gaze.py \
      --weights "$OUT/gaze/best.pth" --tree "$OUT/data/mimic" --real "$OUT/data/reflacx"
    prepared=$made
    if [ "$MORE_IMAGES" = "$IMAGES" ]; then
      trees=("$OUT/data/mimic")
    else
      trees+=("$OUT/data/mimic")
    fi
  fi

  from="$prepared, batches of $BATCH_SIZE" place=$OUT/pretrain launch=$launcher \
    on="--batch_size $((BATCH_SIZE / GPUS)) --device $DEVICE --num_workers $WORKERS" step pretrain run_pretrain.py \
    --data_path "${trees[@]}" --pretrained "$PRETRAINED" --output_dir "$OUT/pretrain" "${pretrain[@]}"
  pretrained=$made
  checkpoint=$OUT/pretrain/checkpoint-$((EPOCHS - 1)).pth
  from=$pretrained step export scripts/export_backbone.py "$checkpoint" "$OUT/backbone.pth"
  exported=$made

  results=() all=
  for ((i = 0; i < ${#judged[@]}; i += 4)); do
    folder=$OUT/downstream/${judged[i]}
    from=$exported on="--device $DEVICE --num_workers $WORKERS" judge "${judged[@]:i:4}" "$folder" \
      --weights "ours=$OUT/backbone.pth" ${compare[@]+"${compare[@]}"}
    results+=("$folder/results.csv")
    all+="$made "
  done
  if [ "${#results[@]}" -gt 0 ]; then
    from=$all step table scripts/summarize_results.py "${results[@]}" --out "$OUT"
    cat "$OUT/table.md"
  fi
  from=$pretrained step pictures scripts/visualize.py "$checkpoint" --data_path "$OUT/data/reflacx" \
    ${PICTURES:+--index $PICTURES} --device cpu --out "$OUT/pictures.png"
  echo "everything is in $OUT"
}
chain; exit
