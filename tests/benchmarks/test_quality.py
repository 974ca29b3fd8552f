"""The quality benchmark without its data: splits, archives, methods on small weights, table and chart."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import freemerge as fm
from benchmarks.quality import archives, methods, report, tasks
from benchmarks.quality.methods import SPECIFIC, STATIC, Inputs
from benchmarks.quality.rivals import TaskVector, flatten


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (20, 12), "a.bias": (20,), "b.weight": (8, 20)}

    def weights(size: float) -> TaskVector:
        return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base = weights(1.0)
    models = {f"task{i}": {name: base[name] + tensor for name, tensor in weights(0.1).items()} for i in range(3)}
    return Inputs(base, models)


def test_every_static_method_merges_and_leaves_the_weights_alone(inputs: Inputs) -> None:
    before = [flatten(weights) for weights in (inputs.base, *inputs.models.values())]
    for method in STATIC:
        merged = method.merge(inputs)
        assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in inputs.base.items()}
        assert torch.isfinite(flatten(merged)).all(), method.name
    after = [flatten(weights) for weights in (inputs.base, *inputs.models.values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_every_method_that_keeps_something_counts_its_bytes(inputs: Inputs) -> None:
    with pytest.raises(SystemExit, match="measured first"):
        SPECIFIC[-2].build(inputs, 1.0)
    inputs.scales |= {static.name: static.candidates[0] for static in STATIC}
    for method in SPECIFIC:
        small = "low rank" in method.name  # a share of so small a model is no file
        build = methods.low_rank("Iso-C", budget="60 %") if small else method.build
        kept = build(inputs, method.candidates[0])
        assert len(kept.parts) == 3, method.name
        assert kept.bytes_per_task > 0
        assert torch.isfinite(flatten(kept.parts[0][-1])).all()


def test_a_method_has_one_name_and_as_many_candidates_as_the_others() -> None:
    names = [method.name for method in (*STATIC, *SPECIFIC)]
    assert len(set(names)) == len(names)
    assert {len(method.candidates) for method in STATIC} <= {1, 6}
    assert {len(method.candidates) for method in SPECIFIC} <= {1, 6}


def test_twin_sparse_keeps_the_largest_exclusive_entries(inputs: Inputs) -> None:
    inputs.scales["Task Arithmetic"] = 0.5
    shared = inputs.merged("Task Arithmetic")
    kept = methods.twin_sparse(0.1)(inputs, 1.0)
    exclusive = flatten(inputs.vectors[1]) - flatten(shared)
    sparse = flatten(kept.parts[1][1])
    count = int(0.1 * exclusive.numel())
    assert int((sparse != 0).sum()) == count
    torch.testing.assert_close(sparse[sparse != 0], exclusive[sparse != 0], rtol=1e-3, atol=1e-5)  # fp16 values
    assert exclusive.abs().sort(descending=True).values[count] <= sparse[sparse != 0].abs().min() * 1.001
    assert torch.equal(flatten(kept.parts[1][0]), flatten(shared))


def test_the_permuted_control_is_the_filter_in_another_order(inputs: Inputs) -> None:
    nothing = fm.Recipe(response=fm.HighPass(0), renormalize=None)
    plain, control = methods.recipe_merge(nothing)(inputs), methods.permuted_merge(nothing)(inputs)
    torch.testing.assert_close(flatten(control), flatten(plain), rtol=0, atol=1e-6)
    some = fm.Recipe(response=fm.HighPass(0.3), renormalize=None)
    plain, control = methods.recipe_merge(some)(inputs), methods.permuted_merge(some)(inputs)
    assert (flatten(control) - flatten(plain)).norm() > 0.1 * flatten(plain).norm()
    one = Inputs({"w": torch.zeros(6, 4)}, {"t": {"w": torch.randn(6, 4, generator=torch.Generator().manual_seed(5))}})
    # With mean removal the order does not matter at all.
    centred = fm.Recipe(response=fm.Center(-1), renormalize=None)
    torch.testing.assert_close(methods.permuted_merge(centred)(one), methods.recipe_merge(centred)(one))


def test_archives_are_found_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = tmp_path / "packages.txt"
    pins.write_text("# comment\nSome-Texts==1.0\nother.data==2.1\n")
    monkeypatch.setattr(archives, "PACKAGES", pins)
    with zipfile.ZipFile(tmp_path / "some_texts-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("texts/b.txt", "second")
        wheel.writestr("texts/a.txt", "first")
        wheel.writestr("texts/a.py", "code")
    with tarfile.open(tmp_path / "other_data-2.1.tar.gz", "w:gz") as sdist:
        info = tarfile.TarInfo("other_data-2.1/table.tab")
        info.size = 3
        sdist.addfile(info, io.BytesIO(b"1\t2"))
    assert archives.pinned() == ["Some-Texts==1.0", "other.data==2.1"]
    found = archives.members(archives.archive(tmp_path, "some-texts"), r"\.txt$")
    assert list(found) == [("texts/a.txt", b"first"), ("texts/b.txt", b"second")]
    assert archives.member(archives.archive(tmp_path, "other.data"), "table") == b"1\t2"
    (tmp_path / "other_data-2.1.tar.gz").rename(tmp_path / "other_data-2.11.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"other\.data==2\.1"):
        archives.archive(tmp_path, "other.data")


def test_a_split_keeps_documents_together_and_drops_contradictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corpus(folder: Path) -> tasks.Corpus:
        for document in range(300):
            for sentence in range(4):
                yield f"d{document}", f"{document} {sentence}", "large" if document % 6 else "small"
        yield "x", "contradiction", "large"
        yield "y", "Contradiction", "small"
        yield "z", "0 0", "small"  # a duplicate

    monkeypatch.setitem(tasks.SOURCES, "toy", tasks.Source(corpus, "none", "a {} thing"))
    task = tasks.load("toy", tmp_path, seed=3, test=100)
    assert task.prompts == ["a large thing", "a small thing"]
    assert (len(task.test), len(task.validation)) == (100, 100)
    parts = [task.train, task.validation, task.test]
    documents = [{text.split()[0] for text in part.texts} for part in parts]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    texts = [text for part in parts for text in part.texts]
    assert len(set(texts)) == len(texts)
    assert not any("ontradiction" in text for text in texts)
    for part in parts:
        for text, label in zip(part.texts, part.labels, strict=True):
            assert label == (int(text.split()[0]) % 6 == 0)
    # Large classes are thinned to twice the median class, in every part alike.
    labels = [label for part in parts for label in part.labels]
    assert labels.count(0) <= 1000
    again, other = tasks.load("toy", tmp_path, seed=3, test=100), tasks.load("toy", tmp_path, seed=4, test=100)
    assert again == task
    assert other.test.texts != task.test.texts


@pytest.fixture
def results() -> dict[str, Any]:
    def entry(accuracy: list[list[float]], **more: Any) -> dict[str, Any]:
        plain = {"storage": 0.0, "value": 1.0, "tuning": {}, "routed": [], "routed_head": [], "wrong_expert": []}
        return plain | {"merge_seconds": 0.5, "switch_seconds": None, "accuracy": accuracy} | more

    return {
        "settings": {"tasks": ["x", "y"], "seeds": [0, 1], "steps": 80, "test": 400},
        "reference": {
            "pretrained": [[40.0, 60.0], [50.0, 60.0]],
            "individual": [[80.0, 90.0], [82.0, 92.0]],
            "routing": [90.0, 92.0],
            "switch_seconds": 0.02,
        },
        "methods": {
            "weight average": entry([[60.0, 70.0], [62.0, 70.0]]),
            "FREE, 1 %": entry(
                [[78.0, 88.0], [80.0, 90.0]],
                storage=1.556,
                value=7.0,
                tuning={"7.0": 84.0},
                switch_seconds=0.005,
                routed=[[77.0, 87.0], [79.0, 89.0]],
                routed_head=[[70.0, 80.0], [72.0, 82.0]],
                wrong_expert=[[30.0, 40.0], [32.0, 42.0]],
            ),
        },
    }


def test_the_table_says_what_was_measured(results: dict[str, Any]) -> None:
    text = report.table(results)
    assert "| pretrained | | 52.5 ± 3.5 | | | |" in text
    assert "| weight average |  | 65.5 ± 0.7 | 0 | 0.5 |  |" in text
    assert "| FREE, 1 % | 7 | 84.0 ± 1.4 | 1.56 | 0.5 | 5.0 |" in text
    assert "| FREE, 1 % | 84.0 ± 1.4 | 83.0 ± 1.4 | 76.0 ± 1.4 | 36.0 ± 1.4 |" in text
    assert "91.0 % of the test texts" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "| FREE, 1 % | 79.0 | 89.0 |" in report.by_task(results)


def test_the_readme_shows_the_committed_results() -> None:
    root = Path(__file__).parents[2]
    path = root / "benchmarks/results/quality/results.json"
    if not path.exists():
        pytest.skip("a source distribution holds no results")
    committed = json.loads(path.read_text())
    assert report.table(committed) in (root / "README.md").read_text()


def test_differences_are_paired_by_seed(results: dict[str, Any]) -> None:
    methods = results["methods"]
    methods["FR-Merging"], methods["Iso-C"] = methods["FREE, 1 %"], methods["weight average"]
    assert "| FR-Merging | Iso-C | +18.5 | +18.0 | +19.0 |" in report.table(results)
    assert "Task Arithmetic" not in report.table(results)


def test_one_seed_has_no_spread_and_an_unfinished_row_says_so(results: dict[str, Any]) -> None:
    assert report.mean_and_spread([[1.0, 3.0]]) == (2.0, 0.0)
    del results["methods"]["weight average"]["accuracy"][1]
    assert "| weight average |  | 65.0 (of 1 seed) | 0 |" in report.table(results)


def test_report_files(results: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(json.loads(json.dumps(results)), tmp_path, "the command")
    assert (tmp_path / "table.md").read_text().startswith("Made by `the command`.")
    chart = (tmp_path / "chart.png").read_bytes()
    assert chart.startswith(b"\x89PNG")
    assert len(np.unique(np.frombuffer(chart, dtype=np.uint8))) > 100
