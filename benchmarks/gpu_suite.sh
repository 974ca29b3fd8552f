#!/bin/sh
# Everything about the CUDA backend that needs a GPU, in one go and under ten minutes: builds freemerge for the GPU at
# hand, runs the tests marked gpu, benchmarks against torch.fft, and runs compute-sanitizer where it is installed.
# usage: benchmarks/gpu_suite.sh [RESULT.json]; PYTHON names a Python with a CUDA build of torch and the test extras.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
result=${1:-benchmarks/results/gpu.json}

if ! nvidia-smi -L 2> /dev/null; then
  echo "no GPU: nvidia-smi does not list one, so there is nothing to measure" >&2
  exit 1
fi
"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "this torch cannot use the GPU")'

echo "== build"
isolation=--no-build-isolation
"$python" -c 'import scikit_build_core, pybind11' 2> /dev/null || isolation=
FREEMERGE_CUDA=ON CUDAARCHS=${CUDAARCHS:-native} "$python" -m pip install --quiet --no-deps $isolation .

echo "== tests"
"$python" -m pytest -m gpu tests/backends

echo "== benchmark"
"$python" -m benchmarks.gpu_suite --out "$result"

echo "== compute-sanitizer"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m benchmarks.gpu_suite --sanitize
  done
else
  echo "not installed: skipped"
fi
