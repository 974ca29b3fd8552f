"""The same model gives the same merge from files and from memory, where transformers 5 keeps its tensors otherwise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint.conversion import layout_of
from freemerge.checkpoint.reader import Checkpoint
from freemerge.checkpoint.views import InFileLayout, InModuleLayout
from in_memory import same
from stacked_models import MODELS, build

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore")

EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])


def copies(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_one_merge_from_files_modules_and_state_dicts(name: str, tmp_path: Path) -> None:
    models = [build(name, seed) for seed in range(3)]
    folders = []
    for i, model in enumerate(models):
        folders.append(tmp_path / f"model{i}")
        model.save_pretrained(folders[i])
    fm.merge_checkpoints(folders[0], folders[1:], tmp_path / "out", progress=False)
    loaded = type(models[0]).from_pretrained(tmp_path / "out")
    merged = fm.merge(models[0], models[1:])
    assert same(merged, copies(loaded))
    mixed = [folders[1], copies(models[2])], [models[1], folders[2]], [folders[1], models[2]]
    for others in mixed:
        assert same(fm.merge(models[0], others), merged)
    in_files = fm.merge(folders[0], folders[1:])
    for others in (models[1:], *mixed, [copies(model) for model in models[1:]]):
        assert same(fm.merge(folders[0], others), in_files)


@pytest.mark.parametrize("name", MODELS)
def test_a_layout_is_what_transformers_writes_and_reads_back(name: str, tmp_path: Path) -> None:
    model = build(name, 0)
    model.save_pretrained(tmp_path)
    stored, held = load_file(tmp_path / "model.safetensors"), copies(model)
    layout = layout_of(model)
    assert (layout is None) == (stored.keys() == held.keys())
    if layout is None:
        return
    in_files = InFileLayout(Checkpoint.open(model), layout)
    assert same({name: in_files.read(name) for name in in_files.specs}, stored)
    assert all(in_files.specs[name].shape == tensor.shape for name, tensor in stored.items())
    assert in_files.made == {name: stored[name].nbytes for name in stored if not layout.is_view(name)}
    computed = Checkpoint.open(model)
    computed.made = dict.fromkeys(computed.specs, 1)  # as float8 is
    assert InFileLayout(computed, layout).made.keys() == in_files.specs.keys()
    assert same(in_files.restored(stored), held)
    in_memory = InModuleLayout(Checkpoint.open(tmp_path), layout)
    assert same({name: in_memory.read(name) for name in in_memory.specs}, held)


@pytest.mark.parametrize("name", ["Qwen3Moe", "GPTNeoX"])
def test_an_adapter_names_the_layers_of_the_module(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = build(name, 0)
    base.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "lm_head"] if name == "Qwen3Moe" else ["dense", "lm_head"]
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=targets))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload()
    assert not torch.equal(expected.lm_head.weight, base.lm_head.weight)
    for source in (base, tmp_path / "base"):
        merged = fm.merge(source, [tmp_path / "adapter"], EXACT)
        merged = (
            merged
            if source is base
            else {
                key: InModuleLayout(Checkpoint.open(merged), layout_of(base)).read(key)  # type: ignore[arg-type]
                for key in base.state_dict()
            }
        )
        for key, tensor in expected.state_dict().items():
            torch.testing.assert_close(merged[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_a_state_dict_alone_is_split_by_a_view() -> None:
    """Nothing says that its stacks are experts of gates and ups; a view filters them as the files' matrices."""
    models = [build("Qwen3Moe", seed) for seed in range(3)]
    recipe = fm.Recipe(renormalize=None, weights="uniform")  # a norm is given back to the whole stack
    expected = fm.merge(models[0], models[1:], recipe)
    states = [copies(model) for model in models]
    views = [fm.Split("*.experts.gate_up_proj", 2), fm.Split("*.experts.down_proj", 1)]
    merged = fm.merge(states[0], states[1:], recipe.replace(views=views))
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    (decision,) = (
        d
        for d in fm.inspect(states[0], states[1:], recipe.replace(views=views)).decisions
        if d.name == "model.layers.0.mlp.experts.gate_up_proj"
    )
    assert decision.seen_as == ((3, 24, 32), (3, 24, 32))
    unsplit = fm.merge(states[0], states[1:], recipe)
    assert not torch.allclose(unsplit["model.layers.0.mlp.experts.gate_up_proj"], tensor_of(expected), atol=1e-6)


