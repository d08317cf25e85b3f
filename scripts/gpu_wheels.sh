#!/usr/bin/env bash
# usage: gpu_wheels.sh DIR [NAME...]    the wheels that a machine with a GPU lacks, which has torch, transformers, peft,
# accelerate, huggingface_hub, pytest, hypothesis, typer and rich, and no network: for scripts/gpu_day.sh --wheels DIR.
# For Python 3.12 on x86-64 Linux, in the versions of constraints.txt; NAME: more of them.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dir=$1
shift
# What diffusers and cache-dit need beside what is there: importlib_metadata, and with it lazy-importer.
names=(diffusers cache_dit importlib_metadata lazy-importer allpairspy "$@")
pins=()
for name in "${names[@]}"; do
  pin=$(grep -i "^${name//[-_]/[-_]}==" "$root/constraints.txt") || { echo "$name: not in constraints.txt" >&2; exit 1; }
  pins+=("$pin")
done
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
mkdir -p "$dir"
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" -d "$dir" "${pins[@]}"
twice=$(cd "$dir" && ls ./*.whl | sed 's/-.*//' | sort | uniq -d)
[ -z "$twice" ] || { echo "two versions in $dir of: $twice" >&2; exit 1; }
total=$(cat "$dir"/*.whl | wc -c)
ls "$dir"
echo "$((total / 1024)) KiB in all"
[ "$total" -le $((40 * 1024 * 1024)) ] || { echo "more than 40 MiB" >&2; exit 1; }
