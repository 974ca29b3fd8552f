#!/bin/sh
# Everything about the CUDA backend that needs a GPU, in one go and about ten minutes: builds freemerge for the GPU at
# hand, runs the tests marked gpu, sweeps tiles and windows, times every plan against torch.fft, and runs
# compute-sanitizer and Nsight Compute where they are installed. Each part has its time, and a part that fails or runs
# out of it does not keep the others from running.
# usage: benchmarks/gpu_suite.sh [RESULT.json]; PYTHON names a Python with a CUDA build of torch and the test extras.
# BUILT=1 takes the freemerge that this Python imports, for instance a build that was made elsewhere and carried in;
# COMMIT tells the result which one it is of, where the tree has no history.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
result=${1:-benchmarks/results/gpu.json}
failed=

part() { # part NAME SECONDS COMMAND...
  name=$1 seconds=$2
  shift 2
  printf '\n== %s (at most %s s)\n' "$name" "$seconds"
  timeout --kill-after=10 "$seconds" "$@" || failed="$failed $name"
}

if ! nvidia-smi -L 2> /dev/null; then
  echo "no GPU: nvidia-smi does not list one, so there is nothing to measure" >&2
  exit 1
fi
"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "this torch cannot use the GPU")'

if [ -z "${BUILT:-}" ]; then
  echo "== build"
  isolation=--no-build-isolation
  "$python" -c 'import scikit_build_core, pybind11' 2> /dev/null || isolation=
  FREEMERGE_CUDA=ON CUDAARCHS=${CUDAARCHS:-native} "$python" -m pip install --quiet --no-deps $isolation .
fi

part tests 120 "$python" -m pytest -q -m gpu tests/backends
part sweep 170 "$python" -m benchmarks.gpu_suite sweep --out "$result" --budget 140
part table 170 "$python" -m benchmarks.gpu_suite table --out "$result" --budget 120

if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    part "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m benchmarks.gpu_suite sanitize
  done
else
  echo "compute-sanitizer is not installed: skipped"
fi
if command -v ncu > /dev/null; then
  kernels='rows_to_spectra|column_filter|spectra_to_rows|spread_rows|spread_columns|interpolate'
  part profile 60 ncu --kernel-name-base function --kernel-name "regex:$kernels" --launch-count 24 \
    --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis --section WarpStateStats \
    --log-file "${result%.json}.ncu.txt" "$python" -m benchmarks.gpu_suite profile
else
  echo "Nsight Compute (ncu) is not installed: skipped"
fi

if [ -n "$failed" ]; then
  echo "failed:$failed" >&2
  exit 1
fi
