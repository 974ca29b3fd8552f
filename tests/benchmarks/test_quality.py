"""The quality benchmark without its data: splits, archives, methods on small weights, table and chart."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import freemerge as fm
from benchmarks.quality import archives, images, measure, methods, report, texts
from benchmarks.quality.measure import tuned
from benchmarks.quality.methods import SPECIFIC, STATIC, Inputs, Static
from benchmarks.quality.suite import TaskVector


def flatten(vector: TaskVector) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in vector.values()])


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (20, 12), "a.bias": (20,), "b.weight": (8, 20)}

    def weights(size: float) -> TaskVector:
        return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base = weights(1.0)
    models = {f"task{i}": {name: base[name] + tensor for name, tensor in weights(0.1).items()} for i in range(3)}

    def unlabelled(state: TaskVector) -> Iterator[torch.Tensor]:
        yield torch.tanh(state["a.weight"] + state["a.bias"][:, None])

    return Inputs(base, models, unlabelled=unlabelled)


def test_every_static_method_merges_and_leaves_the_weights_alone(inputs: Inputs) -> None:
    before = [flatten(weights) for weights in (inputs.base, *inputs.models.values())]
    for method in STATIC.values():
        merged = method.merge(inputs)
        assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in inputs.base.items()}
        assert torch.isfinite(flatten(merged)).all(), method.name
    after = [flatten(weights) for weights in (inputs.base, *inputs.models.values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_the_scale_without_data_is_the_one_that_a_merge_takes(inputs: Inputs) -> None:
    for name in ("Task Arithmetic", "FR-Merging", "Iso-C"):
        static = STATIC[name]
        merged = static.merge(inputs)
        scale = static.data_free(inputs, merged)
        whole = fm.merge(inputs.base, list(inputs.models.values()), static.recipe)
        for key, tensor in merged.items():
            torch.testing.assert_close(inputs.base[key] + scale * tensor, whole[key])


def test_every_method_that_keeps_something_counts_its_bytes(inputs: Inputs) -> None:
    with pytest.raises(SystemExit, match="measured first"):
        SPECIFIC["FREE, 1 %"].build(inputs)
    inputs.scales |= {name: static.candidates[0] for name, static in STATIC.items()}
    for name, method in SPECIFIC.items():
        small = name.endswith("%") and ("low rank" in name or "gains" in name)  # a share of so small a model is no file
        options = {"values": "gains"} if "gains" in name else {}
        build = methods.on("Iso-C", budget="60 %", **options) if small else method.build
        kept = build(inputs)
        assert len(kept.parts) == 3, name
        assert (kept.bytes_per_task > 0) == (kept.experts is not None), name
        assert torch.isfinite(flatten(kept.parts[0][-1])).all()
        assert method.backbone is None or method.backbone in STATIC


def test_a_tuned_scale_has_as_many_candidates_as_the_others() -> None:
    assert {len(method.candidates) for method in STATIC.values()} == {1, 6}


@pytest.mark.parametrize(("best", "tried"), [(2.0, []), (0.4, [0.5, 0.25]), (9.0, [8.0, 16.0]), (1.0, [0.5])])
def test_the_tuned_scale_is_no_end_of_what_was_tried(best: float, tried: list[float]) -> None:
    found = tuned((1.0, 2.0, 4.0), lambda scale: -abs(math.log(scale / best)))
    assert list(found) == [1.0, 2.0, 4.0, *tried]
    assert sorted(found)[0] < max(found, key=found.__getitem__) < sorted(found)[-1]


def test_tuning_ends_where_the_scale_does_not_matter() -> None:
    assert list(tuned((1.0, 2.0), lambda scale: 50.0)) == [1.0, 2.0, 0.5]
    assert tuned((1.0,), lambda scale: 50.0) == {1.0: 50.0}


def test_twin_sparse_keeps_the_largest_exclusive_entries(inputs: Inputs) -> None:
    inputs.scales["Task Arithmetic"] = 0.5
    shared = inputs.merged("Task Arithmetic")
    kept = methods.twin_sparse(0.1)(inputs)
    exclusive = flatten(inputs.vectors[1]) - flatten(shared)
    sparse = flatten(kept.parts[1][1])
    count = int(0.1 * exclusive.numel())
    assert int((sparse != 0).sum()) == count
    torch.testing.assert_close(sparse[sparse != 0], exclusive[sparse != 0], rtol=1e-3, atol=1e-5)  # fp16 values
    assert exclusive.abs().sort(descending=True).values[count] <= sparse[sparse != 0].abs().min() * 1.001
    assert torch.equal(flatten(kept.parts[1][0]), flatten(shared))


def test_the_permuted_control_is_the_filter_in_another_order(inputs: Inputs) -> None:
    def both(response: fm.Response, inputs: Inputs) -> tuple[TaskVector, TaskVector]:
        recipe = fm.Recipe(response=response, renormalize=None)
        plain, control = (Static("", recipe, (1.0,), permuted).merge(inputs) for permuted in (False, True))
        return plain, control

    plain, control = both(fm.HighPass(0), inputs)
    torch.testing.assert_close(flatten(control), flatten(plain), rtol=0, atol=1e-6)
    plain, control = both(fm.HighPass(0.3), inputs)
    assert (flatten(control) - flatten(plain)).norm() > 0.1 * flatten(plain).norm()
    one = Inputs({"w": torch.zeros(6, 4)}, {"t": {"w": torch.randn(6, 4, generator=torch.Generator().manual_seed(5))}})
    # With mean removal the order does not matter at all.
    plain, control = both(fm.Center(-1), one)
    torch.testing.assert_close(control, plain)


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
    def corpus(folder: Path) -> texts.Corpus:
        for document in range(300):
            for sentence in range(4):
                yield f"d{document}", f"{document} {sentence}", "large" if document % 6 else "small"
        yield "x", "contradiction", "large"
        yield "y", "Contradiction", "small"
        yield "z", "0 0", "small"  # a duplicate

    monkeypatch.setitem(texts.SOURCES, "toy", texts.Source(corpus, "none", "a {} thing"))
    task = texts.load("toy", tmp_path, seed=3, test=100)
    assert task.prompts == ["a large thing", "a small thing"]
    assert (len(task.test), len(task.validation)) == (100, 100)
    parts = [task.train, task.validation, task.test]
    documents = [{text.split()[0] for text in part.texts} for part in parts]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    passages = [text for part in parts for text in part.texts]
    assert len(set(passages)) == len(passages)
    assert not any("ontradiction" in text for text in passages)
    for part in parts:
        for text, label in zip(part.texts, part.labels, strict=True):
            assert label == (int(text.split()[0]) % 6 == 0)
    # Large classes are thinned to twice the median class, in every part alike.
    labels = [label for part in parts for label in part.labels]
    assert labels.count(0) <= 1000
    again, other = texts.load("toy", tmp_path, seed=3, test=100), texts.load("toy", tmp_path, seed=4, test=100)
    assert again == task
    assert other.test.texts != task.test.texts


def test_images_of_a_document_are_in_one_split_in_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def corpus(folder: Path) -> images.Corpus:
        for i in range(600):
            yield f"d{i % 200}", torch.full((28, 28), float(i % 200)), "odd" if i % 2 else "even"

    monkeypatch.setattr(images, "SOURCES", {"one": corpus, "other": corpus})
    one, other = (images.load(name, Path(), seed=3, test=100) for name in ("one", "other"))

    def documents(split: images.Split) -> set[float]:
        return set(split.images[:, 0, 0].tolist())

    assert len(one.test.labels) == 100
    assert one.classes == 2
    for task in (one, other):
        for part in ("train", "validation"):
            assert not documents(getattr(task, part)) & documents(one.test)
    assert all(label == image[0, 0] % 2 for image, label in zip(one.train.images, one.train.labels, strict=True))
    assert documents(images.load("one", Path(), seed=4, test=100).test) != documents(one.test)


@pytest.fixture
def results() -> dict[str, Any]:
    def entry(accuracy: list[list[float]], **more: Any) -> dict[str, Any]:
        lists = ("data_free", "data_free_scale", "routed", "routed_head", "wrong_expert")
        plain = {"storage": 0.0, "backbone": None, "value": None, "tuning": {}} | {key: [] for key in lists}
        return plain | {"merge_seconds": 0.5, "switch_seconds": None, "accuracy": accuracy} | more

    return {
        "settings": {"modality": "texts", "tasks": ["x", "y"], "seeds": [0, 1, 2], "steps": 80, "test": 400},
        "reference": {
            "pretrained": [[0.0, 0.0], [40.0, 60.0], [50.0, 60.0]],
            "individual": [[0.0, 0.0], [80.0, 90.0], [82.0, 92.0]],
            "routing": [0.0, 90.0, 92.0],
            "switch_seconds": 0.02,
        },
        "methods": {
            "FR-Merging": entry(
                [[60.0, 70.0], [60.0, 70.0], [62.0, 70.0]],
                value=4.0,
                tuning={"4.0": 84.0},
                data_free=[[0.0, 0.0], [60.0, 60.0], [60.0, 60.0]],
                data_free_scale=[2.0, 3.0, 4.0],
            ),
            "FREE, 1 %": entry(
                [[60.0, 69.0], [78.0, 88.0], [80.0, 90.0]],
                storage=1.556,
                backbone="FR-Merging",
                switch_seconds=0.005,
                routed=[[0.0, 0.0], [77.0, 87.0], [79.0, 89.0]],
                routed_head=[[0.0, 0.0], [70.0, 80.0], [72.0, 82.0]],
                wrong_expert=[[0.0, 0.0], [30.0, 40.0], [32.0, 42.0]],
            ),
        },
    }


def test_the_table_says_what_was_measured(results: dict[str, Any]) -> None:
    text = report.table(results)
    assert "| pretrained | | 52.5 ± 3.5 | | 0.0 | |  | | |" in text
    assert "| FR-Merging | 4, 3.50 | 65.5 ± 0.7 | 60.0 ± 0.0 | 65.0 |  | 0 | 0.5 |  |" in text
    assert "| FREE, 1 % |  | 84.0 ± 1.4 |  | 64.5 | +18.5, -0.5 | 1.56 | 0.5 | 5.0 |" in text
    assert "| FREE, 1 % | 84.0 ± 1.4 | 83.0 ± 1.4 | 76.0 ± 1.4 | 36.0 ± 1.4 |" in text
    assert "91.0 % of the test" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "| FREE, 1 % | 72.7 | 82.3 |" in report.by_task(results)


@pytest.mark.parametrize("modality", ["texts", "images"])
def test_the_documents_show_the_committed_results(modality: str) -> None:
    root = Path(__file__).parents[2]
    folder = root / "benchmarks/results/quality" / modality
    if not folder.exists():
        pytest.skip("not measured yet, or a source distribution without results")
    committed = json.loads((folder / "results.json").read_text())
    assert report.table(committed) in (root / "docs/evaluation.md").read_text()


def test_differences_are_paired_by_seed(results: dict[str, Any]) -> None:
    methods = results["methods"]
    methods["Iso-C"] = methods["FREE, 1 %"]
    assert "| Iso-C | FR-Merging | +18.5 | -0.5 | +18.0 | +19.0 |" in report.table(results)
    assert "Task Arithmetic" not in report.table(results)


def test_one_seed_has_no_spread_and_an_unfinished_row_says_so(results: dict[str, Any]) -> None:
    assert report.mean_and_spread([[1.0, 3.0]]) == (2.0, 0.0)
    del results["methods"]["FR-Merging"]["accuracy"][1:]
    assert "| FR-Merging | 4, 3.50 | 65.0 (1 of 3 seeds) |" in report.table(results)


def test_a_run_goes_on_with_more_seeds_and_refuses_other_settings(results: dict[str, Any], tmp_path: Path) -> None:
    settings = measure.Settings("texts", ["x", "y"], [0, 1, 2, 3], 80, 400)
    assert measure._start(tmp_path, settings)["methods"] == {}
    results["environment"] = {"commits": ["abc"]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    begun = measure._start(tmp_path, settings)
    assert begun["settings"]["seeds"] == [0, 1, 2, 3]
    assert begun["methods"] == results["methods"]
    assert begun["environment"]["commits"][0] == "abc"
    for other in ({"seeds": [0, 1]}, {"seeds": [1, 0, 2]}, {"steps": 81}):
        with pytest.raises(SystemExit, match="other settings"):
            measure._start(tmp_path, dataclasses.replace(settings, **other))


def test_report_files(results: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(json.loads(json.dumps(results)), tmp_path)
    assert (tmp_path / "table.md").read_text().startswith("Made by `python -m benchmarks.quality run --modality texts")
    chart = (tmp_path / "chart.png").read_bytes()
    assert chart.startswith(b"\x89PNG")
    assert len(np.unique(np.frombuffer(chart, dtype=np.uint8))) > 100
