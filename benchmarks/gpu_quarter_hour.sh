#!/usr/bin/env bash
# Makes the most of a quarter of an hour of one GPU (H100 or H200). In this order, each part writes
# its result into OUT as it ends: attention and its gradients against the reference and beside
# PyTorch's; the train step of iGPT-S, M and L beside torch.compile; decoding at batch 256; the run
# `10m_modern` of configs/cifar10.py (pretraining, probe, fine-tuning) as far as the time goes.
#
# Usage: benchmarks/gpu_quarter_hour.sh [OUT] [--limit=SECONDS] [--data_dir=FOLDER | --cache=FOLDER]
#          [--rehearse]
#
#   OUT         folder for results and logs; default: the variable OUT, or runs/gpu, and for a
#               rehearsal runs/gpu_rehearsal: one folder does not take both
#   --limit     seconds for all of it, 870 unless told
#   --data_dir  folder of TFDS with CIFAR-10, which is written as tokens first, by the CPU
#   --cache     CIFAR-10's tokens, 49 MB, which gptv_jax.prepare has written on any machine; without
#               either, 10m_modern is left out, and the last lines say so
#   --rehearse  the same in miniature on the CPU, with random weights and digits; numbers mean nothing
#
# The same command goes on after a limit, a failure or a kill at any moment: parts and cases that are
# done are not repeated, compiled programs are kept, 10m_modern continues from its last checkpoint.
# Ends by 0 if nothing is left, by 143 if the same command has more to do, by 1 if a part failed.
#
# The machine is assumed to have Linux, an NVIDIA driver and Python 3.11 to 3.13 (PYTHON names
# another one than python3). Where that Python lacks the package's dependencies or a JAX that sees
# the GPU, they are installed into OUT/venv by pip, with JAX for CUDA 13 (driver 580 and later) or
# CUDA 12, and PyTorch and transformers; nothing else is fetched. Without PyTorch the rows of the
# peers say so. The GPU's settings are left as they are.

set -uo pipefail
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
given='' limit=870 data_dir='' cache='' rehearse=''
for flag; do
  case $flag in
    --limit=*[!0-9]*) usage ;;
    --limit=[1-9]* | --data_dir=?* | --cache=?*) declare "${flag#--}" ;;
    --rehearse) rehearse=1 ;;
    -*) usage ;;
    ?*) [[ ! $given ]] || usage; given=$flag ;;
    *) usage ;;
  esac
done
[[ ! $data_dir || ! $cache ]] || usage
out=${given:-${OUT:-runs/gpu${rehearse:+_rehearsal}}}
mkdir -p "$out" || exit 1
out=$(realpath "$out") data_dir=${data_dir:+$(realpath "$data_dir")} cache=${cache:+$(realpath "$cache")}
cd "$(dirname "$0")/.." || exit 1
exec 9>"$out/lock" # which the commands of this script inherit: after a kill they may still be at work
flock --wait 60 9 || { echo "Another command is at work in $out; wait for its end." >&2; exit 1; }
kind=${rehearse:+rehearsal} kind=${kind:-run} # whose finished parts would count for the other
if [[ -e $out/kind && $(<"$out/kind") != "$kind" ]]; then
  echo "$out has a $(<"$out/kind"), and this is a $kind; take another folder for OUT." >&2
  exit 1
fi
echo "$kind" >"$out/kind"

export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/programs}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$out/programs/torch}
python=${PYTHON:-python3} platform=gpu rounds=(--rounds=3 --seconds=0.5 --warm_up=5) quick=() miniature=() times=1
if [[ $rehearse ]]; then
  export JAX_PLATFORMS=cpu
  platform=cpu quick=(--quick) miniature=(--miniature) times=5 # a CPU may be slow
fi

declare -A state
stopped='' child=''
# shellcheck disable=SC2329 # which the trap calls
stop() { stopped=1; [[ ! $child ]] || kill -TERM "$child" 2>/dev/null; }
trap stop TERM INT

# run LOG SECONDS COMMAND...: its exit code; SIGTERM after the seconds, SIGKILL a minute later
run() {
  local log=$1 seconds=$2 code
  shift 2
  printf '%s\n' "$*" >>"$log"
  timeout --foreground --kill-after=60 "$seconds" "$@" >>"$log" 2>&1 &
  child=$!
  while :; do # a signal ends the first wait, not the command
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=''
  return "$code"
}

