#!/usr/bin/env bash
# Installs the code that lies around this file, and trains: what tpu_vm.sh and tpu_pod.sh run on
# every host.
#
# Usage: launch/tpu_host.sh [--setup=COMMAND] [--dry-run] -- --config=FILE --workdir=FOLDER [FLAG ...]
#
# Ends as gptv_jax.main does, but with 78 for its 1: gcloud ends with 1 for reasons of its own.

set -euo pipefail
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
setup=true dry=''
while (($#)); do
  case $1 in
    --setup=?*) setup=${1#*=} ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ " $*" == *" --config="* && " $*" == *" --workdir="* ]] || usage
cd "$(dirname "$0")/.."

run() { if [[ $dry ]]; then (PS4=; set -x; : "$@") 2>&1 | sed 's/^: //'; else "$@"; fi; }

trap '' HUP # a machine that is taken away sends it beside SIGTERM, which alone is the run's to answer
if [[ ! $dry ]]; then
  exec 9>"$HOME/gptv_jax.lock"
  flock 9 # a run whose ssh connection broke may still be under way; its processes hold the lock
fi
run bash -c "$setup"
run python3 -m pip install --quiet --user uv # the system's Python may be older than 3.11
run python3 -m uv venv --quiet --allow-existing --python=3.12 "$HOME/gptv_jax.venv"
run python3 -m uv pip install --quiet --python="$HOME/gptv_jax.venv" -e '.[tpu]'
code=0
run "$HOME/gptv_jax.venv/bin/python" -m gptv_jax.main "$@" || code=$?
exit "$((code == 1 ? 78 : code))"
