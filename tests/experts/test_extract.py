"""Experts against a selection in numpy: exact counts, ties, edge cases, streaming."""

from __future__ import annotations

import inspect
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from task_vectors import SOURCES, Source, counted_reads, dense, family, reference_kept, vectors
from torch import nn

import freemerge.experts as fx
from freemerge.errors import ArgumentError, CheckpointError
from freemerge.experts.entries import kept_entries
from freemerge.experts.names import Scope


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
@pytest.mark.parametrize(("density", "trim"), [(0.01, 0.0), (0.29, 0.0), (0.05, 0.02), (0.9, 0.5)])
def test_kept_entries_are_the_reference_s(scope: Scope, density: float, trim: float, source: Source) -> None:
    base, models = source()
    experts = fx.extract_experts(base, models, density=density, scope=scope, trim=trim, values="fp32", rescale=1.0)
    assert list(experts) == list(models)
    for task, model in models.items():
        expected = reference_kept(vectors(base, model), density, scope, trim)
        kept = dense(experts[task], base)
        for name in base:
            np.testing.assert_array_equal(kept[name], expected[name], err_msg=f"{task} {name}")
        assert experts[task].entries == sum(np.count_nonzero(x) for x in expected.values())


@pytest.mark.parametrize(
    ("n", "density", "k"), [(1, 0.01, 1), (99, 0.01, 1), (100, 0.29, 29), (768, 0.01, 7), (700, 0.01, 7), (50, 0.5, 25)]
)
def test_number_of_kept_entries(n: int, density: float, k: int) -> None:
    assert kept_entries(n, density) == k


def test_fewer_non_zeros_than_k_are_all_kept() -> None:
    base = {"w": torch.zeros(100, 10)}
    model = {"w": base["w"].clone()}
    model["w"].view(-1)[[3, 500]] = torch.tensor([1.0, -2.0])
    expert = fx.extract_experts(base, {"t": model}, density=0.1, values="fp32")["t"]
    assert expert.tensors["w"].indices.tolist() == [3, 500]
    assert expert.tensors["w"].sparse().values.tolist() == [1.0, -2.0]


def test_ties_take_the_lowest_index_and_the_first_tensor() -> None:
    base = {"b": torch.zeros(10), "a": torch.zeros(10)}
    model = {name: torch.ones(10) for name in base}
    by_tensor = fx.extract_experts(base, {"t": model}, density=0.3)["t"]
    assert {name: tensor.indices.tolist() for name, tensor in by_tensor.tensors.items()} == {
        "a": [0, 1, 2],
        "b": [0, 1, 2],
    }
    by_model = fx.extract_experts(base, {"t": model}, density=0.3, scope="model")["t"]
    assert {name: tensor.indices.tolist() for name, tensor in by_model.tensors.items()} == {"a": [0, 1, 2, 3, 4, 5]}


def test_what_gets_no_expert() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    base = {**module.state_dict(), "logit_scale": torch.tensor(2.0), "none": torch.empty(0, 3)}
    head = torch.randn(5, 4)
    base |= {"embed": head, "head": head}
    changed = head + 1
    model = {name: tensor + 1 for name, tensor in base.items()} | {"embed": changed, "head": changed}
    expert = fx.extract_experts(base, {"t": model})["t"]
    assert sorted(expert.tensors) == ["0.bias", "0.weight", "1.bias", "1.weight", "embed"]


