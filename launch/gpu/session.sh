#!/usr/bin/env bash
# What a GPU is needed for, in three parts of at most ten minutes, each leaving its results behind:
#   bash launch/gpu/session.sh 1 OUT     environment, tests marked gpu, the classifier at 93 k, 618 k and 2 M classes
#   bash launch/gpu/session.sh 2 OUT     training steps of R50 and R100, attacks, fp16, memory, the largest losses, peers
#   bash launch/gpu/session.sh 3 OUT     feeding, galleries, TensorRT, searches, loaders
# options:
#   --peers DIR      checkouts `insightface` and `ARoFace` in DIR are timed beside ours
#   --wheels DIR     wheels of what this machine's Python lacks; installed for this session alone, without an index
#   --python FILE    an interpreter that has aroface (default: the wheels with python3, else .venv, else it is made)
#   --work DIR       for shards, checkpoints and engines (default: a folder in the system's temporary one)
#   --seconds N      of the whole part (570)
#   --dry-run        print the commands, run nothing
# Every step has its own limit; one that fails, or that has no time left, is named, and the others go on.
set -uo pipefail

usage() {
  sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
}

part='' out='' peers='' wheels='' python='' work='' seconds=570 dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --peers | --wheels | --python | --work | --seconds)
      [ $# -ge 2 ] || usage
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    -*) usage ;;
    *)
      if [ -z "$part" ]; then part=$1; elif [ -z "$out" ]; then out=$1; else usage; fi
      shift
      ;;
  esac
done
[[ $part =~ ^[123]$ && -n $out && $seconds =~ ^[0-9]+$ ]] || usage
work=${work:-${TMPDIR:-/tmp}/aroface-gpu-session}
for name in out peers wheels python work; do
  [ -z "${!name}" ] || printf -v "$name" '%s' "$(realpath -ms "${!name}")"
done
cd "$(dirname "$0")/../.." || exit 2
deadline=$((SECONDS + seconds))

say() { printf '%s\n' "$*"; }

# step NAME LIMIT COMMAND...: the output goes to OUT/NAME.log, its end to the terminal, the outcome to OUT/summary.tsv
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS code
  shift 2
  if [ -n "$dry_run" ]; then
    printf '# %s, at most %s s\n' "$name" "$limit"
    printf '%q ' "$@" | sed 's/\\,/,/g; s/ $/\n/'
    return 0
  fi
  if [ "$left" -lt $((limit / 2)) ]; then
    skip "$name" "it may take $limit s and $left s are left"
    return 0
  fi
  [ "$limit" -le "$left" ] || limit=$left
  case $1 in
    aroface) set -- "$python" -m launch "${@:2}" ;;
    python) set -- "$python" "${@:2}" ;;
  esac
  say "== $name"
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  grep -v '^USDT\|Warning' "$out/$name.log" | tail -n "${show:-6}" | cut -c 1-150
  case $code in
    0) note "$name" ok $((SECONDS - started)) '' ;;
    124 | 137) note "$name" stopped $((SECONDS - started)) "its limit of $limit s" ;;
    *) note "$name" failed $((SECONDS - started)) "exit code $code, see $name.log" ;;
  esac
}

note() {
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$out/summary.tsv"
  say "-- $1: $2 after $3 s${4:+ ($4)}"
}

skip() {
  if [ -n "$dry_run" ]; then say "# skipped: $1, $2"; else note "$1" skipped 0 "$2"; fi
}

prepare() {
  if [ -n "$python" ]; then return 0; fi
  if [ -n "$wheels" ]; then
    python=python3
    # a folder of its own, in front of what the machine has; nothing else of the machine changes
    python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$work/site" "$wheels"/*.whl || return 1
    export PYTHONPATH="$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
  else
    [ -x .venv/bin/python ] || bash launch/setup_environment.sh .venv || return 1
    python=$PWD/.venv/bin/python
  fi
}

part_1() {
  show=40 step doctor 90 aroface doctor
  show=12 step graphs 90 python -m pytest -m gpu tests/gpu/test_graphs.py tests/gpu/test_no_waiting.py -q -p no:cacheprovider
  local classes
  for classes in 617970 93431 2059906; do
    show=16 step "head-$classes" 110 \
      aroface bench head --device cuda --batch 1024 --classes "$classes" --out "$out/head-$classes.json"
  done
  show=16 step head-617970-batch-4096 90 \
    aroface bench head --device cuda --batch 4096 --classes 617970 --out "$out/head-617970-batch-4096.json"
  show=25 step tests 240 python -m pytest -m gpu tests/gpu -q --continue-on-collection-errors -p no:cacheprovider
}

