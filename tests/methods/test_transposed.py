"""Layers that hold their weights as [inputs, outputs], as GPT-2's, merge as linear layers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import formulas
import freemerge as fm
from freemerge.checkpoint.architecture import built_from_config
from freemerge.merging.run import inspect

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore")

State = dict[str, Tensor]
PREFIX = "transformer."


def turned(name: str) -> bool:
    return name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight"))


def linear(state: State) -> State:
    """The same model, made of linear layers."""
    return {name: tensor.T.contiguous() if turned(name) else tensor for name, tensor in state.items()}


def updated(base: State, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in base.items()}


@pytest.fixture(scope="module")
def module() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    )


@pytest.fixture(params=["transformer.", ""], ids=["saved by transformers", "as on the Hub"])
def folder(module: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """GPT-2 with its config.json; the file of OpenAI's own lacks the prefix of the model with a head."""
    module.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = {request.param + name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    return tmp_path / "base"


@pytest.mark.parametrize("method", ["wudi", "iso_c", "iso_cts", "tsv_m", "jsv"])
def test_spectral_methods_see_linear_layers(method: str, folder: Path) -> None:
    base = load_file(folder / "model.safetensors")
    models = [updated(base, seed) for seed in (1, 2, 3)]
    recipe = fm.Recipe(method=method, scale=1.0, compute_dtype="float64", out_dtype="float64")
    merged = fm.merge(folder, models, recipe)
    vectors = {
        name: [linear(model)[name].double() - tensor.double() for model in models]
        for name, tensor in linear(base).items()
    }
    for name, expected in formulas.merged(method, vectors).items():
        if method == "wudi" and ("wte" in name or "wpe" in name):
            continue  # they are averaged
        found = linear(merged)[name] - linear(base)[name].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))
    stored = fm.merge(base, models, recipe)
    attention = next(filter(turned, base))
    if method == "wudi":
        assert float((stored[attention] - merged[attention]).norm()) > 0.1, "of a state dict nobody knows"


def test_a_module_a_filter_and_a_model_in_memory(module: Any) -> None:
    base = {name: tensor.clone() for name, tensor in module.state_dict().items() if name != "lm_head.weight"}
    models = [updated(base, seed) for seed in (1, 2)]
    for options in ({}, {"filter": "before"}, {"filter": "after"}):
        recipe = fm.Recipe(method="wudi", compute_dtype="float64", **options)  # type: ignore[arg-type]
        expected = fm.merge(linear(base), list(map(linear, models)), recipe)
        merged = fm.merge(module, models, recipe)
        for name, tensor in expected.items():
            torch.testing.assert_close(linear(merged)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "fr", "wudi"])
def test_interference_is_between_inputs(method: str, folder: Path, tmp_path: Path) -> None:
    base = load_file(folder / "model.safetensors")
    models = [updated(base, seed) for seed in (1, 2, 3)]
    recipe = fm.Recipe(method=method, scale="interference")
    plain = tmp_path / "linear.safetensors"
    save_file(linear(base), plain)
    scales = [
        fm.merge_checkpoints(source, tuned, tmp_path / f"out{i}", recipe, progress=False).scale
        for i, (source, tuned) in enumerate([(folder, models), (plain, list(map(linear, models)))])
    ]
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)


def test_an_analysis_sees_linear_layers(folder: Path) -> None:
    base = load_file(folder / "model.safetensors")
    models = [updated(base, seed) for seed in (1, 2)]
    methods = ["fr", "wudi", "iso_c"]
    found = fm.analyze(folder, models, methods=methods)
    expected = fm.analyze(linear(base), list(map(linear, models)), methods=methods)
    assert found.scales == pytest.approx(expected.scales, rel=1e-5)


def test_it_is_1_where_tasks_share_no_inputs(folder: Path, tmp_path: Path) -> None:
    base = load_file(folder / "model.safetensors")
    models = [{name: tensor.clone() for name, tensor in base.items()} for _ in range(2)]
    for name in filter(turned, base):
        generator = torch.Generator().manual_seed(0)
        half = len(base[name]) // 2  # rows are inputs
        models[0][name][:half] += torch.randn(half, base[name].shape[1], generator=generator)
        models[1][name][half:] += torch.randn(half, base[name].shape[1], generator=generator)
    recipe = fm.Recipe(method="task_arithmetic", scale="interference")
    assert fm.merge_checkpoints(folder, models, tmp_path / "out", recipe, progress=False).scale == 1


