"""The emulation catches seeded bugs, and the kernels pass under sanitizers in every thread order."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import emulated

# What the sanitizers or the emulation say about each bug. A race shows in one order of threads or another.
BUGS = {
    "missing_barrier": "wrong result",
    "uninitialised_shared": "wrong result",
    "divergent_barrier": "not every thread reaches",
    "absent_lane": "not every thread reaches",
    "exited_lane": "a lane in the mask has exited",
    "lane_outside_mask": "reads a lane outside the mask",
    "different_masks": "lanes passed different masks",
    "global_overflow": "heap-buffer-overflow",
    "shared_overflow": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
    "index_overflow": "signed integer overflow",
    "too_many_threads": "launch of bug failed: cudaErrorInvalidConfiguration",
    "too_much_shared_memory": "cudaFuncSetAttribute failed: cudaErrorInvalidValue",
    "race_between_blocks": "wrong result",
    "fft_without_embeds": "cuFFT refused: 4",
    "fft_overlapping_lines": "cuFFT refused: 4",
    "fft_unaligned": "cuFFT refused: 9",
    "fft_without_work_area": "cuFFT refused: 6",
    "fft_work_area_too_small": "heap-buffer-overflow",
    "fft_keeps_data_in_work_area": "wrong result",
    "fft_reuses_input": "wrong result",
}
ORDERS = ("forward", "reverse", "random")


@pytest.fixture(scope="module")
def programs() -> Path:
    return emulated.build(sanitize=True)


def run(program: Path, argument: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FREEMERGE_EMULATION_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, argument], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bug_is_caught(programs: Path, bug: str) -> None:
    runs = [run(programs / "seeded_bugs", bug, order) for order in ORDERS]
    caught = [done for done in runs if done.returncode != 0]
    assert caught
    assert any(BUGS[bug] in done.stdout + done.stderr for done in caught), caught[0].stdout + caught[0].stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("correct", ["correct", "fft_correct"])
def test_correct_code_passes(programs: Path, correct: str, order: str) -> None:
    done = run(programs / "seeded_bugs", correct, order)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_pass_under_sanitizers_in_three_thread_orders(programs: Path) -> None:
    done = run(programs / "kernels", str(programs / "libcufft.so.12"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "ok\n"
