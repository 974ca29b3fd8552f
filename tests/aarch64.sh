#!/bin/sh
# Cross-compiles the kernels and their native tests for aarch64 and runs them under emulation. Needs aarch64-linux-gnu-g++,
# qemu-aarch64 and ninja (on Debian g++-aarch64-linux-gnu, qemu-user, ninja-build); takes the build folder.
set -eu
cd "$(dirname "$0")/.."
build=${1:-build/aarch64}

cmake -S . -B "$build" -G Ninja -Wno-dev -DCMAKE_BUILD_TYPE=Release -DFREEMERGE_PYTHON=OFF \
  -DFREEMERGE_NATIVE_TESTS=ON -DFREEMERGE_WERROR=ON -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_CROSSCOMPILING_EMULATOR="qemu-aarch64;-L;/usr/aarch64-linux-gnu"
cmake --build "$build" --target native_tests
# The vector types must have become NEON registers of four floats.
object=$(find "$build" -name 'kernels_isa.cpp.o')
aarch64-linux-gnu-objdump -d "$object" | grep -Eq 'fmla[[:space:]]+v[0-9]+\.4s' ||
  { echo "no fused multiply-add of NEON in $object" >&2; exit 1; }
ctest --test-dir "$build" --output-on-failure --no-tests=error --parallel 2