# bench_step DEPTH BATCH CLASSES LIMIT [OPTION...]; `tag` tells runs apart that differ in the options alone
bench_step() {
  local name="step-r$1-batch-$2-classes-$3${tag:-}" graphs=--cuda-graphs
  case ${tag:-} in -eager | -compiled) graphs='' ;; esac
  step "$name" "$4" aroface bench step --depth "$1" --batch "$2" --classes "$3" --logit-precision bf16 --zero-stage 0 \
    $graphs --ways 'plain,adversarial,adversarial (batch),delayed' --rounds 5 --out "$out/$name.json" "${@:5}"
}

peer_steps() {
  if [ -z "$peers" ]; then
    skip "peers-r$1" "no --peers DIR with checkouts"
    return 0
  fi
  show=14 step "peers-r$1" "$2" python -m tests.peers.compare_training "$peers" --parts step --depth "$1" --batch 256 \
    --classes 617970 --logit-precision bf16 --cuda-graphs --steps 1 --rounds 5 --out "$out/peers-r$1.json"
}

part_2() {
  show=45 bench_step 100 512 617970 110 --profile "$out/profile.json.gz"
  tag=-eager bench_step 100 512 617970 75
  peer_steps 100 130
  bench_step 50 512 617970 60
  tag=-fp16 bench_step 100 512 617970 60 --precision fp16
  tag=-compiled bench_step 100 512 617970 110 --compile
  local batch
  for batch in 128 256 1024; do bench_step 100 "$batch" 617970 60; done
  bench_step 100 512 93431 50
  bench_step 100 512 2059906 90
  peer_steps 50 90
  for batch in 128 1024; do bench_step 50 "$batch" 617970 50; done
  tag=-fp16 bench_step 50 512 617970 50 --precision fp16
  bench_step 50 512 93431 40
  bench_step 50 512 2059906 90
  bench_step 50 256 617970 50
}

part_3() {
  step draw 60 aroface synthesize "$work/faces" --identities 500 --images 10
  step pack 60 aroface pack "$work/faces" "$work/shards" --no-summary
  step train 150 aroface train configs/published/ms1mv3_r100_arcface.yaml "data.shards=$work/shards" \
    batch.global_batch=512 optim.lr_per_1024=0.01 schedule.epochs=30 log.tensorboard=false checkpoint.every_steps=1000 \
    --run "$work/run"
  step feeding 30 aroface bench feeding "$work/run" --out "$out/feeding.json"
  show=20 step gallery 200 \
    aroface bench gallery --device cuda --size 10000000 --top 20 --out "$out/gallery-10m.json"
  step onnx 90 aroface export "$work/run" --precision fp16 --out "$work/r100.onnx"
  step engine 200 aroface export "$work/run" --to tensorrt --precision fp16 --batch-profile 1,1,8 \
    --batch-profile 1,64,64 --out "$work/r100.engine"
  show=12 step embed 120 aroface bench export "$work/run" "$work/r100.engine" --batches 1,64 --images 256 \
    --out "$out/embed.json"
  step onnx-runtime 60 aroface bench export "$work/run" "$work/r100.onnx" --batches 64 --images 64 --threads 8 \
    --out "$out/onnx-runtime.json"
  show=16 step searches 90 aroface bench protocols --device cuda --out "$out/searches.json"
  if [ -n "$peers" ]; then
    step peer-loader 90 python -m tests.peers.compare_training "$peers" --parts loader --images 20000 --workers 8 \
      --rounds 3 --out "$out/peer-loader.json"
  else
    skip peer-loader "no --peers DIR with checkouts"
  fi
}

if [ -z "$dry_run" ]; then
  mkdir -p "$out" "$work" || exit 2
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1 | tee "$out/gpu.txt"
  prepare >"$out/environment.log" 2>&1 || {
    tail -n 20 "$out/environment.log"
    say "The environment could not be made: see $out/environment.log, or name an interpreter with --python."
    exit 2
  }
  say "environment ready after $SECONDS s: $("$python" --version 2>&1)"
fi
case $part in
  1) part_1 ;;
  2) part_2 ;;
  3) part_3 ;;
esac
if [ -z "$dry_run" ]; then
  say "== summary of part $part, $SECONDS s"
  cat "$out/summary.tsv"
fi
exit 0
