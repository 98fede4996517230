#!/usr/bin/env bash
# All that needs a GPU, in parts. One that fails, or whose time is up, stops none after it.
#
#     bash bench/gpu.sh OUT PART[=SECONDS] …
#
# Parts: tests, compiled (those of torch.compile), memcheck, racecheck, profile, compare, and those of bench.gpu.
# OUT gets what each part printed (log), the tests' reports and, in a folder named after the card, the figures. Wheels
# in build/wheels (make gpu-wheels) stand in for packages that the machine lacks. PYTHON is the interpreter, BASE what
# the part compare puts beside this tree. docs/tuning.md has the order of it all.
set -uo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,6s/^# \?//p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if compgen -G 'build/wheels/*.whl' >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" \
    build/wheels/*.whl && export PYTHONPATH="$scratch/site"
fi
gpu_tests=("$python" -m pytest -q -m gpu tests/test_gpu.py)
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
# Of each kernel one launch, over a tile of Llama-3's head: time, issue slots, the unit of exponentials, L2, memory.
launches=(--kernel-name 'regex:^_(sweep|gradient|project)_kernel' --launch-count 4 --kill yes)
counters=gpu__time_duration.sum,launch__registers_per_thread,smsp__inst_executed.sum,smsp__inst_executed_pipe_xu.sum
counters+=,smsp__issue_active.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active
counters+=,lts__t_bytes.sum,lts__t_sector_hit_rate.pct,dram__bytes_read.sum,dram__bytes_write.sum
counters+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
sanitized=()
for kernel in sweep gradient project; do sanitized+=(--kernel-name "kernel_substring=_${kernel}_kernel"); done

summary=()
run() { # DEFAULT-SECONDS COMMAND …
  local seconds=${limit:-$1} begin=$SECONDS status
  shift
  echo "== $part, $seconds s: $*" | tee -a "$out/log"
  timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$out/log"
  status=${PIPESTATUS[0]}
  summary+=("$(printf '%-10s exit status %3d after %3d s' "$part" "$status" $((SECONDS - begin)))")
}

for argument; do
  part=${argument%%=*}
  limit=${argument#"$part"}
  limit=${limit#=}
  case $part in
  tests) run 240 "${gpu_tests[@]}" -k "not compiled" "${workers[@]}" --junitxml="$out/$part.xml" ;;
  compiled) run 240 "${gpu_tests[@]}" -k compiled "${workers[@]}" --junitxml="$out/$part.xml" ;;
  memcheck | racecheck)
    run 180 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$part" "${sanitized[@]}" \
      --error-exitcode 9 "${gpu_tests[@]}" -k "parity and ragged and bfloat16"
    ;;
  profile)
    run 180 ncu --clock-control none "${launches[@]}" --metrics "$counters" --csv --page raw \
      --log-file "$out/profile.csv" "$python" -m bench.gpu --out "$scratch" --part stages --quick
    ;;
  compare) run 300 "$python" -m bench.compare ${BASE:+"$BASE"} --device cuda ;;
  *) run 300 "$python" -m bench.gpu --out "$out" --part "$part" --seconds $((${limit:-300} - 20)) ;;
  esac
done
printf '%s\n' "${summary[@]}" | tee -a "$out/log"
! printf '%s\n' "${summary[@]}" | grep -qv 'exit status   0'
