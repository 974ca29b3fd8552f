"""What of the GPU's benchmark a machine without one can run: its script, and its parts on the emulated backend."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import emulated
from benchmarks import gpu_suite, gpu_sweep, harness
from benchmarks.harness import Case
from freemerge.backends import registry
from freemerge.backends.torch import TorchBackend
from freemerge.planner.tiles import Tiles

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.sh"


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with registry.using(emulated.backend(), TorchBackend()):
        yield


def once(work: Callable[[], object]) -> dict[str, float]:
    work()
    return {"kernel": 1.0}


def test_the_script_parses_and_says_that_there_is_no_gpu() -> None:
    assert subprocess.run(["sh", "-n", SCRIPT], check=False).returncode == 0
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("there may be a GPU here")
    done = subprocess.run(["sh", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU: nvidia-smi does not list one" in done.stderr


def test_the_default_cutoff_on_llama_shapes_comes_first_and_both_full_forms_are_timed() -> None:
    first = gpu_suite.cases()[0]
    assert (first.response, first.dtype) == ("HighPass(0.4)", "float32")
    named = gpu_suite.measured_plans(emulated.backend(), Case((4096, 4096), "HighPass(0.4)"), "cpu")
    assert {name: (plan.form, plan.tiles is not None) for name, plan in named.items()} == {
        "auto": ("full", False),
        "three_kernels": ("full", True),
    }
    forced = gpu_suite.measured_plans(emulated.backend(), Case((14336, 4096), "HighPass(0.4)"), "cpu")
    assert "decimated" in {plan.form for plan in forced.values()}


def test_sweeps_run_every_setting_and_say_what_they_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sweep, "SHAPES", [(96, 86), (160, 64)])
    monkeypatch.setattr(gpu_sweep, "THREADS", [(64, 64)])
    monkeypatch.setattr(gpu_sweep, "CHUNK_ROWS", (0, 32))
    found = gpu_sweep.sweep(emulated.backend(), 60.0, "cpu", once)
    tiles, windows = found["tiles"], found["windows"]
    assert sum(row["chosen"] for row in tiles) == 3  # one for each shape and dtype
    assert {Tiles(**row["tiles"]).parts for row in tiles} == {1, 2, 4, 8}
    assert {row["chunk_rows"] for row in windows} == set(gpu_sweep.CHUNK_ROWS)
    assert found["left_out"] == []
    assert gpu_sweep.sweep(emulated.backend(), -1.0, "cpu", once)["left_out"] == [
        "(96, 86) float32",
        "(96, 86) bfloat16",
        "(160, 64) float32",
    ]


def test_a_case_is_checked_measured_and_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def median(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        return {name: once(work)["kernel"] for name, work in works.items()}

    monkeypatch.setattr(gpu_suite, "rotation", lambda case: [case.input(), case.input()])
    monkeypatch.setattr(gpu_suite, "graph_ms", lambda run, inputs: once(lambda: run(inputs[0]))["kernel"])
    monkeypatch.setattr(gpu_suite, "measured_plans", lambda b, c, f=gpu_suite.measured_plans: f(b, c, "cpu"))
    monkeypatch.setattr(gpu_suite, "machine", lambda: {"commit": "abc"})
    monkeypatch.setattr(harness, "gpu_median", median)
    monkeypatch.setattr(harness, "peak_growth", lambda work, device: once(work)["kernel"])
    row = gpu_suite.measure(emulated.backend(), Case((64, 96), "Official(0.7)", "bfloat16"))
    assert set(row["plans"]) == {"auto", "three_kernels"}
    assert "| 64x96 | bfloat16 | Official(ratio=0.7" in gpu_suite.markdown([row])
    out = tmp_path / "gpu.json"
    gpu_suite.record(out, {"sweep": {}})
    gpu_suite.record(out, {"results": [row]})
    assert set(json.loads(out.read_text())) == {"machine", "sweep", "results"}


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("void freemerge::cuda::(anonymous namespace)::rows_to_spectra_kernel<false>(RowPass)", "rows_to_spectra"),
        ("void vector_fft<512u, 8u>(kernel_arguments_t)", "void vector_fft<512u, 8u>(kernel_arguments_t)"),
    ],
)
def test_kernels_are_told_by_their_names(symbol: str, name: str) -> None:
    assert gpu_sweep.kernel_name(symbol) == name


def test_every_setting_of_a_sweep_fits_a_block() -> None:
    for shape in gpu_sweep.SHAPES:
        assert len(set(gpu_sweep.tile_choices(shape, 227 << 10))) >= 6
