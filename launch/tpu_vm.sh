#!/usr/bin/env bash
# Trains on one TPU VM. The same command again continues the run, on a new VM where the old one was
# preempted.
#
# Usage: launch/tpu_vm.sh --name=NAME --zone=ZONE --project=PROJECT --type=TYPE --version=VERSION
#          [--spot] [--setup=COMMAND] [--dry-run] -- --config=FILE --workdir=FOLDER [FLAG ...]
#
#   --type     accelerator type of one host, such as v5litepod-8 or v6e-8
#   --version  of the VM's software: v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e
#   --spot     cheaper, and may be taken away at any time
#   --setup    command for the VM, before the run: to mount what --workdir lies on, for example
#   --dry-run  prints the commands and runs none
#
# The code is that of HEAD. What follows -- goes to gptv_jax.main, whose exit code this one ends with.

set -euo pipefail
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name='' zone='' project='' type='' version='' setup=true dry='' spot=''
while (($#)); do
  case $1 in
    --name=?* | --zone=?* | --project=?* | --type=?* | --version=?* | --setup=?*) declare "${1#--}" ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ $name && $zone && $project && $type && $version ]] || usage
[[ " $*" == *" --config="* && " $*" == *" --workdir="* ]] || usage
cd "$(dirname "$0")/.."

run() { if [[ $dry ]]; then (PS4=; set -x; : "$@") 2>&1 | sed 's/^: //'; else "$@"; fi; }
vm() { run gcloud compute tpus tpu-vm "$@" --zone="$zone" --project="$project"; }

state=''
[[ $dry ]] || state=$(vm list --filter="name~/$name\$" --format='value(state)')
if [[ $dry || $state == PREEMPTED || $state == TERMINATED ]]; then
  [[ ! $dry ]] || echo '# Only where it was preempted:'
  vm delete "$name" --quiet
  state=''
fi
[[ ! $dry ]] || echo '# Only where it is not there:'
[[ $state ]] || vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
[[ ! $dry ]] || echo '# Every time:'
file=${TMPDIR:-/tmp}/gptv_jax-$name.tar
run git archive --output="$file" HEAD
vm scp "$file" "$name:gptv_jax.tar"
unpack='mkdir -p gptv_jax && tar -xf gptv_jax.tar -C gptv_jax'
printf -v train '%q ' gptv_jax/launch/tpu_host.sh --setup="$setup" -- --distributed=off "$@"
alive=--ssh-flag=-oServerAliveInterval=30 # or a VM that is taken away would leave ssh waiting
code=0
vm ssh "$name" "$alive" --command="$unpack && $train" || code=$?
echo "# $name stays, and costs, until: gcloud compute tpus tpu-vm delete $name --zone=$zone --project=$project"
exit "$((code == 78 ? 1 : code))"
