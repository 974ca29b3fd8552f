"""Small tensors are merged end to end as one vector, to the bytes that each of them has alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import freemerge as fm
from freemerge.accumulate import abs_means, part_means
from freemerge.checkpoint import Checkpoint, Inputs
from freemerge.merging.engine import Merger

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RECIPES = [
    fm.Recipe(),
    fm.Recipe(weights="uniform", sign_election=True),
    fm.Recipe(method="average", out_dtype="float16"),
    fm.Recipe(method="task_arithmetic", compute_dtype="float64"),
    fm.Recipe(method="ties"),
    fm.Recipe(method="average", filter="before"),
    fm.Recipe(scope="tensor"),
    fm.Recipe(method="dare"),
]


def states(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], count: int) -> list[dict[str, torch.Tensor]]:
    made = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        made.append(
            {
                f"layer.{number}.x": torch.randn(shape, generator=generator).to(dtype)
                for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
            }
        )
    return made


shape = st.sampled_from([(), (0,), (1,), (3,), (16,), (7, 5), (2, 3, 2), (257,)])


@settings(max_examples=30, deadline=None)
@given(
    tensors=st.lists(st.tuples(shape, st.sampled_from(DTYPES)), min_size=1, max_size=12),
    recipe=st.sampled_from(RECIPES),
    shards=st.sampled_from([1 << 20, 200]),
)
def test_the_bytes_are_those_of_each_tensor_alone(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: list[tuple[tuple[int, ...], torch.dtype]],
    recipe: fm.Recipe,
    shards: int,
) -> None:
    folder = tmp_path_factory.mktemp("small")
    everything = states([s for s, _ in tensors], [d for _, d in tensors], 3)
    for index, state in enumerate(everything):
        save_file(state, folder / f"{index}.safetensors")
    base, *models = (folder / f"{index}.safetensors" for index in range(3))
    report = fm.merge_checkpoints(base, models, folder / "out", recipe, progress=False, max_shard_bytes=shards)
    expected = fm.merge(everything[0], everything[1:], recipe)  # one tensor after the other
    found = {
        name: tensor for file in (folder / "out").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8)), name
    assert fm.verify(folder / "out") == []
    assert report.scale


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 64, 33000]), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=3, max_size=3),
    backend=st.sampled_from(["auto", "torch"]),
)
def test_means_of_parts(sizes: list[int], dtypes: list[torch.dtype], backend: str) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    base, *models = (torch.randn(sum(sizes), generator=generator).to(dtype) for dtype in dtypes)
    parts = zip(*(torch.split(tensor, sizes) for tensor in (base, *models)), strict=True)
    expected = [abs_means(first, others, backend=backend) for first, *others in parts]
    assert part_means(base, models, sizes, backend=backend) == expected


def test_means_of_parts_that_do_not_fit() -> None:
    with pytest.raises(fm.ArgumentError, match="base must be a contiguous vector of 3 entries"):
        part_means(torch.ones(4), [torch.ones(4)], [1, 2])


def test_many_small_tensors_are_few_steps_and_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, dtypes = [(16,)] * 400, [torch.bfloat16, torch.float32] * 200
    for index, state in enumerate(states(shapes, dtypes, 3)):
        save_file(state, tmp_path / f"{index}.safetensors")
    opened = [Checkpoint.open(tmp_path / f"{index}.safetensors") for index in range(3)]
    merger = Merger(Inputs(opened[0], opened[1:]), fm.Recipe())
    assert len(merger.units) == 400
    assert [len(step.names) for step in merger.steps] == [200, 200], "one vector of each dtype"
    reads: list[int] = []
    read = type(opened[0]).read_flat
    monkeypatch.setattr(type(opened[0]), "read_flat", lambda self, names: reads.append(len(names)) or read(self, names))
    measured = merger.measure()
    for step in merger.steps:
        merger.merged(step, measured)
    assert reads == [200] * (2 * 3 + 2 * 4), "measured once, then read by the sum, and the base by the addition"


@pytest.mark.parametrize(("index", "recipe"), [(1, fm.Recipe()), (0, fm.Recipe(weights="uniform"))])
def test_a_small_tensor_that_is_not_finite_is_named(index: int, recipe: fm.Recipe, tmp_path: Path) -> None:
    everything = states([(5,)] * 6, [torch.float32] * 6, 2)
    everything[index]["layer.4.x"][2] = float("nan")
    for number, state in enumerate(everything):
        save_file(state, tmp_path / f"{number}.safetensors")
    with pytest.raises(fm.CheckpointError, match=rf"{index}\.safetensors: tensor 'layer\.4\.x' holds NaN"):
        fm.merge_checkpoints(tmp_path / "0.safetensors", [tmp_path / "1.safetensors"], tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_a_small_result_that_overflows_is_named(tmp_path: Path) -> None:
    base, model = states([(5,)] * 3, [torch.float16] * 3, 2)
    model["layer.1.x"][0], base["layer.1.x"][0] = 60000.0, 0.0
    save_file(base, tmp_path / "0.safetensors")
    save_file(model, tmp_path / "1.safetensors")
    with pytest.raises(fm.CheckpointError, match=r"merged model at scale 3 in float16: tensor 'layer\.1\.x'"):
        fm.merge_checkpoints(
            tmp_path / "0.safetensors", [tmp_path / "1.safetensors"], tmp_path / "out", fm.Recipe(scale=3.0)
        )


@pytest.mark.parametrize("recipe", [fm.Recipe(), fm.Recipe(method="ties"), fm.Recipe(method="average")])
def test_a_small_difference_that_overflows_is_named(recipe: fm.Recipe, tmp_path: Path) -> None:
    base = {f"{name}.bias": torch.ones(3) for name in "abcd"}
    model = {name: tensor + 1 for name, tensor in base.items()}
    base["b.bias"][1], model["b.bias"][1] = 3e38, -3e38
    for name, state in (("base", base), ("model", model)):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(fm.CheckpointError, match=r"tensor 'b\.bias': the difference of a model and the base overflows"):
        fm.merge(tmp_path / "base.safetensors", [tmp_path / "model.safetensors"] * 2, recipe)