def test_views_are_of_what_is_stored(module: Any) -> None:
    """Rows are split and stacked as they lie; each matrix that comes of it is then turned."""
    base = {name: tensor.clone() for name, tensor in module.state_dict().items() if name != "lm_head.weight"}
    models = [updated(base, seed) for seed in (1, 2)]
    mlp, attention = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight"
    out = "transformer.h.0.*.c_proj.weight"  # of one width
    stack = [out.replace("*", "attn").replace(".0.", ".*."), out.replace("*", "mlp").replace(".0.", ".*.")]
    options: dict[str, Any] = {"method": "wudi", "scale": 1.0, "compute_dtype": "float64", "out_dtype": "float64"}
    views = [{"split": mlp, "parts": [6, 10]}, {"stack": stack}]
    merged = fm.merge(module, models, fm.Recipe(views=views, **options))

    def expected(parts: list[slice], names: list[str]) -> Tensor:
        rows = [torch.cat([state[name] for name in names]) for state in (base, *models)]
        pieces = [[tensor[part].T.contiguous() for tensor in rows] for part in parts]
        return torch.cat([fm.merge_tensors(b, tuned, recipe=fm.Recipe(**options)).T for b, *tuned in pieces])

    torch.testing.assert_close(merged[mlp], expected([slice(6), slice(6, 16)], [mlp]))
    names = [out.replace("*", part) for part in ("attn", "mlp")]
    torch.testing.assert_close(torch.cat([merged[name] for name in names]), expected([slice(None)], names))
    torch.testing.assert_close(merged[attention], expected([slice(None)], [attention]))


def test_a_stack_of_both_kinds_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 6), transformers.pytorch_utils.Conv1D(4, 6)

    with pytest.raises(fm.ArgumentError, match=r"views: q.weight is stacked with weights whose inputs and outputs"):
        inspect(
            Both(), [Both()], fm.Recipe(method="wudi", views=[{"stack": ["q.*", "k.*"]}], select=[("*bias", "copy")])
        )


def test_memory_is_of_what_the_method_sees() -> None:
    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

    needs = [
        inspect(Model(make()), [Model(make())], fm.Recipe(method="wudi", scale=1.0)).memory_bytes
        for make in (
            lambda: nn.Linear(2000, 200, bias=False),
            lambda: transformers.pytorch_utils.Conv1D(200, 2000),
            lambda: nn.Linear(200, 2000, bias=False),
        )
    ]
    assert needs[0] == needs[1] > needs[2]


EXPERTS: dict[str, dict[str, Any]] = {
    "GptOssForCausalLM": {"head_dim": 8},
    "Qwen3MoeForCausalLM": {"head_dim": 8, "moe_intermediate_size": 12},
    "AriaTextForCausalLM": {"moe_num_experts": 4},
    "Llama4ForCausalLM": {"head_dim": 8, "intermediate_size_mlp": 12},
    "Qwen3VLMoeForConditionalGeneration": {"head_dim": 8, "moe_intermediate_size": 12},
}


@pytest.mark.parametrize("architecture", EXPERTS)
def test_experts(architecture: str) -> None:
    """By the shapes, none of which is square: 16 features, 12 or 24 within an expert."""
    config_class = getattr(transformers, architecture).config_class
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 20, "num_local_experts": 4, "num_experts": 4}
    sizes |= EXPERTS[architecture]
    if "VL" in architecture:
        vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
        sizes = {"text_config": sizes, "vision_config": vision}
    known = built_from_config({**config_class(**sizes).to_dict(), "architectures": [architecture]}, 100)
    assert known is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in known.module.state_dict().items()}
    shapes = known.layout.files if known.layout is not None else shapes
    experts = {name: shape for name, shape in shapes.items() if ".experts." in name and not name.endswith("bias")}
    assert experts
    for name, shape in experts.items():
        down = "down_proj" in name or "fc2" in name
        assert known.transposed(name, shape) == ((shape[-1] == 16) == down)
        if known.layout is None:
            older = (*shape[:-2], shape[-1], shape[-2])  # as Qwen3-VL's own files, which transformers turns
            assert known.transposed(name, older) != known.transposed(name, shape)
    assert not any(known.transposed(name, shape) for name, shape in shapes.items() if ".experts." not in name)
