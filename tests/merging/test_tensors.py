"""The merge of single tensors: what the engine gives for them within a model, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import freemerge as fm

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = st.sampled_from([(), (1,), (7,), (5, 3), (24, 40), (33, 16), (2, 16, 20), (4, 3, 3, 3), (0, 4)])
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "average": {"method": "average"},
    "task arithmetic": {"method": "task_arithmetic"},
    "weighted": {"method": "task_arithmetic", "scale": 0.3, "weights": [0.5, -0.25, 1.0]},
    "float64": {"compute_dtype": "float64", "out_dtype": "float64"},
    "low cutoff": {"cutoff": 0.05, "weights": "uniform", "renormalize": None},
    "smooth": {"response": fm.Gaussian(0.2), "weights": "sum", "scale": 0.4},
    "aligned": {"align": True},
    "elected": {"sign_election": True, "weights": "sum"},
    "own weights": {"scope": "tensor"},
    "own filtered weights": {"scope": "tensor", "stats": "filtered"},
    "selected": {"select": [("a.*", "merge"), ("b.*", "filter"), ("c.*", "copy")]},
    "ties": {"method": "ties", "scope": "tensor"},
    "dare": {"method": "dare", "drop": 0.5},
    "pcb": {"method": "pcb", "scope": "tensor"},
    "EMR": {"method": "emr"},
    "Iso-C": {"method": "iso_c", "scale": 1.0},
    "Iso-CTS": {"method": "iso_cts", "scale": 1.0},
    "TSV-M": {"method": "tsv_m", "scale": 1.0},
    "WUDI": {"method": "wudi", "scale": 1.0},
    "filtered before": {"method": "iso_c", "scale": 1.0, "filter": "before", "cutoff": 0.2},
    "filtered after": {"method": "ties", "scope": "tensor", "filter": "after", "response": fm.Gaussian(0.1)},
    "split": {"views": [fm.Split("*.split", 3)]},
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@st.composite
def inputs(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """A base and three models, each with a dtype and a layout of its own."""
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base = torch.randn(shape, generator=generator)
    made = [base, *(base + 0.05 * torch.randn(shape, generator=generator) for _ in range(3))]
    tensors = []
    for tensor in made:
        tensor = tensor.to(draw(st.sampled_from(DTYPES)))
        layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "borrowed"]))
        if layout == "transposed" and tensor.ndim > 1:
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == "strided" and tensor.ndim:
            tensor = torch.stack([tensor, tensor], -1)[..., 0]
        elif layout == "borrowed":
            tensor = torch.from_numpy(tensor.float().numpy())  # its memory is NumPy's
        tensors.append(tensor)
    return tensors


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
@given(tensors=inputs(), name=st.sampled_from(["a.weight", "b.weight", "c.weight", "conv.weight"]))
def test_a_tensor_is_merged_as_within_a_model(options: dict[str, Any], tensors: list[Tensor], name: str) -> None:
    copies = [tensor.clone() for tensor in tensors]
    recipe = fm.Recipe(**options)
    # The rules and the view must find something in the model that the tensor is merged within.
    others = {f"{letter}.other": torch.full((2, 2), 1.0) for letter in "abc"} | {"x.split": torch.eye(6)}
    base, *models = [others | {name: tensor} for tensor in tensors]
    weights = None
    if recipe.method.passes:  # over the model: what a report would tell
        weights = [0.2, 0.3, 0.5]
        within = recipe.replace(weights=weights, scale=0.4 * 3)
    else:
        within = recipe
    expected = fm.merge(base, models, within)[name]
    merged = fm.merge_tensors(tensors[0], tensors[1:], recipe=recipe, weights=weights, name=name)
    assert merged.dtype == expected.dtype
    assert merged.shape == tensors[0].shape
    assert merged.is_contiguous()
    assert torch.equal(bits(merged), bits(expected))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.numel() == 0 or tensor.data_ptr() != merged.data_ptr()


@given(tensors=inputs())
def test_statistics_are_those_of_the_tensor(tensors: list[Tensor]) -> None:
    merged = fm.merge_tensors(tensors[0], tensors[1:])
    expected = fm.merge({"w": tensors[0]}, [{"w": tensor} for tensor in tensors[1:]])["w"]
    assert torch.equal(bits(merged), bits(expected))


@pytest.mark.parametrize("options", RECIPES.values(), ids=RECIPES)
def test_the_weights_of_a_report_give_the_tensors_of_the_model(options: dict[str, Any], tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (24, 20), "b.weight": (40, 16), "c.weight": (8,), "x.split": (9, 12)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = [
        {name: t + 0.02 * i * torch.randn(t.shape, generator=generator) for name, t in base.items()} for i in (1, 2, 3)
    ]
    recipe = fm.Recipe(**options)
    report = fm.merge_checkpoints(base, models, tmp_path / "out", recipe, progress=False)
    expected = fm.merge(base, models, recipe)
    for name, tensor in base.items():
        merged = fm.merge_tensors(
            tensor, [model[name] for model in models], recipe=recipe, weights=report.weights, name=name
        )
        assert torch.equal(bits(merged), bits(expected[name])), name


def test_a_method_by_name_or_with_its_parameters() -> None:
    base, models = torch.zeros(3), [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])]
    assert fm.merge_tensors(base, models, method="average").tolist() == [2.0, 2.0, 2.0]
    method = fm.methods.TaskArithmetic(weights=[2.0, 0.5])
    assert fm.merge_tensors(base, models, method=method).tolist() == [3.5, 5.0, 6.5]
    assert fm.merge_tensors(base, models, method="average", weights=[1.0, 0.0]).tolist() == [1.0, 2.0, 3.0]


def test_without_a_name_no_rule_applies() -> None:
    base, model = torch.zeros(4, 4), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    recipe = fm.Recipe(select=[("*", "copy")], scale=1.0)
    assert torch.equal(fm.merge_tensors(base, [model], recipe=recipe, name="any"), base)
    assert not torch.equal(fm.merge_tensors(base, [model], recipe=recipe), base)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_what_can_only_be_copied_is_copied(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As a host that goes through all tensors of a model meets it."""
    base = torch.ones(shape).to(dtype)
    out = torch.zeros(shape).to(dtype)
    merged = fm.merge_tensors(base, [base.clone()] * 2, name="ids", out=out)
    assert merged is out
    assert torch.equal(bits(merged), bits(base))
    assert bits(fm.merge({"w": torch.ones(2), "ids": base}, [{"w": torch.ones(2), "ids": base}])["ids"]).equal(
        bits(base)
    )
    if base.numel():
        others = [base, torch.zeros(shape).to(dtype)]
        with pytest.raises(fm.CheckpointError, match=r"tensors\[1\]: tensor ids .*differs from the base"):
            fm.merge_tensors(base, others, name="ids")
        copied = fm.merge_tensors(base, others, name="ids", recipe=fm.Recipe(select=[("ids", "copy")]))
        assert torch.equal(bits(copied), bits(base))
        assert copied.data_ptr() != base.data_ptr()
        with pytest.raises(fm.ArgumentError, match=r"deltas\[0\] must be float32"):
            fm.merge_deltas([base])


