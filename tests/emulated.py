"""Builds the CUDA backend's sources for the CPU, once, and hands out the backend that runs them on CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest

from freemerge.backends.cuda import CudaBackend
from freemerge.backends.cuda_runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "emulation"
_numbers = count()


@cache
def build(sanitize: bool = False) -> Path:
    """The folder with the emulated module, or with the sanitized programs. Skips where it cannot be built."""
    cmake = shutil.which("cmake", path=_tools())
    if cmake is None:
        pytest.skip("the emulation needs cmake, which is not in PATH")
    if not _cuda_headers():
        pytest.skip("the emulation needs the headers of the CUDA toolkit: set CUDA_HOME")
    kind = "sanitized" if sanitize else sys.implementation.cache_tag  # the module is for one Python
    folder = ROOT / "build" / f"emulation-{kind}"
    configure = [cmake, "-S", str(SOURCE), "-B", str(folder), f"-DFREEMERGE_SANITIZE={'ON' if sanitize else 'OFF'}"]
    ninja = shutil.which("ninja", path=_tools())
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if not sanitize:
        import pybind11

        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # workers of one test run share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(configure)
        _run([cmake, "--build", str(folder), "--parallel"])
    return folder


@cache
def module() -> ModuleType:
    """The CUDA module's twin on the CPU."""
    (file,) = build().glob("_cuda_emulated*.so")
    return _load("_cuda_emulated", file)


def fresh_module(folder: Path) -> ModuleType:
    """The same with statics of its own: it has not opened cuFFT."""
    (file,) = build().glob("_cuda_emulated*.so")
    return _load(f"fresh{next(_numbers)}._cuda_emulated", Path(shutil.copy(file, folder)))


@cache
def runtime() -> Runtime:
    """The emulated module as the package's CUDA runtime, for CPU tensors."""
    return _runtime(module())


def _runtime(loaded: ModuleType) -> Runtime:
    outer = os.environ.get("FREEMERGE_CUFFT")
    os.environ["FREEMERGE_CUFFT"] = str(build() / "libcufft.so.12")
    try:
        emulated = Runtime(loaded, "cpu")
        assert not emulated.state[0], emulated.state  # opens the stand-in for cuFFT, for good
    finally:
        if outer is None:
            del os.environ["FREEMERGE_CUFFT"]
        else:
            os.environ["FREEMERGE_CUFFT"] = outer
    return emulated


@cache
def backend() -> CudaBackend:
    """The CUDA backend on the emulated module and CPU tensors."""
    return CudaBackend(runtime())


@dataclass(frozen=True)
class Bug:
    """A change of a file of csrc/cuda, as the kernels of one are compiled with it."""

    file: str
    right: str
    wrong: str
    kernels: str


def backend_with(bug: Bug, folder: Path) -> CudaBackend:
    """The emulated backend with a bug, compiled without optimisation."""
    name = f"bug{next(_numbers)}._cuda_emulated"  # pybind11 keeps one module of each name
    return CudaBackend(_runtime(_load(name, _build_with(bug, folder))))


def _build_with(bug: Bug, folder: Path) -> Path:
    source, changed = ROOT / "csrc", folder / "cuda"
    changed.mkdir(parents=True)
    text = (source / "cuda" / bug.file).read_text(encoding="utf-8")
    assert bug.right in text
    (changed / bug.file).write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
    kernels, made, linked = changed / bug.kernels, folder / "kernels.o", folder / "_cuda_emulated.so"
    if not kernels.exists():
        shutil.copy(source / "cuda" / bug.kernels, kernels)
    headers = next(root / "include" for root in toolkits() if (root / "include" / "cuda_fp16.h").exists())
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", "-DFREEMERGE_EMULATION"]
    folders = [f"-I{folder}", f"-I{source}", f"-I{ROOT / 'tests'}", f"-isystem{headers}"]
    _run([compiler, *flags, *folders, "-xc++", "-c", str(kernels), "-o", str(made)])
    objects = _objects()
    correct = [path for path in objects if path.name != f"{bug.kernels}.o"]
    assert len(correct) == len(objects) - 1
    _run([compiler, "-shared", "-o", str(linked), *map(str, correct), str(made), "-ldl"])
    return linked


def _objects() -> list[Path]:
    """The module's objects, but for those that a source left behind which has another name now."""
    folder = build() / "CMakeFiles" / "_cuda_emulated.dir"
    sources = {made: made.relative_to(folder).with_suffix("") for made in folder.rglob("*.o")}  # of SOURCE, or of /
    return [made for made, source in sources.items() if (SOURCE / source).exists() or ("/" / source).exists()]


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def standin_traffic() -> tuple[int, int]:
    """Bytes that the stand-in for cuFFT has read and written since the last call."""
    library = ctypes.CDLL(str(build() / "libcufft.so.12"))
    read, written = ctypes.c_uint64(), ctypes.c_uint64()
    library.freemerge_standin_traffic(ctypes.byref(read), ctypes.byref(written))
    return read.value, written.value


def _tools() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def toolkits() -> list[Path]:
    """Where the CUDA toolkit may be."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return [Path(root) for root in roots if root]


def _cuda_headers() -> bool:
    return any((root / "include" / "cuda_fp16.h").exists() for root in toolkits())


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
