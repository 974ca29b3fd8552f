"""Routers and feature extractors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from routing import TASKS, Sequences, blobs
from safetensors.torch import save_file
from torch import nn

from freemerge.errors import ArgumentError, CheckpointError, RefusedError
from freemerge.experts import PooledState, Router
from freemerge.experts.router import pooled


def test_a_fitted_router_tells_held_out_tasks_apart(router: Router) -> None:
    features, ids = blobs(300, seed=1)
    chosen = [router.tasks[column] for column in router(features).argmax(1).tolist()]
    assert sum(a == b for a, b in zip(chosen, ids, strict=True)) >= 297
    assert sorted(router.tasks) == sorted(TASKS)


@pytest.mark.parametrize(("constant", "noise"), [(0.0, 0.0), (7.0, 0.0), (1e6, 0.05), (0.0, 1e-5), (1e-30, 1e-33)])
def test_features_that_were_constant_in_the_fit_have_no_say(constant: float, noise: float) -> None:
    """Rounding and what is as small leave nothing to compare with, such as units of a ReLU that were off."""
    generator = torch.Generator().manual_seed(0)
    features, ids = blobs(150, seed=0)
    quiet = constant + noise * torch.randn(150, 5, generator=generator)
    router = Router.fit(torch.cat([features, quiet], 1), ids, hidden=16, steps=100)
    held_out, expected = blobs(300, seed=1)
    for later in (0.0, 1.0, -1e5):
        chosen = router(torch.cat([held_out, torch.full((300, 5), constant + later)], 1)).argmax(1).tolist()
        assert sum(router.tasks[a] == b for a, b in zip(chosen, expected, strict=True)) >= 297
    small = Router.fit(features * 1e-9, ids, hidden=16, steps=100)  # all of them, and so none is
    chosen = small(held_out * 1e-9).argmax(1).tolist()
    assert sum(small.tasks[a] == b for a, b in zip(chosen, expected, strict=True)) >= 297
    assert router.tensors.keys() == small.tensors.keys()
    assert Router.fit(torch.ones(3, 2), ["a", "b", "a"], steps=1)(torch.zeros(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("first", [("cats", "birds", "dogs"), ("dogs", "cats", "birds")])
def test_tasks_keep_the_order_in_which_they_first_appear(first: tuple[str, ...]) -> None:
    features, ids = blobs(30, seed=5)
    one_of_each = torch.stack([features[ids.index(task)] for task in first])
    assert Router.fit(torch.cat([one_of_each, features]), [*first, *ids], hidden=4, steps=1).tasks == first


def test_top1_is_one_hot_and_softmax_has_the_temperature(router: Router) -> None:
    features, _ = blobs(40, seed=2)
    hard = router(features)
    assert torch.equal(hard.sum(1), torch.ones(40))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    soft = replace(router, mode="softmax", temperature=3.0)(features)
    torch.testing.assert_close(soft, torch.softmax(router.logits(features).double() / 3, 1).float())


def test_a_router_abstains_between_the_tasks(router: Router) -> None:
    careful = replace(router, abstain=0.9, temperature=2.0)
    features, _ = blobs(100, seed=3)
    far_between = torch.cat([features, features.mean(0, keepdim=True)])
    probabilities = torch.softmax(router.logits(far_between) / 2, 1).amax(1)
    weights = careful(far_between)
    assert torch.equal(weights.sum(1) == 0, probabilities < 0.9)
    assert weights[-1].tolist() == [0.0, 0.0, 0.0]
    assert (weights.sum(1) == 1).any()


def test_fitting_depends_on_its_arguments_only() -> None:
    features, ids = blobs(60, seed=4)
    torch.manual_seed(0)
    first = Router.fit(features, ids, hidden=8, steps=20)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    second = Router.fit(features, ids, hidden=8, steps=20)
    other = Router.fit(features, ids, hidden=8, steps=20, seed=9)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in second.tensors.items())
    assert not torch.equal(first.tensors["hidden.weight"], other.tensors["hidden.weight"])


def test_fitting_works_without_gradients_around_it() -> None:
    with torch.no_grad():
        assert not Router.fit(*blobs(30, seed=5), hidden=4, steps=5).tensors["output.bias"].requires_grad


def test_fitting_works_in_inference_mode() -> None:
    features, ids = blobs(30, seed=5)
    expected = Router.fit(features, ids, hidden=4, steps=5)
    with torch.inference_mode():
        fitted = Router.fit(features.clone(), ids, hidden=4, steps=5)
    assert all(torch.equal(fitted.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert not any(tensor.is_inference() for tensor in fitted.tensors.values())


def test_autocast_changes_nothing() -> None:
    features, ids = blobs(30, seed=5)
    router = Router.fit(features, ids, hidden=4, steps=5)
    expected = router.logits(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.logits(features), expected)
        fitted = Router.fit(features, ids, hidden=4, steps=5)
    assert all(torch.equal(fitted.tensors[name], tensor) for name, tensor in router.tensors.items())


def test_a_large_seed_is_a_seed() -> None:
    features, ids = blobs(30, seed=5)
    assert Router.fit(features, ids, hidden=4, steps=2, seed=1 << 70).tasks


def test_a_constant_feature_is_harmless() -> None:
    features, ids = blobs(60, seed=6)
    features[:, 3] = 7.0
    assert torch.isfinite(Router.fit(features, ids, hidden=8, steps=20).logits(features)).all()


def test_saving_and_loading(router: Router, tmp_path: Path) -> None:
    options = replace(router, mode="softmax", temperature=np.float32(2.0), abstain=0.25)
    options.save(tmp_path / "router.safetensors")
    loaded = Router.load(tmp_path / "router.safetensors")
    features, _ = blobs(20, seed=7)
    assert torch.equal(loaded(features), options(features))
    assert (loaded.tasks, loaded.mode, loaded.temperature, loaded.abstain) == (options.tasks, "softmax", 2.0, 0.25)
    assert [path.name for path in tmp_path.iterdir()] == ["router.safetensors"]


def test_files_that_are_no_routers_are_refused(router: Router, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        Router.load(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_bytes(b"not a router at all")
    with pytest.raises(CheckpointError, match="text"):
        Router.load(tmp_path / "text")
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="format is None"):
        Router.load(tmp_path / "weights")
    save_file({"x": torch.zeros(2)}, tmp_path / "empty", metadata={"format": "freemerge-router-1"})
    with pytest.raises(CheckpointError, match="options"):
        Router.load(tmp_path / "empty")
    broken = {**router.tensors, "hidden.bias": torch.full_like(router.tensors["hidden.bias"], float("nan"))}
    halved = {name: tensor.bfloat16() for name, tensor in router.tensors.items()}
    flat = {**router.tensors, "hidden.weight": torch.zeros(3)}
    for tasks, tensors, message in (
        (router.tasks[:2], router.tensors, r"output\.weight must have shape \(2, 16\)"),
        (router.tasks, broken, r"hidden\.bias must hold finite floats"),
        (router.tasks, halved, r"center must hold finite floats in float32, got torch\.bfloat16"),
        (router.tasks, flat, r"hidden\.weight must be a matrix, got \(3,\)"),
        (router.tasks, {"center": torch.zeros(3)}, "tensors must be"),
    ):
        options = json.dumps({"tasks": tasks})
        save_file(tensors, tmp_path / "bad", metadata={"format": "freemerge-router-1", "options": options})
        with pytest.raises(CheckpointError, match=message):
            Router.load(tmp_path / "bad")
        with pytest.raises(ArgumentError, match=message):
            Router(tasks, tensors)
    nested = {"format": "freemerge-router-1", "options": "[" * 100_000 + "]" * 100_000}
    save_file(router.tensors, tmp_path / "nested", metadata=nested)
    with pytest.raises(CheckpointError, match="nested"):
        Router.load(tmp_path / "nested")


def test_saving_replaces_a_router_and_nothing_else(router: Router, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(RefusedError, match=r"model\.safetensors.*is not replaced"):
        router.save(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    (tmp_path / "router.safetensors.part").write_text("mine")
    for abstain in (0.1, 0.2):
        replace(router, abstain=abstain).save(tmp_path / "router.safetensors")
        assert Router.load(tmp_path / "router.safetensors").abstain == abstain
    assert (tmp_path / "router.safetensors.part").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors",
        "router.safetensors",
        "router.safetensors.part",
    }


def test_what_cannot_be_written_is_named_and_leaves_nothing(router: Router, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "absent" / "router.safetensors", tmp_path / ("r" * 300)):
        with pytest.raises(CheckpointError, match=f"cannot write {path}"):
            router.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_features_that_float32_cannot_standardise_are_refused() -> None:
    features = torch.tensor([[1e300, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for wrong in (features, torch.full((2, 2), 3e38), torch.zeros(2, 0)):
        with pytest.raises(ArgumentError, match="features must"):
            Router.fit(wrong, ["a", "b"], steps=1)
    with pytest.raises(ArgumentError, match="learning_rate"):
        Router.fit(features.clamp(max=1.0), ["a", "b"], steps=50, hidden=2, learning_rate=1e30)


def test_logits_are_plain_torch(router: Router) -> None:
    features, _ = blobs(10, seed=8)
    want = router.logits(features)
    one_by_one = torch.func.vmap(lambda row: router.logits(row[None])[0])(features)
    assert torch.allclose(one_by_one, want, rtol=1e-5, atol=1e-5)
    of_inputs = torch.func.jacrev(lambda row: router.logits(row[None])[0])(features[0])
    assert of_inputs.shape == (want.shape[1], features.shape[1])


def test_bad_arguments_are_named(router: Router) -> None:
    features, ids = blobs(10, seed=8)
    with pytest.raises(ArgumentError, match="tasks must name"):
        Router.fit(features, ids[:9])
    with pytest.raises(ArgumentError, match="tasks must be a list of names"):
        Router.fit(features, torch.arange(30))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="hidden must be a whole number"):
        Router.fit(features, ids, hidden=0)
    with pytest.raises(ArgumentError, match="finite"):
        Router.fit(torch.full((10, 6), float("nan")), ids)
    with pytest.raises(ArgumentError, match=r"\(N, D\)"):
        Router.fit(torch.zeros(10), ids)
    with pytest.raises(ArgumentError, match=r"\(N, 6\)"):
        router(torch.zeros(4, 5))
    with pytest.raises(ArgumentError, match="features must be a tensor, got list"):
        router.logits([1.0])  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="finite"):
        router(torch.full((1, 6), float("inf")))
    for odd, its in ((router, features.double() * 1e300), (replace(router, temperature=1e-300), features)):
        with pytest.raises(ArgumentError, match=r"features or temperature: .* no finite probabilities"):
            odd(its)
    wrong: list[tuple[str, object]] = [("temperature", 0.0), ("temperature", "1"), ("temperature", None)]
    wrong += [("abstain", 1.5), ("abstain", "x"), ("mode", "x"), ("mode", []), ("tasks", None), ("tasks", "abc")]
    wrong += [("tensors", None), ("tensors", {}), ("tensors", dict.fromkeys(router.tensors, 1.0))]
    for name, value in wrong:
        with pytest.raises(ArgumentError, match=name):
            replace(router, **{name: value})


def test_pooled_state_stops_at_the_submodule_and_leaves_out_padding(sequences: Sequences) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    features = PooledState(sequences, "embed")(ids, attention_mask=mask)
    table = sequences.embed.weight.detach()
    torch.testing.assert_close(features, torch.stack([table[[1, 2, 3]].mean(0), table[[4, 5]].mean(0)]))
    torch.testing.assert_close(PooledState(sequences, "embed", "first")(ids), table[[1, 4]])
    assert sequences.passes == 0
    assert not sequences.embed._forward_hooks
    sequences(ids)
    assert sequences.passes == 1


def test_pooled_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 4, generator=generator)
    torch.testing.assert_close(pooled(images, None, "mean"), images.flatten(2).mean(2))
    rows = torch.randn(2, 3, generator=generator)
    assert torch.equal(pooled(rows, None, "mean"), rows)
    assert pooled(rows.bfloat16(), None, "mean").dtype == torch.float32
    with pytest.raises(ArgumentError, match="dimensions"):
        pooled(torch.zeros(3), None, "mean")
    with pytest.raises(ArgumentError, match=r"attention_mask has shape \(2, 4\), the hidden state \(2, 5, 3\)"):
        pooled(torch.zeros(2, 5, 3), torch.ones(2, 4), "mean")


def test_pooled_state_of_a_module_with_a_tuple_output() -> None:
    model = nn.Sequential(nn.GRU(4, 5, batch_first=True))
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(PooledState(model, "0")(states), model[0](states)[0].detach().mean(1))


@pytest.mark.parametrize("output", [(), None, {}, "states", 3, [None, "x"]])
def test_a_submodule_without_tensors_is_named(output: object) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return output

    with pytest.raises(ArgumentError, match=f"'0' gives no tensor, but {type(output).__name__}"):
        PooledState(nn.Sequential(Odd()), "0")(torch.zeros(2, 3))


def test_pooled_state_takes_the_first_tensor_wherever_it_is() -> None:
    class Nested(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return None, {"states": [x], "other": 2 * x}

    x = torch.ones(2, 3)
    assert torch.equal(PooledState(nn.Sequential(Nested()), "0")(x), x)


def test_pooled_state_of_a_compiled_model(sequences: Sequences) -> None:
    """Graphs that were made before do not stop at the submodule."""
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    expected = PooledState(sequences, "embed")(ids)
    torch._dynamo.reset()
    compiled = torch.compile(sequences, backend="eager")
    compiled(ids)
    assert torch.equal(PooledState(compiled, "embed")(ids), expected)
    sequences.compile(backend="eager")
    with pytest.raises(ArgumentError, match="'embed' is compiled"):
        PooledState(sequences, "embed")


def test_pooled_state_names_what_is_wrong(sequences: Sequences) -> None:
    with pytest.raises(ArgumentError, match=r"'nothing\.here'"):
        PooledState(sequences, "nothing.here")
    with pytest.raises(ArgumentError, match="pool"):
        PooledState(sequences, "embed", "max")  # type: ignore[arg-type]
    sequences.unused = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="'unused'"):
        PooledState(sequences, "unused")(torch.zeros(1, 2, dtype=torch.long))
    assert not sequences.unused._forward_hooks