def test_what_a_recipe_drops_is_not_merged() -> None:
    recipe = fm.Recipe(select=[("w", "drop")])
    with pytest.raises(fm.ArgumentError, match="select: w is left out of the merged model"):
        fm.merge_tensors(torch.zeros(2), [torch.ones(2)], recipe=recipe, name="w")


def test_parameters_of_a_module_are_plain_tensors() -> None:
    layer = torch.nn.Linear(6, 4)
    merged = fm.merge_tensors(layer.weight, [layer.weight + 1])
    assert not merged.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": [0.0]}, "base must be a tensor"),
        ({"tensors": torch.zeros(2, 2)}, "tensors must be a list"),
        ({"tensors": []}, "at least one"),
        ({"tensors": [torch.zeros(2, 2), None]}, r"tensors\[1\] must be a tensor"),
        ({"tensors": [torch.zeros(2, 3)]}, r"tensors\[0\] has shape \(2, 3\) but base has \(2, 2\)"),
        ({"weights": [1.0]}, "weights has 1 number for 2"),
        ({"weights": ["a", "b"]}, "weights must be"),
        ({"method": "avrage"}, "did you mean 'average'"),
        ({"method": "average", "recipe": fm.Recipe()}, "exclude each other"),
        ({"recipe": {}}, "recipe must be a Recipe"),
        ({"recipe": fm.Recipe(views=[fm.Stack(("*.q", "*.k"))]), "name": "a.k"}, "a.k is stacked with other tensors"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    options = {"base": torch.zeros(2, 2), "tensors": [torch.ones(2, 2), torch.ones(2, 2)]} | arguments
    with pytest.raises(fm.ArgumentError, match=message):
        fm.merge_tensors(options.pop("base"), options.pop("tensors"), **options)


def test_values_that_are_not_finite_are_found() -> None:
    with pytest.raises(fm.CheckpointError, match=r"'a\.weight' holds NaN"):
        fm.merge_tensors(torch.zeros(2), [torch.tensor([float("nan"), 0.0])], name="a.weight")


@given(tensors=inputs(), layout=st.sampled_from(["contiguous", "transposed", "apart", "base", "model"]))
def test_out_receives_the_result(tensors: list[Tensor], layout: str) -> None:
    expected = fm.merge_tensors(tensors[0], tensors[1:])
    base, *models = [tensor.clone() for tensor in tensors]
    if layout == "base":
        out = base
    elif layout == "model":
        out = models[1] if models[1].dtype == base.dtype else base
    elif layout == "transposed":
        out = torch.full_like(base.transpose(0, -1) if base.ndim else base, 7.0).contiguous()
        out = out.transpose(0, -1) if base.ndim else out
    else:
        out = torch.full((*base.shape, 2), 7.0, dtype=base.dtype)[..., 1]
    assert fm.merge_tensors(base, models, out=out) is out
    assert torch.equal(bits(out), bits(expected))


def test_out_is_not_written_after_an_error_and_must_fit() -> None:
    base, out = torch.zeros(2, 3), torch.full((2, 3), 7.0)
    with pytest.raises(fm.CheckpointError):
        fm.merge_tensors(base, [torch.full((2, 3), float("inf"))], out=out)
    assert torch.equal(out, torch.full((2, 3), 7.0))
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, device="meta")):
        with pytest.raises(fm.ArgumentError, match="out must be"):
            fm.merge_tensors(base, [base], out=wrong)
    with pytest.raises(fm.ArgumentError, match=r"out is part of an autograd graph.* pass out\.detach\(\)"):
        fm.merge_tensors(base, [base], out=torch.zeros(2, 3, requires_grad=True) * 1)
    leaf = torch.zeros(2, 3, requires_grad=True)
    assert fm.merge_tensors(base, [base + 1], out=leaf) is leaf
    with pytest.raises(fm.ArgumentError, match="out may overlap itself"):
        fm.merge_tensors(base, [base], out=torch.zeros(1).expand(2, 3))
    with torch.inference_mode():
        inferred = torch.zeros(2, 3)
    assert torch.equal(fm.merge_tensors(base, [base + 1], out=inferred), fm.merge_tensors(base, [base + 1]))
    half = torch.zeros(2, 3, dtype=torch.bfloat16)
    recipe = fm.Recipe(out_dtype=torch.bfloat16)
    assert fm.merge_tensors(base, [base + 1], recipe=recipe, out=half) is half


