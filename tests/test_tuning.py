"""Weights learnt by minimising entropy, against the same descent by automatic differentiation through the merge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.cli import main
from freemerge.tuning import By, tune

K, CLASSES = 3, 4
SHAPES = {"layers.0.w": (6, 5), "layers.1.w": (CLASSES, 6), "layers.1.b": (CLASSES,), "shift": (5,), "temperature": ()}
ARITHMETIC = fm.Recipe(method="task_arithmetic")
State = dict[str, Tensor]


def weights(size: float, seed: int, dtype: torch.dtype = torch.float64) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def base() -> State:
    return weights(1.0, 0) | {"steps": torch.tensor(7)}


@pytest.fixture
def models(base: State) -> list[State]:
    return [{n: base[n] + v for n, v in weights(0.5, i + 1).items()} | {"steps": base["steps"]} for i in range(K)]


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


def forward(state: State, batch: Tensor) -> Tensor:
    hidden = torch.tanh((batch.to(state["shift"].dtype) + state["shift"]) @ state["layers.0.w"].T)
    return (hidden @ state["layers.1.w"].T + state["layers.1.b"]) * state["temperature"]


def predict(state: State) -> Iterator[Tensor]:
    for batch in inputs():
        yield forward(state, batch)


def entropy(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1).mean()


def descent(
    base: State, parts: dict[str, list[Tensor]], start: float, groups: list[list[str]]
) -> tuple[Tensor, list[float]]:
    """The weights [groups, K] after ten steps of Adam, with gradients through the weighted sums."""
    learnt = torch.full((len(groups), K), start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([learnt], lr=0.05)
    entropies = []
    for _ in range(10):
        state = {
            name: base[name] + sum(learnt[g, i] * parts[name][i] for i in range(K))
            for g, names in enumerate(groups)
            for name in names
        }
        loss = sum(entropy(logits) for logits in predict(state)) / 2
        entropies.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return learnt.detach(), entropies


def test_one_weight_a_task(base: State, models: list[State]) -> None:
    tuned = tune(base, models, ARITHMETIC, predict, iterations=10, rate=0.05)
    parts = {name: [model[name] - base[name] for model in models] for name in SHAPES}
    learnt, entropies = descent(base, parts, 0.4, [list(SHAPES)])
    torch.testing.assert_close(torch.tensor(tuned.recipe.weights, dtype=torch.float64), learnt[0], rtol=0, atol=1e-5)
    assert tuned.entropies == pytest.approx(entropies, abs=1e-6)
    assert tuned.entropies[-1] < tuned.entropies[0]
    assert (tuned.recipe.scale, tuned.recipe.layers) == (1.0, ())
    merged = fm.merge(base, models, tuned.recipe)
    for name in SHAPES:
        expected = base[name] + sum(w * part for w, part in zip(learnt[0], parts[name], strict=True))
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5)
    assert torch.equal(merged["steps"], base["steps"])


@pytest.mark.parametrize(
    "recipe",
    [
        ARITHMETIC,
        fm.Recipe(method="dare", drop=0.3),
        fm.Recipe(method="breadcrumbs", beta=0.5, gamma=0.1),
        fm.Recipe(fm.HighPass(0.2), renormalize=None, align=True, weights="uniform", scale=0.9),
        ARITHMETIC.replace(filter="before", cutoff=0.3),
    ],
)
def test_one_weight_a_task_and_layer(base: State, models: list[State], recipe: fm.Recipe) -> None:
    tuned = tune(base, models, recipe, predict, by="layer", iterations=10, rate=0.05)
    one = [tuple(float(i == j) for j in range(K)) for i in range(K)]
    alone = [fm.merge(base, models, recipe.replace(weights=w, scale=1.0)) for w in one]
    parts = {name: [merged[name] - base[name] for merged in alone] for name in SHAPES}
    start = 0.3 if recipe.method.name == "fr" else 0.4
    groups = [["layers.0.w"], ["layers.1.w", "layers.1.b"], ["shift", "temperature"]]
    learnt, entropies = descent(base, parts, start, groups)
    assert [layer.pattern for layer in tuned.recipe.layers] == ["layers.0.*", "layers.1.*"]
    found = torch.tensor([*(layer.weights for layer in tuned.recipe.layers), tuned.recipe.weights], dtype=torch.float64)
    torch.testing.assert_close(found, learnt, rtol=0, atol=1e-5)
    assert tuned.entropies == pytest.approx(entropies, abs=1e-6)
    merged = fm.merge(base, models, fm.Recipe.from_config(tuned.recipe.to_config()))
    for own, names in zip(learnt, groups, strict=True):
        for name in names:
            expected = base[name] + sum(w * part for w, part in zip(own, parts[name], strict=True))
            torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_function_sees_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    base = weights(1.0, 0, dtype)
    models = [{name: base[name] + v for name, v in weights(0.5, i + 1, dtype).items()} for i in range(K)]
    seen = []

    def function(state: State) -> Iterator[Tensor]:
        seen.append({tensor.dtype for tensor in state.values()})
        yield from predict(state)

    tuned = tune(base, models, ARITHMETIC, function, iterations=5, rate=0.05)
    assert seen == [{dtype}] * 5
    assert tuned.entropies[-1] < tuned.entropies[0]


def test_tied_tensors_are_one(base: State, models: list[State]) -> None:
    for state in (base, *models):
        state["head"] = state["layers.1.w"]

    def function(state: State) -> Iterator[Tensor]:
        assert state["head"] is state["layers.1.w"]
        yield from predict(state)

    tune(base, models, ARITHMETIC, function, iterations=1)


def test_what_cannot_be_tuned_is_refused(base: State, models: list[State]) -> None:
    for method in ("ties", "iso_c", "fr"):
        with pytest.raises(fm.ArgumentError, match=f"method {method} as it is here is not linear"):
            tune(base, models, fm.Recipe(method=method), predict)
    with pytest.raises(fm.ArgumentError, match="not linear"):
        tune(base, models, ARITHMETIC.replace(filter="after"), predict)
    layered = ARITHMETIC.replace(weights=(1, 1, 1), layers=[("shift", (0, 0, 0))])
    with pytest.raises(fm.ArgumentError, match="layers"):
        tune(base, models, layered, predict)
    with pytest.raises(fm.ArgumentError, match="select: every tensor is copied"):
        tune(base, models, ARITHMETIC.replace(select=[("*", "copy")]), predict)
    with pytest.raises(fm.ArgumentError, match="by must be"):
        tune(base, models, ARITHMETIC, predict, by="tensor")  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match="iterations must be"):
        tune(base, models, ARITHMETIC, predict, iterations=0)


@pytest.mark.parametrize(
    ("yielded", "message"),
    [
        (lambda state: [], "at least one batch"),
        (lambda state: [torch.ones(3, 4)], "do not depend on the weights"),
        (lambda state: [state["shift"].sum()], "must yield logits"),
        (lambda state: [state["shift"][:1]], "two classes"),
        (lambda state: ["logits"], "must yield logits"),
        (lambda state: [state["shift"] * float("inf")], "no finite entropy"),
    ],
)
def test_what_is_no_logits_is_refused(base: State, models: list[State], yielded: object, message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        tune(base, models, ARITHMETIC, yielded, iterations=1)  # type: ignore[arg-type]


def module_of(state: State) -> torch.nn.Module:
    """With the names of the state's tensors, and parameters of its own."""
    module = torch.nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        owner = module
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, torch.nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point()))
    return module


