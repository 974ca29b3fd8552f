"""What nvcc makes of the kernels: registers, shared memory and spills within a budget, and a wheel of bounded size."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
MAX_REGISTERS = 96  # two blocks of 256 threads, or five of 128, fit the 65536 registers of a multiprocessor
MAX_WHEEL_BYTES = 5_000_000
FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v,-warn-spills,-Werror", "-arch=sm_90", "-cubin"]


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int


def find_nvcc() -> str:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join([*(f"{root}/bin" for root in roots if root), os.environ["PATH"]]))
    if nvcc is None:
        pytest.skip("needs nvcc, which is neither in PATH nor under CUDA_HOME")
    return nvcc


def compiled(nvcc: str, source: Path, folder: Path) -> list[Kernel]:
    mask = ["-fmad=false"] if source.stem.endswith("mask") else []  # as cmake/cuda.cmake has it
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


def test_the_modules_fit_a_wheel_of_five_megabytes() -> None:
    total = 0
    for name in ("_core", "_cuda"):
        spec = importlib.util.find_spec(f"freemerge.{name}")
        if spec is None:
            pytest.skip(f"freemerge was built without {name}")
        assert spec.origin is not None
        total += len(zlib.compress(Path(spec.origin).read_bytes(), 6))
    assert total < MAX_WHEEL_BYTES