def test_torch_dtypes_in_recipes() -> None:
    recipe = fm.Recipe(out_dtype=torch.bfloat16, compute_dtype=torch.float64)
    assert recipe == fm.Recipe(out_dtype="bfloat16", compute_dtype="float64")
    assert fm.Recipe.from_config(recipe.to_config()) == recipe
    with pytest.raises(fm.ArgumentError, match="out_dtype must be"):
        fm.Recipe(out_dtype=torch.int8)


OWN = {name: options for name, options in RECIPES.items() if not fm.Recipe(**options).method.passes}


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_deltas_are_merged_as_the_models_are(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = [0.05 * torch.randn(24, 20, generator=generator) for _ in range(3)]
    recipe = fm.Recipe(**{**options, "select": [], "views": []})
    merged = fm.merge_deltas(deltas, recipe=recipe, name="a.weight")
    expected = fm.merge_tensors(torch.zeros(24, 20), deltas, recipe=recipe, name="a.weight")
    assert torch.equal(merged, expected)
    assert torch.count_nonzero(merged)


def test_deltas_by_hand() -> None:
    deltas = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([3.0, 2.0, 0.5])]
    assert fm.merge_deltas(deltas, method="average").tolist() == [2.0, 0.0, 0.25]
    assert fm.merge_deltas(deltas, method=fm.methods.TaskArithmetic(weights=[2.0, -1.0])).tolist() == [-1.0, -6.0, -0.5]
    out = torch.zeros(3)
    assert fm.merge_deltas(deltas, method="average", out=out) is out
    for wrong in ([], None, deltas[0], [None]):
        with pytest.raises(fm.ArgumentError, match="deltas"):
            fm.merge_deltas(wrong)  # type: ignore[arg-type]
    with pytest.raises(fm.ArgumentError, match=r"^deltas\[1\] must be float32, .* got torch\.int32$"):
        fm.merge_deltas([deltas[0], deltas[0].int()])


