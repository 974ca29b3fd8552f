"""What nvcc makes of the kernels: registers, shared memory and spills within a budget, and a wheel of bounded size."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
MAX_REGISTERS = 96  # two blocks of 256 threads, or five of 128, fit the 65536 registers of a multiprocessor
MAX_WHEEL_BYTES = 5_000_000
FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v,-warn-spills,-Werror", "-arch=sm_90", "-cubin"]


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int


def toolkits() -> list[Path]:
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return [Path(root) for root in roots if root]


def find_nvcc() -> str:
    folders = [*(str(root / "bin") for root in toolkits()), os.environ["PATH"]]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        pytest.skip("needs nvcc, which is neither in PATH nor under CUDA_HOME")
    return nvcc


def compiled(nvcc: str, source: Path, folder: Path) -> list[Kernel]:
    mask = ["-fmad=false"] if source.stem in ("coarse_mask", "column_filter") else []  # as cmake/cuda.cmake has it
    command = [nvcc, *FLAGS, *mask, "-I", str(CSRC), str(source), "-o", str(folder / f"{source.stem}.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers([^\n]*)", re.DOTALL
    )
    kernels = []
    for name, stack, registers, rest in entry.findall(done.stdout + done.stderr):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(Kernel(name, int(registers), int(stack), int(shared[1]) if shared else 0))
    return kernels


def test_every_kernel_keeps_to_its_budget(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    with ThreadPoolExecutor(2) as pool:
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        kernels = [k for found in pool.map(lambda s: compiled(nvcc, s, tmp_path), sources) for k in found]
    assert len(kernels) >= 30  # the parser has found them
    assert not [k for k in kernels if k.registers > MAX_REGISTERS]
    assert not [k for k in kernels if k.stack_bytes > 0]
    assert not [k for k in kernels if k.static_shared_bytes > 0]  # dynamic only, at most 48 KiB a launch


def cufft_include() -> Path:
    """The folder of a real cufft.h: a toolkit's, or that of NVIDIA's wheel."""
    folders = [root / "include" for root in toolkits()]
    folders += [Path(path) / "nvidia" / folder / "include" for path in sys.path for folder in ("cu13", "cufft")]
    for folder in folders:
        if (folder / "cufft.h").exists():
            return folder
    pytest.skip("needs a cufft.h: install nvidia-cufft, or a toolkit that has it")


@pytest.mark.parametrize(
    ("declared", "changed"),
    [
        ("", ""),
        ("(*SetWorkArea)(Handle, void*)", "(*SetWorkArea)(Handle, float*)"),
        ("(*GetVersion)(int*)", "(*GetVersion)(long*)"),
        ("kC2R = 0x2c", "kC2R = 0x2d"),
    ],
)
def test_the_mirror_of_cufft_is_its_header(declared: str, changed: str, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler in PATH")
    runtimes = [root / "include" for root in toolkits() if (root / "include" / "cuda_runtime_api.h").exists()]
    if not runtimes:
        pytest.skip("needs the headers of the CUDA toolkit: set CUDA_HOME")
    (tmp_path / "cuda").mkdir()
    header = (CSRC / "cuda" / "cufft_api.h").read_text(encoding="utf-8")
    assert declared in header
    (tmp_path / "cuda" / "cufft_api.h").write_text(header.replace(declared, changed) if declared else header)
    shutil.copy(CSRC / "cuda" / "cufft_api.cpp", tmp_path / "cuda")
    command = [
        compiler,
        "-std=c++17",
        "-fsyntax-only",
        "-DFREEMERGE_HAVE_CUFFT_H",
        "-I",
        str(tmp_path),
        "-I",
        str(CSRC),
    ]
    command += [
        "-isystem",
        str(cufft_include()),
        "-isystem",
        str(runtimes[0]),
        str(tmp_path / "cuda" / "cufft_api.cpp"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if declared:
        assert "static assertion failed" in done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_the_modules_fit_a_wheel_of_five_megabytes() -> None:
    total = 0
    for name in ("_core", "_cuda"):
        spec = importlib.util.find_spec(f"freemerge.{name}")
        if spec is None:
            pytest.skip(f"freemerge was built without {name}")
        assert spec.origin is not None
        total += len(zlib.compress(Path(spec.origin).read_bytes(), 6))
    assert total < MAX_WHEEL_BYTES