def test_checkpoints_on_disk_modules_and_state_dicts_give_the_same_experts(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, models = family(torch.bfloat16, models=2)
    save_file(base, tmp_path / "base.safetensors")
    (tmp_path / "cooking").mkdir()
    save_file(models["t0"], tmp_path / "cooking" / "model.safetensors")
    save_file(models["t1"], tmp_path / "law.safetensors")
    on_disk = fx.extract_experts(
        tmp_path / "base.safetensors", [tmp_path / "cooking", str(tmp_path / "law.safetensors")]
    )
    in_memory = fx.extract_experts(base, list(models.values()))
    assert list(on_disk) == ["cooking", "law"]
    with os.scandir(tmp_path) as entries:
        others = [entry for entry in entries if entry.name != "base.safetensors"]
    assert {*fx.extract_experts(tmp_path / "base.safetensors", others)} == {"cooking", "law"}
    assert list(in_memory) == ["task0", "task1"]
    for one, two in zip(on_disk.values(), in_memory.values(), strict=True):
        assert one.mu == two.mu
        for name, tensor in one.tensors.items():
            assert torch.equal(tensor.dense(), two.tensors[name].dense())


@pytest.mark.parametrize("rescale", ["auto", "projection"])
def test_threads_do_not_matter(rescale: str) -> None:
    base, models = family()
    base = {name: tensor * 0.03 for name, tensor in base.items()}
    backbone = models["t0"] if rescale == "projection" else None
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(
                fx.extract_experts(base, models, rescale=rescale, backbone=backbone, scope="model", density=0.1)
            )
    finally:
        torch.set_num_threads(threads)
    for task in models:
        assert results[0][task].mu == results[1][task].mu
        for name, tensor in results[0][task].tensors.items():
            assert np.array_equal(tensor.to_bytes(), results[1][task].tensors[name].to_bytes())


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("where", [0, 3299])
def test_non_finite_values_are_named(scope: Scope, where: int) -> None:
    base, models = family()
    models["t1"]["c.weight"].view(-1)[where] = math.nan
    with pytest.raises(CheckpointError, match=r"models\['t1'\].*'c\.weight' (is not finite|holds NaN)"):
        fx.extract_experts(base, models, scope=scope)


def test_a_non_finite_backbone_is_named() -> None:
    base, models = family()
    backbone = {**base, "n.weight": torch.full((64,), math.inf)}
    with pytest.raises(CheckpointError, match=r"'n\.weight' is not finite"):
        fx.extract_experts(base, models, rescale="projection", backbone=backbone)


@pytest.mark.parametrize(("scope", "passes"), [("tensor", 1), ("row", 1), ("model", 2)])
@pytest.mark.parametrize("rescale", ["auto", "released", "paper", "projection", "least_squares"])
def test_how_often_tensors_are_read(scope: Scope, passes: int, rescale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family()
    backbone = dict(models["t0"]) if rescale in ("projection", "least_squares") else None
    experts = fx.iter_experts(base, models, scope=scope, rescale=rescale, backbone=backbone)
    reads = counted_reads(experts, monkeypatch)  # what was read so far was the comparison of the inputs
    each = 2 * passes * len(models)  # base and model
    count = len(models)
    more = {"auto": 1, "released": 0, "paper": 1 + count, "projection": count, "least_squares": 3 * count}[rescale]
    assert reads == dict.fromkeys(base, each + more)


def test_a_density_in_percent() -> None:
    base, models = family()
    (one, *_), (two, *_) = (fx.extract_experts(base, models, density=d).values() for d in (0.02, "2%"))
    assert one.density == two.density
    assert one.entries == two.entries


def test_extract_experts_has_the_parameters_of_iter_experts() -> None:
    extract, iterate = map(inspect.signature, (fx.extract_experts, fx.iter_experts))
    assert extract.parameters == iterate.parameters
    assert extract.return_annotation == "dict[str, Expert]"


@pytest.mark.parametrize("single", ["math", Path("math"), nn.Linear(2, 2), {"w": torch.zeros(2, 2)}])
def test_a_single_model_is_no_list(single: object) -> None:
    with pytest.raises(ArgumentError, match="models must be a list of models, got a single one"):
        fx.extract_experts({"w": torch.zeros(2, 2)}, single)  # type: ignore[arg-type]


def test_bad_arguments_are_named_before_anything_is_read() -> None:
    base, models = family()
    for message, options in [
        *(("density must be a share", {"density": density}) for density in (0.0, 1.0, "much", [0.1], True)),
        ("trim must be", {"trim": "1%"}),
        ("rescale must be one of", {"rescale": None}),
        ("rescale must be one of", {"rescale": ["auto"]}),
        ("scope must be one of", {"scope": ["row"]}),
        ("trim must be", {"trim": -0.1}),
        ("scope must be one of", {"scope": "layer"}),
        ("rescale must be one of", {"rescale": "best"}),
        ("rescale must be one of", {"rescale": math.nan}),
        ("values must be one of", {"values": "fp8"}),
        ("backbone must be given", {"rescale": "projection"}),
        ("backbone must be given", {"backbone": base}),
    ]:
        with pytest.raises(ArgumentError, match=message):
            fx.iter_experts(base, models, **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="models must hold at least one"):
        fx.iter_experts(base, {})
    for name in ("a/b", ".hidden", "", "x" * 229, "ü" * 115, "\ud800"):
        with pytest.raises(ArgumentError, match="cannot name a task"):
            fx.iter_experts(base, {name: base})
    with pytest.raises(CheckpointError, match="lacks"):
        fx.iter_experts(base, {"t": {"a.weight": base["a.weight"]}})


def test_models_on_disk_are_named_after_what_tells_their_paths_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("x/math/last", "x/code/last", "y/math/last", "law", "x/code/tuned")]
    for path in paths:
        path.mkdir(parents=True)
        save_file({"w": torch.ones(2, 3)}, path / "model.safetensors")
    experts = fx.extract_experts({"w": torch.zeros(2, 3)}, [*paths, paths[0] / "model.safetensors"])
    assert list(experts) == ["x-math-last", "x-code-last", "y-math-last", "law", "tuned", "model"]
    with pytest.raises(ArgumentError, match="two are called 'last'"):
        fx.extract_experts({"w": torch.zeros(2, 3)}, [paths[0], paths[0]])