@pytest.mark.parametrize("options", [{}, {"stats": "filtered"}, {"cutoff": 0.1, "renormalize": None}, {"align": True}])
def test_task_weights_make_a_host_of_single_tensors_equal(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layer.{i}.weight": torch.randn(20 + i, 24, generator=generator) for i in range(5)}
    base["bias"] = torch.randn(9, generator=generator)
    models = [
        {name: t + 0.02 * i * torch.randn(t.shape, generator=generator) for name, t in base.items()} for i in (1, 2, 3)
    ]
    recipe = fm.Recipe(**options)
    weights = fm.task_weights(base, models, recipe)
    assert weights is not None
    assert sum(weights) == pytest.approx(1)
    assert weights[0] < weights[1] < weights[2]
    expected = fm.merge(base, models, recipe)
    for name, tensor in base.items():
        merged = fm.merge_tensors(tensor, [m[name] for m in models], recipe=recipe, weights=weights, name=name)
        assert torch.equal(bits(merged), bits(expected[name])), name


def test_task_weights_say_where_there_are_none_or_more_is_needed() -> None:
    base, models = {"w": torch.zeros(4, 4)}, [{"w": torch.ones(4, 4)}, {"w": torch.eye(4)}]
    assert fm.task_weights(base, models, fm.Recipe(scope="tensor")) is None
    assert fm.task_weights(base, models, fm.Recipe(method="average")) == (0.5, 0.5)
    assert fm.task_weights(base, models, fm.Recipe(method="ties", scope="tensor")) == (0.5, 0.5)
    assert fm.task_weights(base, models, fm.Recipe(method="pcb", scope="tensor")) is None
    with pytest.raises(fm.ArgumentError, match="of the whole model than weights; give it scope 'tensor'"):
        fm.task_weights(base, models, fm.Recipe(method="ties"))


def test_task_weights_of_a_method_with_a_filter_around_it() -> None:
    base, models = {"w": torch.zeros(4, 4)}, [{"w": torch.ones(4, 4)}, {"w": torch.eye(4)}]
    assert fm.task_weights(base, models, fm.Recipe(method="average", filter="after")) == (0.5, 0.5)
    for recipe, message in (
        (fm.Recipe(method="ties", filter="before"), "ties needs more of the whole model than weights"),
        (fm.Recipe(method="iso_c", filter="after"), "scale: method iso_c finds it over the whole model"),
    ):
        with pytest.raises(fm.ArgumentError, match=message):
            fm.task_weights(base, models, recipe)


@pytest.mark.parametrize("method", ["task_arithmetic", fm.methods.METHODS["average"]()])
def test_a_method_is_named_in_one_way_by_all_functions(method: Any, tmp_path: Path) -> None:
    base = {"w": torch.randn(6, 5)}
    models = [{"w": base["w"] + torch.randn(6, 5)} for _ in range(2)]
    recipe = fm.Recipe(method=method)
    expected = fm.merge(base, models, recipe)["w"]
    assert torch.equal(fm.merge(base, models, method=method)["w"], expected)
    assert torch.equal(fm.merge_tensors(base["w"], [m["w"] for m in models], method=method), expected)
    assert fm.task_weights(base, models, method=method) == fm.task_weights(base, models, recipe)
    assert fm.inspect(base, models, method=method) == fm.inspect(base, models, recipe)
    fm.merge_checkpoints(base, models, tmp_path / "m.safetensors", method=method, progress=False)
    assert torch.equal(load_file(tmp_path / "m.safetensors")["w"], expected)
    for function in (fm.merge, fm.inspect, fm.task_weights):
        with pytest.raises(fm.ArgumentError, match="method and recipe exclude each other"):
            function(base, models, recipe, method=method)


def test_differences_of_variances_may_be_negative() -> None:
    name, delta = "norm.running_var", torch.tensor([-0.5, 0.25])
    merged = fm.merge_deltas([delta, 3 * delta], name=name, weights=[0.25, 0.25], method="average")
    torch.testing.assert_close(merged, delta, rtol=0, atol=1e-7)
    with pytest.raises(fm.CheckpointError, match=r"tensors\[0\] .*is a variance and holds a negative number"):
        fm.merge_tensors(torch.ones(2), [4 * delta], name=name, weights=[1.0])


def test_messages_name_what_was_given() -> None:
    base, wrong, broken = torch.zeros(2, 3), torch.zeros(3, 2), torch.full((2, 3), torch.nan)
    with pytest.raises(fm.ArgumentError, match=r"^tensors\[1\] has shape \(3, 2\) but base has \(2, 3\)"):
        fm.merge_tensors(base, [base, wrong])
    with pytest.raises(fm.ArgumentError, match=r"^deltas\[1\] has shape \(3, 2\) but deltas\[0\] has \(2, 3\)"):
        fm.merge_deltas([base, wrong])
    with pytest.raises(fm.CheckpointError, match=r"^tensors\[1\] .*holds NaN"):
        fm.merge_tensors(base, [base, broken])
    with pytest.raises(fm.CheckpointError, match=r"^deltas\[1\] .*holds NaN"):
        fm.merge_deltas([base, broken])
