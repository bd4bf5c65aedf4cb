#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that has the JobSet controller, by launch/jobset.yaml. Pods
# that are evicted or die are started anew, and the run goes on from its last checkpoint.
#
# Usage: launch/gke_jobset.sh --name=NAME --image=IMAGE --accelerator=KIND --topology=AxB[xC]
#          --claim=CLAIM [--slices=1] [--chips=4] [--restarts=50] [--dry-run]
#          -- --config=FILE --workdir=/runs/FOLDER [FLAG ...]
#
#   --image        made and pushed before: docker build --file=launch/Dockerfile --tag=IMAGE .
#   --accelerator  as nodes are labelled: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
#   --topology     of a slice; --chips: of a host of it
#   --claim        persistent volume claim (ReadWriteMany), which all pods have as /runs
#   --restarts     of all pods, preemptions among them, after which the JobSet fails
#
# kubectl's current context says which cluster.

set -euo pipefail
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name='' image='' accelerator='' topology='' claim='' slices=1 chips=4 restarts=50 dry=''
while (($#)); do
  case $1 in
    --name=?* | --image=?* | --accelerator=?* | --topology=*[0-9]x[0-9]* | --claim=?*) declare "${1#--}" ;;
    --slices=*[!0-9]* | --chips=*[!0-9]* | --restarts=*[!0-9]*) usage ;;
    --slices=[1-9]* | --chips=[1-9]* | --restarts=[0-9]*) declare "${1#--}" ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) usage ;;
  esac
  shift
done
[[ $name && $image && $accelerator && $topology && $claim ]] || usage
[[ " $*" == *" --config="* && " $*" == *" --workdir="* ]] || usage

((hosts = ${topology//x/*} / chips)) || usage
flags=''
for flag; do # as JSON strings, which YAML reads
  flag=${flag//\\/"\\\\"}
  flags+=", \"${flag//\"/"\\\""}\""
done
manifest=$(<"$(dirname "$0")/jobset.yaml")
for field in name="$name" image="$image" accelerator="$accelerator" topology="$topology" \
  claim="$claim" slices="$slices" hosts="$hosts" chips="$chips" restarts="$restarts" flags="${flags:2}"; do
  manifest=${manifest//"{${field%%=*}}"/"${field#*=}"}
done
if [[ $dry ]]; then
  printf "kubectl apply --filename=- <<'END'\n%s\nEND\n" "$manifest"
else
  kubectl apply --filename=- <<<"$manifest"
fi
