"""What the benchmarks share: their check must refuse wrong answers, their baselines must be right."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest
import torch

import freemerge as fm
from benchmarks import harness, suites
from benchmarks.harness import Case
from freemerge.backends.base import BackendInfo

RESULTS = Path(harness.__file__).parent / "results"
SHAPES = [(97,), (31, 40), (2, 24, 18)]
DTYPES = ["float32", "float64", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_check_takes_the_filter_and_refuses_a_small_error(shape: tuple[int, ...], dtype: str) -> None:
    case = Case(shape, "HighPass(0.2)", dtype)
    x = case.input()
    y = fm.filtered(x, case.mask)
    assert harness.check(y, x, case.mask)["error"] < {"float32": 5e-7, "float64": 1e-12, "bfloat16": 4e-3}[dtype]
    with pytest.raises(AssertionError, match="relative error"):
        harness.check(y * 1.01, x, case.mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_huge_matrix_is_checked_along_one_axis_after_the_other(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((150, 97), "Official(0.7)", dtype)
    x = case.input()
    y = fm.filtered(x, case.mask)
    whole = harness.check(y, x, case.mask)
    monkeypatch.setattr(harness, "_HUGE", 1000)
    monkeypatch.setattr(harness, "_CHUNK", 2000)
    assert harness.check(y, x, case.mask) == pytest.approx(whole, rel=1e-6, abs=1e-15)
    y[-1, -1] += 1
    with pytest.raises(AssertionError, match="relative error"):
        harness.check(y, x, case.mask)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_fft_is_the_filter(shape: tuple[int, ...], dtype: str, in_place: bool) -> None:
    case = Case(shape, "Butterworth(0.3)", dtype)
    x = case.input()
    y = harness.torch_fft(x, case.mask, in_place=in_place)(x)
    assert y.dtype == x.dtype
    harness.check(y, x, case.mask)


def test_the_released_way_is_official() -> None:
    case = Case((40, 64), "Official(0.7)")
    x = case.input()
    harness.check(harness.released(x, 0.7), x, case.mask)


def test_a_filter_may_run_on_its_own_output() -> None:
    for response in ("HighPass(0.2)", "Official(0.7)", "Butterworth(0.3)"):
        x = Case((40, 64), response).input()
        call = harness.filter_call(x, Case(x.shape, response).mask)
        for _ in range(300):
            call()
        assert x.isfinite().all()
        assert x.abs().max() > 0


def test_works_take_turns_and_start_each_with_what_goes_before() -> None:
    ran: list[str] = []
    works = {
        "a": harness.Work(lambda: ran.append("a"), before=lambda: ran.append("before")),
        "b": lambda: ran.append("b"),
    }
    times = harness.in_turns(works, lambda work: (work(), 0.25)[1], turns=3, budget=0.0)
    assert {name: set(found) for name, found in times.items()} == {"a": {250.0}, "b": {250.0}}
    assert [len(times[name]) for name in "ab"] == [ran.count(name) for name in "ab"]
    turns = "".join(name[0] for i, name in enumerate(ran) if name == "before" or ran[i - 1] != name)
    assert turns.count("b") >= 3
    assert ran[0] == "before"


def test_rows_measured_again_replace_old_ones(tmp_path: Path) -> None:
    path, fields = tmp_path / "results" / "rows.json", ("shape", "dtype")
    assert harness.read_rows(path) == []
    harness.write(
        path, {"rows": [{"shape": (3, 4), "dtype": "float32", "ms": 1}, {"shape": (5,), "dtype": "a", "ms": 2}]}
    )
    rows = harness.replace_rows(harness.read_rows(path), [{"shape": (3, 4), "dtype": "float32", "ms": 3}], fields)
    assert [row["ms"] for row in rows] == [3, 2]


def test_the_memory_of_a_work_is_seen() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux counts it")
    assert harness.peak_growth(lambda: torch.ones(1 << 23)) >= 31 << 20  # of 32; pages are counted in batches
    assert harness.peak_growth(lambda: None) < 1 << 23


def test_the_record_names_machine_and_package() -> None:
    record = json.loads(json.dumps(harness.machine(threads=1)))
    assert record["torch"] == torch.__version__
    assert record["backends"].keys() == {name for name, info in fm.backends().items() if info.available}


def test_the_record_does_not_tell_of_the_machine_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    details = {"cufft": "/somewhere/lib/libcufft.so.12", "device 0": "NVIDIA H100 80GB HBM3"}
    found = {"cuda": BackendInfo("cuda", True, details=details), "torch": BackendInfo("torch", False, "no")}
    monkeypatch.setattr(fm, "backends", lambda: found)
    record = harness.machine()
    assert record["backends"] == {"cuda": {**details, "cufft": "libcufft.so.12"}}
    assert platform.release() not in record["system"]


def test_committed_results_name_no_folder_and_no_kernel() -> None:
    for path in RESULTS.rglob("*.json"):
        assert re.findall(r'"/[^"]*"|Linux-[^"]*', path.read_text(encoding="utf-8")) == [], path


def test_every_case_of_the_suites_has_a_response() -> None:
    for case in (*suites.FILTERS, *suites.CALLS):
        assert isinstance(case.mask, fm.Response)
        assert fm.explain(case.shape, case.mask, dtype=case.torch_dtype)
