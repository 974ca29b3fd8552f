"""The analysis from end to end: files and state dicts, what is left out, advice, refusals, memory."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

import plain
import pytest
import torch
from safetensors.torch import save_file

import freemerge as fm
from freemerge.analysis import analyze
from freemerge.analysis.advice import ACCURACY, FILTERED, RANK_CORRELATION
from freemerge.analysis.singular import DIRECTIONS, EXACT_SIDE, LEADING
from freemerge.cli import main
from freemerge.merging.engine import Merger

SHAPES = {
    "embed.weight": (61, 24),
    "layers.0.w": (24, 24),
    "layers.1.w": (24, 24),
    "norm.bias": (24,),
    "conv": (4, 3, 3, 3),
}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "quality" / "texts"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    base, tuned = plain.models(SHAPES, 3)
    paths = []
    for name, state in zip(("base", "math", "code", "chat"), (base, *tuned), strict=True):
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_file({**state, "ids": torch.arange(5)}, paths[-1])
    return paths


def test_files_and_state_dicts_give_the_same_measures(files: list[str]) -> None:
    base, tuned = plain.models(SHAPES, 3)
    in_memory, from_files = analyze(base, tuned), analyze(files[0], files[1:])
    assert from_files.tasks == ("math", "code", "chat")
    assert from_files.base == "base"
    assert len(set(in_memory.tasks)) == 3
    assert from_files.left_out == ("ids",)
    assert from_files.tensors == in_memory.tensors
    assert from_files.total == in_memory.total
    assert analyze(files[0], files[1:]).to_dict() == from_files.to_dict(), "the same every time"


def test_stored_dtypes_are_measured_in_float32() -> None:
    base, tuned = plain.models(SHAPES, 2)
    halves = [{name: tensor.bfloat16() for name, tensor in state.items()} for state in (base, *tuned)]
    floats = [{name: tensor.float() for name, tensor in state.items()} for state in halves]
    assert analyze(halves[0], halves[1:]).total == analyze(floats[0], floats[1:]).total
    doubles = [{name: tensor.double() for name, tensor in state.items()} for state in floats]
    found, expected = (analyze(states[0], states[1:]).total for states in (floats, doubles))
    assert found.cosine[0] == pytest.approx(expected.cosine[0], rel=1e-5)
    assert found.spectra[1].top == pytest.approx(expected.spectra[1].top, rel=1e-5)


def test_inputs_are_read_once_and_one_tensor_is_held(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The main pass reads each tensor once, whatever the methods do with it; FR's weights take a pass of their own."""
    opened: Counter[str] = Counter()
    vectors = Merger.vectors

    def counted(self: Merger, unit: object) -> object:
        opened[unit.names[0]] += 1  # type: ignore[attr-defined]
        return vectors(self, unit)  # type: ignore[arg-type]

    monkeypatch.setattr(Merger, "vectors", counted)
    analyze(files[0], files[1:], methods=["task_arithmetic", "iso_c", "tsv_m"])
    assert set(opened.values()) == {1}
    opened.clear()
    analyze(files[0], files[1:], methods=["fr"])
    assert set(opened.values()) == {2}


def test_select_and_rename(files: list[str]) -> None:
    analysis = analyze(files[0], files[1:], select=[("layers.*", "filter"), ("*", "copy")])
    assert [tensor.name for tensor in analysis.tensors] == ["layers.0.w", "layers.1.w"]
    assert set(analysis.left_out) == {"embed.weight", "norm.bias", "conv", "ids"}
    base, tuned = plain.models(SHAPES, 2)
    wrapped = [{f"model.{name}": tensor for name, tensor in state.items()} for state in tuned]
    assert analyze(base, wrapped, rename=[("model.", "")]).total == analyze(base, tuned).total


def test_methods_by_name_and_their_scales(files: list[str]) -> None:
    analysis = analyze(files[0], files[1:], methods=list(fm.methods.METHODS))
    assert set(analysis.scales) == {method.title for method in fm.methods.METHODS.values()}
    for name, method in fm.methods.METHODS.items():
        out = Path(files[0]).with_name(name)
        report = fm.merge_checkpoints(files[0], files[1:], out, fm.Recipe(method=name), progress=False)
        assert analysis.scales[method.title] == pytest.approx(report.scale, rel=1e-5), name


def test_advice(files: list[str]) -> None:
    advice = analyze(files[0], files[1:]).advice
    assert (advice.method, advice.title) == ("iso_c", "Iso-C")
    assert f"{advice.scale:.2f}" in advice.reason
    assert analyze(files[0], files[1:], methods={}).advice.scale is None
    assert "(cosine 1.00)" in analyze(files[0], [files[1], files[2], files[1]]).advice.reason
    assert analyze(files[0], files[1:2]).advice.command.endswith("--method task_arithmetic --scale 1")
    biases = analyze(files[0], files[1:], select=[("norm.bias", "merge"), ("*", "copy")])
    assert biases.advice.method == "task_arithmetic"
    for words in (biases.to_html(), biases.to_text()):
        assert "No tensor is a matrix" in words


