#!/usr/bin/env bash
# Trains with several processes on this machine, as on several hosts: to try it.
#
# Usage: launch/local.sh --processes=N [--devices=D] [--dry-run]
#          -- --config=FILE --workdir=FOLDER [FLAG ...]
#
#   --devices  CPU devices that each process has; 1 unless told
#   --dry-run  prints the commands and runs none
#
# What follows -- goes to gptv_jax.main. Where one process ends badly, the others are told to stop
# (SIGTERM), and this one ends with its exit code. Ctrl-C tells all of them.

set -euo pipefail
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
processes='' devices=1 dry=''
while (($#)); do
  case $1 in
    --processes=*[!0-9]* | --devices=*[!0-9]*) usage ;;
    --processes=[1-9]*) processes=${1#*=} ;;
    --devices=[1-9]*) devices=${1#*=} ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ $processes && " $*" == *" --config="* && " $*" == *" --workdir="* ]] || usage

free='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=$(python -c "$free")
pids=()
stop() { ((${#pids[@]} == 0)) || kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop INT TERM # in a script, what runs in the background does not hear Ctrl-C itself
for ((i = 0; i < processes; i++)); do
  command=(env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices" python -m gptv_jax.main
    --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$i" "$@")
  if [[ $dry ]]; then
    (PS4=; set -x; : "${command[@]}") 2>&1 | sed 's/^: //; s/$/ \&/'
    continue
  fi
  "${command[@]}" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done

code=0
while ((${#pids[@]})); do
  sleep 0.2
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    status=0
    wait "${pids[i]}" || status=$?
    unset "pids[i]"
    if ((status && !code)); then code=$status && stop; fi
  done
done
exit "$code"