@pytest.mark.parametrize("by", ["task", "layer"])
def test_logits_of_a_module_that_copies_the_weights_are_refused(base: State, models: list[State], by: By) -> None:
    module = module_of(base)

    def function(state: State) -> Iterator[Tensor]:
        module.load_state_dict(state)
        yield from predict(dict(module.named_parameters()))

    with pytest.raises(fm.ArgumentError, match="do not depend on the weights, of which load_state_dict makes copies"):
        tune(base, models, ARITHMETIC, function, by=by)


def test_layers_that_the_logits_do_not_depend_on_are_named(base: State, models: list[State]) -> None:
    def partial(state: State) -> Iterator[Tensor]:
        yield from predict({**state, "layers.1.w": base["layers.1.w"], "layers.1.b": base["layers.1.b"]})

    with pytest.raises(fm.ArgumentError, match=r"of layers\.1\.\*; action copy"):
        tune(base, models, ARITHMETIC, partial, by="layer")
    tune(base, models, ARITHMETIC, partial, iterations=1)
    copied = ARITHMETIC.replace(select=[("layers.1.*", "copy")])
    assert [layer.pattern for layer in tune(base, models, copied, partial, by="layer").recipe.layers] == ["layers.0.*"]


def test_layers_that_only_some_iterations_reach(base: State, models: list[State]) -> None:
    turns = iter(range(4))

    def function(state: State) -> Iterator[Tensor]:
        without = f"layers.{next(turns) % 2}"
        yield from predict({name: base[name] if name.startswith(without) else state[name] for name in state})

    assert len(tune(base, models, ARITHMETIC, function, by="layer", iterations=4).recipe.layers) == 2


