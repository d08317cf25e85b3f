#!/usr/bin/env bash
# usage: gpu_day.sh [--dry] [--out FOLDER] [--part NAME] [--wheels DIR] [--list]
# All there is to do on a machine with a GPU, in parts of at most ten minutes: tests/gpu, then benchmarks/gpu.py.
#   --dry     the same code on a CPU, in minutes: one test of ten, tiny models, one part of the benchmarks
#   --out     where results lie: NAME.log and what a part writes, NAME.done behind it, and summary.txt (out/gpu)
#   --part    this one alone; else all, in order, but for those that are done
#   --wheels  what is not installed here, from scripts/gpu_wheels.sh
# It takes the python3 on the PATH (or $PYTHON), which has torch, and needs no network. fx_cache need not be installed.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
dry='' out=out/gpu part='' wheels='' list=''
while [ $# -gt 0 ]; do
  case $1 in
    --dry) dry=1 ;;
    --list) list=1 ;;
    --out) out=$2; shift ;;
    --part) part=$2; shift ;;
    --wheels) wheels=$2; shift ;;
    *) echo "gpu_day.sh: got $1; expected --dry, --out, --part, --wheels or --list" >&2; exit 2 ;;
  esac
  shift
done

tests=4
names=()
for i in $(seq $tests); do names+=("tests-$i"); done
for i in $(seq "$(grep -c '^    Part(' "$root/benchmarks/gpu.py")"); do
  [ -n "$dry" ] && [ -z "$part$list" ] && [ "$i" != 1 ] && continue
  names+=("bench-$i")
done
all=("${names[@]}")
if [ -n "$list" ]; then
  printf '%s\n' "${names[@]}"
  exit
fi
if [ -n "$part" ]; then
  [[ " ${names[*]} " == *" $part "* ]] || { echo "gpu_day.sh: got part $part; expected one of ${names[*]}" >&2; exit 2; }
  names=("$part")
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
cd "$root"
# What an installation would leave: torch finds the backend by it.
"$python" - "$site" <<'END'
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
folder = Path(sys.argv[1]) / f"{project['name']}-{project['version']}.dist-info"
folder.mkdir()
about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
(folder / "METADATA").write_text(about)
lines = []
for group, entries in project["entry-points"].items():
    lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), ""]
(folder / "entry_points.txt").write_text("\n".join(lines))
END

# run NAME: one part; its exit status is that of what ran.
run() {
  local number=${1#*-} flags=()
  case $1 in
    tests-*)
      export FX_CACHE_GPU_PART="$number/$tests"
      [ -n "$dry" ] && export FX_CACHE_GPU_DRY=1 FX_CACHE_GPU_EVERY="${FX_CACHE_GPU_EVERY:-10}"
      "$python" -c 'import xdist' 2> /dev/null && flags=(-n "${FX_CACHE_GPU_JOBS:-$([ -n "$dry" ] && echo 2 || echo 4)}")
      timeout -k 10 580 "$python" -m pytest tests/gpu -p no:cacheprovider -rf --durations=10 "${flags[@]}" \
        --junitxml "$out/$1.xml"
      ;;
    bench-*)
      [ -n "$dry" ] && flags=(--dry --seconds "${FX_CACHE_GPU_SECONDS:-70}" --rounds 1)
      timeout -k 10 580 "$python" benchmarks/gpu.py --part "$number" --out "$out" --seconds 520 "${flags[@]}"
      ;;
  esac
}

# outcome NAME: in a few words, from what the part wrote.
outcome() {
  case $1 in
    tests-*) grep -E ' in [0-9.]+s' "$out/$1.log" | tail -n 1 | sed 's/^=* *//; s/ *=*$//' ;;
    bench-*)
      "$python" - "$out/gpu_${1#*-}.json" <<'END'
import json
import sys

rows = json.load(open(sys.argv[1]))["rows"]
print(f"{sum('not run' not in row for row in rows)} of {len(rows)} ways ran; --show has them")
END
      ;;
  esac
}

bad=0
for name in "${names[@]}"; do
  if [ ! -e "$out/$name.done" ]; then
    begin=$(date +%s)
    rc=0
    run "$name" > "$out/$name.log" 2>&1 < /dev/null || rc=$?
    took=$(($(date +%s) - begin))
    said=$(outcome "$name" 2> /dev/null || echo "nothing was written")
    line=$(printf '%-9s rc %-3s %4s s  %s' "$name" "$rc" "$took" "$said")
    # Failed tests are a result, too; what was ended in its middle is run again.
    rm -f "$out/$name.ended"
    if [ "$rc" = 0 ] || { [ "$rc" = 1 ] && [ -e "$out/$name.xml" ]; }; then echo "$line" > "$out/$name.done"; else echo "$line" > "$out/$name.ended"; fi
  fi
  cat "$out/$name".{done,ended} 2> /dev/null || true
  grep -q ' rc 0 ' "$out/$name.done" 2> /dev/null || bad=1
done
for name in "${all[@]}"; do cat "$out/$name".{done,ended} 2> /dev/null || true; done > "$out/summary.txt"
exit $bad
