#!/bin/sh
# Compiles every kernel for every architecture that nvcc knows, with warnings and spills as errors. Takes minutes.
set -eu
cd "$(dirname "$0")/../csrc"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
echo "architectures:" $(nvcc --list-gpu-code)
for kernel in cuda/*.cu; do
  case $kernel in *_mask.cu | *column_filter.cu) extra=-fmad=false ;; *) extra= ;; esac
  nvcc -std=c++17 -O3 -arch=all --threads 0 -Werror=all-warnings -Xptxas=-v,-warn-spills,-Werror $extra -I. -c "$kernel" \
    -o "$out/kernel.o" > "$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
  echo "$kernel: $(grep -c 'Compiling entry function' "$out/log") kernels, at most" \
    "$(sed -n 's/.*Used \([0-9]*\) registers.*/\1/p' "$out/log" | sort -n | tail -n 1) registers"
done