def test_parameters_of_the_function_get_no_gradients(base: State, models: list[State]) -> None:
    head = torch.ones(CLASSES, dtype=torch.float64, requires_grad=True)

    def function(state: State) -> Iterator[Tensor]:
        for logits in predict(state):
            yield logits * head

    assert tune(base, models, ARITHMETIC, function, iterations=2) == tune(
        base, models, ARITHMETIC, predict, iterations=2
    )
    assert head.grad is None


def test_batches_of_one_forward_pass_are_refused(base: State, models: list[State]) -> None:
    def heads(state: State) -> list[Tensor]:
        hidden = forward(state, inputs()[0]).tanh()
        return [hidden[:, :2], hidden[:, 2:]]

    with pytest.raises(fm.ArgumentError, match="batches share a forward pass"):
        tune(base, models, ARITHMETIC, heads)


def test_a_class_at_minus_infinity_is_ruled_out(base: State, models: list[State]) -> None:
    def ruled_out(state: State) -> Iterator[Tensor]:
        for logits in predict(state):
            yield torch.cat([logits, torch.full_like(logits[:, :2], -torch.inf)], -1)

    assert tune(base, models, ARITHMETIC, ruled_out, iterations=3) == tune(
        base, models, ARITHMETIC, predict, iterations=3
    )
    with pytest.raises(fm.ArgumentError, match="no finite entropy"):
        tune(base, models, ARITHMETIC, lambda s: [s["layers.1.w"] - torch.inf], iterations=1)


def test_a_single_batch_may_be_returned(base: State, models: list[State]) -> None:
    def first(state: State) -> Tensor:
        return forward(state, inputs()[0])

    alone = tune(base, models, ARITHMETIC, first, iterations=3)
    assert alone == tune(base, models, ARITHMETIC, lambda state: [first(state)], iterations=3)


def test_the_command_writes_a_recipe_that_merges(
    base: State,
    models: list[State],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [str(tmp_path / f"{i}.safetensors") for i in range(K + 1)]
    for file, state in zip(files, (base, *models), strict=True):
        save_file(state, file)
    (tmp_path / "data.py").write_text("import test_tuning\n\npredict = test_tuning.predict\n")
    out = tmp_path / "recipe.yaml"
    command = [
        "tune",
        *files,
        "-o",
        str(out),
        "--function",
        f"{tmp_path}/data.py:predict",
        "--method",
        "task_arithmetic",
    ]
    assert main([*command, "--by", "layer", "--iterations", "3", "--rate", "0.05"]) == 0
    assert "weights 0." in capsys.readouterr().out
    tuned = tune(base, models, ARITHMETIC, predict, by="layer", iterations=3, rate=0.05)
    assert fm.Recipe.from_yaml(out) == tuned.recipe
    assert main(["merge", *files, "--recipe", str(out), "-o", str(tmp_path / "merged"), "--quiet"]) == 0
    merged = load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in fm.merge(base, models, tuned.recipe).items():
        assert torch.equal(merged[name], tensor)
    assert main(command) == 3  # the file exists
    assert sorted(path.name for path in tmp_path.glob("*recipe*")) == ["recipe.yaml"]
    monkeypatch.setattr("freemerge.tuning.tune", lambda *args, **options: pytest.fail("it learnt for nothing"))
    for nowhere, code in ((tmp_path / "missing" / "recipe.yaml", 1), (tmp_path, 3)):
        assert main([*command, "--out", str(nowhere), "--force"]) == code
    monkeypatch.undo()
    assert main([*command[:-1], "ties", "--out", str(tmp_path / "other.yaml")]) == 2
    assert not (tmp_path / "other.yaml").exists()


def test_modes_of_the_caller_are_the_functions_alone(base: State, models: list[State]) -> None:
    base, *models = [
        {name: t.float() if t.is_floating_point() else t for name, t in s.items()} for s in (base, *models)
    ]

    def exact(state: State) -> Iterator[Tensor]:
        with torch.autocast("cpu", enabled=False):
            yield from predict(state)

    expected = tune(base, models, ARITHMETIC, exact, iterations=3)
    with torch.inference_mode():
        assert tune(base, models, ARITHMETIC, exact, iterations=3) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert tune(base, models, ARITHMETIC, exact, iterations=3) == expected