def test_numbers_of_the_evaluation_are_its_numbers() -> None:
    results = json.loads((RESULTS / "results.json").read_text())
    scores = {name: entry["accuracy"] for name, entry in results["methods"].items()}
    scores["row means removed"] = scores["row means removed, nothing else"]
    scores["individual"] = results["reference"]["individual"]
    for name, value in ACCURACY.items():
        assert round(fmean(map(fmean, scores[name][1:])), 1) == value, name
    times = [results["methods"][name]["merge_seconds"] for name in ("Iso-C", "JSV")]
    assert 17 < times[1] / times[0] < 25, "a twentieth of the time"
    measures = json.loads((RESULTS / "measures.json").read_text())
    for name, value in RANK_CORRELATION.items():
        assert round(measures["rank correlation with accuracy"][name], 2) == value
    for name, value in FILTERED.items():
        assert round(100 * (1 - measures["FR-Merging's filter keeps"][name]), 1) == value
    readme = " ".join((RESULTS.parents[3] / "README.md").read_text(encoding="utf-8").split())
    before, after = measures["variance"], measures["variance after it"]
    assert f"{before:.3f} of their energy before the filter and {after:.3f} after it" in readme
    by_accuracy = sorted(measures["methods"].values(), key=lambda method: method["accuracy"])
    assert by_accuracy[0] is measures["methods"]["weight average"]
    assert max(method["cosine"] for method in by_accuracy) == pytest.approx(by_accuracy[0]["cosine"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["iso"]}, "did you mean 'iso_c'"),
        ({"methods": "iso_c"}, "methods must be a list of names"),
        ({"methods": {"a": "iso_c"}}, "methods must be a list of names"),
        ({"select": [("*", "copy")]}, "there is nothing to analyse"),
        ({"select": [("nothing", "copy")]}, "matches no tensor"),
    ],
)
def test_bad_arguments(files: list[str], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        analyze(files[0], files[1:], **arguments)  # type: ignore[arg-type]


def test_bad_values_name_file_and_tensor(files: list[str], tmp_path: Path) -> None:
    base, tuned = plain.models(SHAPES, 1)
    tuned[0]["layers.1.w"][3, 3] = float("nan")
    with pytest.raises(fm.CheckpointError, match=r"layers\.1\.w"):
        analyze(base, tuned)
    assert torch.isfinite(base["layers.1.w"]).all()


def test_the_report_is_written_whole_or_not_at_all(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    assert main(["analyze", *files, "-o", str(out)]) == 0
    before = out.read_text(encoding="utf-8")
    assert before == analyze(files[0], files[1:]).to_html()
    assert main(["analyze", *files, "-o", str(out)]) == 3
    assert "exists; use --force (force=True) to replace it" in capsys.readouterr().err
    assert main(["analyze", *files, "-o", str(out), "--force", "--methods", "average"]) == 0
    assert out.read_text(encoding="utf-8") != before
    assert main(["analyze", *files, "-o", str(tmp_path / "nowhere" / "report.html")]) == 1
    assert main(["analyze", *files, "-o", str(tmp_path)]) == 3
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_json_is_everything(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *files, "--json", "--select", "conv=copy"]) == 0
    captured = capsys.readouterr()
    analysis = analyze(files[0], files[1:], select=[("conv", "copy")])
    assert json.loads(captured.out) == analysis.to_dict()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert found["tensors"][0]["measures"]["cosine"] == [list(row) for row in analysis.tensors[0].measures.cosine]
    assert found["band_edges"][-1] is None
    assert found["depths"].keys() == {"0", "1"}


def test_the_summary_on_the_terminal(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *files, "--methods", "iso_c,fr,jsv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("3 task vectors of 2748 entries in 5 tensors")
    rows = [line.split("  ")[0] for line in lines if line.startswith(("method ", "Iso-C ", "FR-Merging ", "Joint "))]
    assert rows == ["method", "Iso-C", "FR-Merging", "Joint singular vectors"]
    assert max(map(len, lines)) <= 100


def test_the_page_of_the_docs_names_what_there_is(files: list[str]) -> None:
    page = (RESULTS.parents[3] / "docs" / "analysis.md").read_text(encoding="utf-8")
    analysis = analyze(files[0], files[1:])
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 2]
    names = [name for _, attributes, _ in rows[1:] for name in re.findall(r"`([\w\[\].]+)`", attributes)]
    assert len(names) > 15
    total, spectrum, merged = analysis.total, analysis.total.spectra[0], analysis.total.methods["Iso-C"]
    for name in names:
        owner = spectrum if "spectra" in name or name == ".column_means" else merged if "methods" in name else total
        assert hasattr(merged if name == ".bands" else owner, name.split(".")[-1]), name
    assert f"at most {EXACT_SIDE}" in page
    assert f"min({DIRECTIONS}, n / K)" in page
    assert f"the {LEADING} strongest" in page
