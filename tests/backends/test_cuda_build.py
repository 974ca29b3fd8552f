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

from emulated import toolkits
from freemerge.planner.tiles import blocks, column_bytes, convolution, is_uncommon, row_bytes, tiles

CSRC = Path(__file__).parents[2] / "csrc"
REGISTERS, WARPS, QUARTERS = 65536, 64, 4  # of a multiprocessor; each warp lives in one of its quarters
MAX_REGISTERS = 96  # two blocks of 256 threads, or five of 128
COMMON, UNCOMMON, CHIRP = (f"9TransformE{value}E" for value in range(3))  # instances, as their names are mangled
# Of kernels whose launch bounds say otherwise: blocks of 512 or three of 160 columns, two with uncommon radices, eight
# of 64 of the windowed passes, six with windows of 12 taps, five beside a sum.
LARGE = {
    ("column_filter_kernel", COMMON): 128,
    ("column_filter_kernel", CHIRP): 128,
    ("column_filter_kernel", UNCOMMON): 200,
    ("to_rows_kernel", UNCOMMON): 200,
    ("to_spectra_kernel", UNCOMMON): 200,
    ("spread_rows", "Li12E"): 168,
    ("spread_rows", "kernel"): 128,
    ("interpolate", "Li12E"): 168,
    ("interpolate_added", "kernel"): 168,
    ("interpolate", "kernel"): 128,
}
BLOCK_BYTES, MULTIPROCESSORS = 227 << 10, 132  # of an H100
MAX_WHEEL_BYTES = 5_000_000
FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v,-warn-spills,-Werror", "-arch=sm_90", "-cubin"]


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int


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


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    nvcc, folder = find_nvcc(), tmp_path_factory.mktemp("kernels")
    with ThreadPoolExecutor(2) as pool:
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        return [k for found in pool.map(lambda s: compiled(nvcc, s, folder), sources) for k in found]


def test_every_kernel_keeps_to_its_budget(kernels: list[Kernel]) -> None:
    assert len(kernels) >= 30  # the parser has found them
    allowed = {
        k: next((most for parts, most in LARGE.items() if all(p in k.name for p in parts)), MAX_REGISTERS)
        for k in kernels
    }
    assert not [k for k in kernels if k.registers > allowed[k]]
    assert not [k for k in kernels if k.stack_bytes > 0]
    assert not [k for k in kernels if k.static_shared_bytes > 0]  # dynamic only, at most 48 KiB a launch


def blocks_of(kernel: Kernel, threads: int, shared: int) -> int:
    """Blocks that share a multiprocessor of an H100: registers are handed out to warps, by eights to each thread."""
    of_a_warp = 32 * 8 * -(-kernel.registers // 8)
    warps = min(WARPS, QUARTERS * (REGISTERS // QUARTERS // of_a_warp))
    return min(blocks(shared, BLOCK_BYTES), warps // (threads // 32))


@pytest.mark.parametrize(
    ("shape", "rows_alone"),
    [
        ((768, 768), False),
        ((3072, 768), False),
        ((4096, 4096), False),
        ((4096, 11008), False),
        ((11008, 4096), False),
        ((5120, 13824), True),  # two rows take 115 KiB
        ((14336, 4096), True),  # eight rows take 139 KiB
        ((769, 769), False),
        ((1009, 1013), False),
        ((2 * 1021, 4096), False),
    ],
    ids=str,
)
def test_blocks_of_the_three_kernels_share_a_multiprocessor(
    shape: tuple[int, int], rows_alone: bool, kernels: list[Kernel], capsys: pytest.CaptureFixture[str]
) -> None:
    (height, width), chosen = shape, tiles(*shape, BLOCK_BYTES)
    assert chosen is not None
    length, bins = height // chosen.parts, width // 2 + 1
    row = row_bytes(convolution(width) or width, chosen.parts)
    column = column_bytes(convolution(length) or length, chosen.columns)
    row_groups = height // chosen.parts if chosen.parts > 1 else -(-height // 2)
    column_groups = chosen.parts * -(-bins // chosen.columns)
    by = {n: CHIRP if convolution(n) else UNCOMMON if is_uncommon(n) else COMMON for n in (width, length)}
    used = {
        ("rows_to_spectra_kernel", by[width]): (chosen.row_threads, row, row_groups),
        ("spectra_to_rows_kernel", by[width]): (chosen.row_threads, row, row_groups),
        ("column_filter_kernel", by[length]): (chosen.column_threads, column, column_groups),
    }
    for (name, instance), (threads, shared, groups) in used.items():
        (kernel,) = (k for k in kernels if name in k.name and instance in k.name)
        at_once = blocks_of(kernel, threads, shared)
        waves = groups / (at_once * MULTIPROCESSORS)
        with capsys.disabled():
            print(f"\n{height} x {width} {name} {instance}: {kernel.registers} registers, {threads} threads,", end=" ")
            print(f"{shared >> 10} KiB, {at_once} blocks on a multiprocessor, {waves:.2f} waves", end="")
        assert at_once >= (1 if rows_alone and "spectra" in name else 2)


@pytest.mark.parametrize("taps", [8, 10, 12])
def test_blocks_of_the_windowed_passes_share_a_multiprocessor(
    taps: int, kernels: list[Kernel], capsys: pytest.CaptureFixture[str]
) -> None:
    models = 16
    sums = 8 * 256 * 4 + (models + 1) * 128 * 8  # a tile, and a number for each model and thread
    weights = (12 + 3) * 64 * 16  # of four columns in each coarse column that they touch, at most
    passes = {
        "spread_rows_kernel": (64, 0, 8 if taps < 12 else 6),
        "interpolate_kernel": (64, weights, 8 if taps < 12 else 6),
        "interpolate_added_kernel": (64, weights, 5),
        "spread_sum_kernel": (128, sums, 5),
    }
    for name, (threads, shared, wanted) in passes.items():
        found = [k for k in kernels if name in k.name and f"Li{taps}E" in k.name]
        assert len(found) == (3 if name in ("spread_rows_kernel", "interpolate_kernel") else 1)  # storage dtypes
        at_once = min(blocks_of(kernel, threads, shared) for kernel in found)
        with capsys.disabled():
            print(f"\n{name}, {taps} taps: {max(k.registers for k in found)} registers, {threads} threads,", end=" ")
            print(f"{at_once} blocks on a multiprocessor", end="")
        assert at_once >= wanted


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
