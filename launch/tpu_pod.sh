#!/usr/bin/env bash
# Trains on all hosts of one or several TPU slices, by a queued resource: asks for it, runs, and
# after a preemption asks for it anew and runs the same command again, until the run is finished.
#
# Usage: launch/tpu_pod.sh --name=NAME --zone=ZONE --project=PROJECT --type=TYPE --version=VERSION
#          [--slices=1] [--spot] [--setup=COMMAND] [--tries=20] [--dry-run]
#          -- --config=FILE --workdir=FOLDER [FLAG ...]
#
# As tpu_vm.sh; --type is of one slice, such as v5litepod-256, --setup mounts --workdir on every
# host, --tries are failures in a row. Before it: ssh-add ~/.ssh/google_compute_engine

set -euo pipefail
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name='' zone='' project='' type='' version='' slices=1 setup=true tries=20 dry='' spot=''
while (($#)); do
  case $1 in
    --name=?* | --zone=?* | --project=?* | --type=?* | --version=?* | --setup=?*) declare "${1#--}" ;;
    --slices=*[!0-9]* | --tries=*[!0-9]*) usage ;;
    --slices=[1-9]* | --tries=[1-9]*) declare "${1#--}" ;;
    --spot) spot=1 ;; --dry-run) dry=1 ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ $name && $zone && $project && $type && $version ]] || usage
[[ " $*" == *" --config="* && " $*" == *" --workdir="* ]] || usage
cd "$(dirname "$0")/.."
run() { if [[ $dry ]]; then (PS4=; set -x; : "$@") 2>&1 | sed 's/^: //'; else "$@"; fi; }
pod() { run gcloud compute tpus queued-resources "$@" --zone="$zone" --project="$project"; }
if ((slices > 1)); then nodes=--node-count=$slices; else nodes=--node-id=$name; fi
# By default the 65th host waits for the others' end, and one that is taken away is not missed.
all=(--node=all --worker=all --batch-size=all) alive=--ssh-flag=-oServerAliveInterval=30
file=${TMPDIR:-/tmp}/gptv_jax-$name.tar
printf -v train '%q ' gptv_jax/launch/tpu_host.sh --setup="$setup" -- --distributed=tpu "$@"
train="mkdir -p gptv_jax && tar -xf gptv_jax.tar -C gptv_jax && $train"
answer() { # to the state of the queued resource
  case $1 in
    ABSENT) pod create "$name" "$nodes" --accelerator-type="$type" --runtime-version="$version" \
      ${spot:+--spot} ;;
    ACTIVE) run git archive --output="$file" HEAD && pod scp "$file" "$name:gptv_jax.tar" "${all[@]}" &&
      pod ssh "$name" "${all[@]}" "$alive" --command="$train" ;;
    SUSPENDED) pod delete "$name" --force --quiet ;; # which is what a preemption leads to
    FAILED) pod describe "$name"; exit 1 ;;
  esac
}
for state in ${dry:+ABSENT ACTIVE SUSPENDED}; do echo "# Where it is $state:"; answer "$state"; done
for ((left = dry ? 0 : tries, code = 0; left; )); do
  code=0 && state=$(pod list --filter="name~/$name\$" --format='value(state.state)') &&
    answer "${state:-ABSENT}" || code=$?
  case $state:$code in
    ACTIVE:0) echo "Finished; until it is deleted, $name costs." && exit ;;
    ACTIVE:78) exit 1 ;;             # something to mend, says the run
    *:0 | ACTIVE:143) left=$tries ;; # 143: told to stop, and saved
    *) left=$((left - 1)) ;;
  esac
  sleep 30
done
exit "$code"
