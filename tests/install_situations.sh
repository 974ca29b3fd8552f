#!/bin/sh
# Installs freemerge from source in the four situations a machine can be in, and checks what each install can do:
# no nvcc; nvcc without cuFFT; nvcc with cuFFT from a wheel; a broken nvcc first in PATH. Takes minutes, a download of
# about 200 MB, and for the first situation the right to hide the toolkit (root on Linux).
# usage: tests/install_situations.sh [SITUATION...], with PYTHON naming a Python that has freemerge's requirements.
set -eu
cd "$(dirname "$0")/.."
base=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CUDAARCHS=${CUDAARCHS:-90}

environment() { # a virtual environment that sees the packages of $base, and a source tree that nobody has built in
  mkdir "$work/$1-source"
  tar --exclude=./build --exclude=./.git -cf - . | tar -xf - -C "$work/$1-source"
  source=$work/$1-source
  "$base" -m venv "$work/$1"
  "$base" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' > "$work/paths"
  cp "$work/paths" "$("$work/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  python=$work/$1/bin/python
}

install() { # [COMMAND...] to run pip under
  "$@" "$python" -m pip install --no-build-isolation --no-deps --no-cache-dir -v "$source" > "$work/log" 2>&1
}

must_install() {
  install "$@" || { tail -n 60 "$work/log" >&2; exit 1; }
}

# What the installed package says of its CUDA backend; run outside the source tree.
reason() { (cd "$work" && "$python" -c 'import freemerge; print(freemerge.backends()["cuda"].reason)'); }

expect() { # text pattern
  case $1 in
    *"$2"*) printf 'ok: %s\n' "$2" ;;
    *) printf 'expected "%s", got "%s"\n' "$2" "$1" >&2; tail -n 40 "$work/log" >&2; exit 1 ;;
  esac
}

no_nvcc() {
  environment no_nvcc
  nvcc=$(command -v nvcc || true)
  hidden=
  mkdir "$work/empty"
  : > "$work/nothing"
  for toolkit in /usr/local/cuda /usr/local/cuda-*; do
    [ -d "$toolkit" ] && hidden="$hidden $(readlink -f "$toolkit")"
  done
  # In a mount namespace of its own: nothing outside sees it.
  export hidden nvcc empty="$work/empty" nothing="$work/nothing"
  must_install unshare --mount sh -c '
      for toolkit in $hidden; do mount --bind "$empty" "$toolkit"; done
      [ -z "$nvcc" ] || mount --bind "$nothing" "$nvcc"
      unset CUDA_HOME CUDA_PATH CUDACXX
      "$@"' hiding
  expect "$(cat "$work/log")" 'freemerge: building without CUDA'
  expect "$(reason)" 'this freemerge was built without CUDA; install the CUDA toolkit'
}

nvcc_without_cufft() {
  environment nvcc_without_cufft
  FREEMERGE_CUDA=ON must_install
  expect "$(cat "$work/log")" 'freemerge: building with CUDA'
  (cd "$work" && "$python" -c 'import freemerge._cuda')
  case $(reason) in
    '') echo 'ok: runs' ;;
    *'built without CUDA; install the CUDA toolkit'*) echo 'the CUDA module is missing' >&2; exit 1 ;;
    *) printf 'ok: %s\n' "$(reason)" ;;
  esac
}

nvcc_with_cufft() {
  environment nvcc_with_cufft
  "$python" -m pip install --quiet --no-deps nvidia-cufft==12.0.0.61
  FREEMERGE_CUDA=ON must_install
  expect "$(cat "$work/log")" 'freemerge: checking the cuFFT declarations against'
  found=$(cd "$work" && "$python" -c '
from freemerge import _cuda
from freemerge.backends import cuda_runtime as cuda
print(*_cuda.open_cufft([str(file) for file in cuda._cufft_candidates()]))')
  expect "$found" 'libcufft.so.12 12'
}

broken_nvcc() {
  environment broken_nvcc
  mkdir "$work/broken"
  printf '#!/bin/sh\nexit 1\n' > "$work/broken/nvcc"
  chmod +x "$work/broken/nvcc"
  (unset CUDA_HOME CUDA_PATH CUDACXX; PATH=$work/broken:$PATH must_install)
  expect "$(cat "$work/log")" 'freemerge: building without CUDA'
  expect "$(reason)" 'this freemerge was built without CUDA'
  if (unset CUDA_HOME CUDA_PATH CUDACXX; export FREEMERGE_CUDA=ON; PATH=$work/broken:$PATH install); then
    echo 'FREEMERGE_CUDA=ON must fail with a broken nvcc' >&2
    exit 1
  fi
  expect "$(cat "$work/log")" 'FREEMERGE_CUDA is ON, but no working nvcc was found'
}

for situation in ${*:-no_nvcc nvcc_without_cufft nvcc_with_cufft broken_nvcc}; do
  printf '\n== %s\n' "$situation"
  "$situation"
done