def tensor_of(state: dict[str, Tensor]) -> Tensor:
    return state["model.layers.0.mlp.experts.gate_up_proj"]


def test_rules_may_use_the_names_of_the_module() -> None:
    models = [build("Qwen3Moe", seed) for seed in range(2)]
    for pattern in ("*.experts.gate_up_proj", "*.experts.*.up_proj.weight"):
        merged = fm.merge(models[0], models[1:], EXACT.replace(select=[(pattern, "copy"), ("*", "merge")]))
        gate_up, base = tensor_of(merged), tensor_of(copies(models[0]))
        assert torch.equal(gate_up[:, 24:], base[:, 24:])
        assert torch.equal(gate_up[:, :24], base[:, :24]) == (pattern == "*.experts.gate_up_proj")
    with pytest.raises(fm.ArgumentError, match="matches no tensor"):
        fm.merge(models[0], models[1:], EXACT.replace(select=[("*.experts.gate_down_proj", "copy")]))


@pytest.mark.parametrize("older", ["the base", "the model", "both"])
def test_files_of_older_versions_with_other_names(older: str, tmp_path: Path) -> None:
    """BERT's files on the Hub call the parameters of norms gamma and beta."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=40))
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / str(seed))
        models.append(model)
    expected = fm.merge(tmp_path / "0", [tmp_path / "1"])
    changed = {"the base": (0,), "the model": (1,), "both": (0, 1)}[older]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def older_name(name: str) -> str:
        return next((name.replace(new, past) for new, past in old.items() if name.endswith(new)), name)

    for i in changed:
        file = tmp_path / str(i) / "model.safetensors"
        save_file({older_name(name): tensor for name, tensor in load_file(file).items()}, file)
    for source in (tmp_path / "1", models[1]):
        merged = fm.merge(tmp_path / "0", [source])
        names = {name: older_name(name) if 0 in changed else name for name in expected}
        assert same(merged, {names[name]: tensor for name, tensor in expected.items()})
    fm.merge_checkpoints(tmp_path / "0", [tmp_path / "1"], tmp_path / "out", progress=False)
    loaded, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(loaded.state_dict()[next(iter(expected))], expected[next(iter(expected))])


@pytest.mark.parametrize("whole", ["the base", "the model"])
def test_a_bare_encoder_and_a_model_with_a_head(whole: str, tmp_path: Path) -> None:
    """transformers loads either into the other; the head is left out, or the base's."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, vocab_size=40)
    torch.manual_seed(0)
    bare, full = transformers.BertModel(config), transformers.BertForSequenceClassification(config)
    bare.save_pretrained(tmp_path / "bare")
    full.save_pretrained(tmp_path / "full")
    base, model = (full, bare) if whole == "the base" else (bare, full)
    folders = [tmp_path / ("full" if each is full else "bare") for each in (base, model)]
    recipe = EXACT.replace(select=[("classifier.*", "copy"), ("*", "merge")])
    for sources in (folders, [folders[0], model], [base, folders[1]], [base, model]):
        merged = fm.merge(sources[0], sources[1:], recipe)
        assert merged.keys() == base.state_dict().keys()
        for name, tensor in model.state_dict().items():
            key = f"bert.{name}" if base is full else name.removeprefix("bert.")
            if key in merged and "classifier" not in key and "pooler" not in key:
                torch.testing.assert_close(merged[key], tensor, msg=key)