# part NAME SECONDS COMMAND...: runs the command unless that is done; --limit=LIMIT gets the seconds
part() {
  local name=$1 seconds=$(($2 * times)) left=$((limit - SECONDS)) code=0
  shift 2
  if [[ -e $out/$name.done ]]; then state[$name]="done before"; return; fi
  state[$name]="left: the same command continues"
  ((seconds <= left)) || seconds=$left
  if [[ $stopped ]] || ((seconds < 15)); then return; fi
  echo "$name: at most $seconds s, log in $out/$name.log"
  run "$out/$name.log" $((seconds + 15)) "${@/#--limit=LIMIT/--limit=$seconds}" || code=$?
  case $code in
    0) touch "$out/$name.done"; state[$name]="done" ;;
    124 | 143) ;;
    *) [[ $stopped ]] || state[$name]="failed by exit code $code, see $out/$name.log" ;;
  esac
}

# speed NAME FLAGS...: the command of a benchmark, whose table goes into OUT/results.md
speed() {
  local name=$1
  shift
  command=("$python" -m benchmarks.all --benchmarks="$name" --limit=LIMIT --pieces="$out"
    --write="$out/results.md" "${rounds[@]}" "${quick[@]}" "$@")
}

install() { # the package and further ones, in the time that is left
  [[ $stopped ]] || ((SECONDS >= limit)) ||
    run "$out/setup.log" $((limit - SECONDS)) "$python" -m pip install "${wanted[@]}" "$@"
}

ready() { # whether this Python has what the package needs, and JAX a device of the platform
  "$python" -c "import jax, gptv_jax.stages.run
assert jax.devices()[0].platform == '$platform', jax.devices()" >>"$out/setup.log" 2>&1
}

if [[ ! $rehearse ]] && ! nvidia-smi >>"$out/setup.log" 2>&1; then
  echo "There is no NVIDIA GPU; --rehearse runs in miniature on the CPU." >&2
  exit 1
fi
[[ ! -x $out/venv/bin/python ]] || python=$out/venv/bin/python
if ! ready; then
  echo "setup: installs into $out/venv, log in $out/setup.log"
  wanted=(-e .)
  if [[ ! $rehearse ]]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
    ((${driver%%.*} >= 580)) && wanted+=('jax[cuda13]') || wanted+=('jax[cuda12]')
  fi
  "$python" -m venv --system-site-packages "$out/venv" >>"$out/setup.log" 2>&1
  python=$out/venv/bin/python
  install torch transformers || install
  ready || { echo "setup failed, see $out/setup.log" >&2; exit 1; }
fi
if [[ ! -e $out/results.md ]]; then
  for name in attention train_step decode; do
    printf '## %s\n\n<!-- speed:%s -->\n<!-- /speed:%s -->\n\n' $name{,-$platform,-$platform}
  done >"$out/results.new" && mv "$out/results.new" "$out/results.md"
fi

part attention_error 40 "$python" -m benchmarks.attention_error --out="$out/attention_error.json" "${quick[@]}"
speed attention
part attention 60 "${command[@]}"
speed train_step --only="gptv_jax,PyTorch compiled"
part train_step 300 "${command[@]}"
speed decode --only=gptv_jax,PyTorch,transformers --cases=B256
part decode 120 "${command[@]}"
if [[ $data_dir && ! -e $out/cache/header.json ]]; then # which is written last
  rm -rf "$out/cache" "$out/tokens.done"
  part tokens 120 env JAX_PLATFORMS=cpu "$python" -m gptv_jax.prepare --out="$out/cache" \
    --config=configs/cifar10.py:10m_modern --config.data.dir="$data_dir"
fi
[[ $cache || ! -e $out/cache/header.json ]] || cache=$out/cache
if [[ $cache || $rehearse ]]; then
  part 10m_modern "$limit" "$python" -m benchmarks.reference_runs --runs=10m_modern --limit=LIMIT --reserve=10 \
    --out="$out/reference" ${cache:+--cache="$cache"} "${miniature[@]}"
else
  state[10m_modern]="left out: give CIFAR-10 by --data_dir=FOLDER (TFDS) or --cache=FOLDER (tokens)"
fi

code=0
for name in attention_error attention train_step decode tokens 10m_modern; do
  case ${state[$name]-} in
    '') continue ;;
    failed*) code=1 ;;
    left:*) ((code)) || code=143 ;;
  esac
  echo "$name: ${state[$name]}"
done >"$out/summary.txt"
cat "$out/summary.txt"
exit "$code"
