#!/bin/sh
# Compiles every kernel for every architecture that nvcc knows, with warnings and spills as errors. Takes minutes.
set -eu
cd "$(dirname "$0")/../csrc"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for architecture in $(nvcc --list-gpu-code); do
  echo "$architecture"
  for kernel in cuda/*.cu; do
    case $kernel in *_mask.cu) extra=-fmad=false ;; *) extra= ;; esac
    nvcc -std=c++17 -O3 -Werror=all-warnings -Xptxas=-warn-spills,-Werror $extra -I. -arch="$architecture" -cubin \
      "$kernel" -o "$out/kernel.cubin"
  done
done
