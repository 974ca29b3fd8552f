"""freemerge's algorithms in FusionBench: pools of modules and of lazy checkpoints, against our engine."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, LazyStateDict, instantiate
from omegaconf import OmegaConf
from torch import nn
from transformers import LlamaForCausalLM

import freemerge as fm
from freemerge import integrations
from freemerge.integrations.fusion_bench import FREEMerging, Merging
from freemerge.methods import METHODS
from hosts.checkpoints import write_models
from hosts.states import tensors_of
from in_memory import same

CONF = Path(integrations.__path__[0]) / "conf"
NAMES = ["math", "code", "law"]


def network(seed: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 10), nn.Linear(10, 14), nn.LayerNorm(14), nn.Linear(14, 6))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * seed * torch.randn(parameter.shape, generator=generator)
    return model


def pool() -> dict[str, nn.Module]:
    return {"_pretrained_": network(0)} | {name: network(i) for i, name in enumerate(NAMES, 1)}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(method: str) -> None:
    models = pool()
    recipe = fm.Recipe(method=method)
    expected = fm.merge(models["_pretrained_"], [models[name] for name in NAMES], recipe)
    merged = Merging(recipe={"method": method}).run(BaseModelPool(models))
    assert merged is models["_pretrained_"], "in place"
    assert same(merged.state_dict(), expected)


def test_a_copy_leaves_the_pretrained_model_alone() -> None:
    models = pool()
    before = deepcopy(models["_pretrained_"].state_dict())
    merged = Merging(recipe={"cutoff": 0.2, "select": [{"pattern": "0.*", "action": "copy"}]}, inplace=False).run(
        models
    )
    assert same(models["_pretrained_"].state_dict(), before)
    recipe = fm.Recipe(cutoff=0.2, select=[("0.*", "copy")])
    assert same(merged.state_dict(), fm.merge(before, [models[name] for name in NAMES], recipe))


@pytest.mark.parametrize("method", ["fr", "free"])
def test_the_configurations_say_what_the_defaults_are(method: str, tmp_path: Path) -> None:
    config = OmegaConf.load(CONF / "method" / "freemerge" / f"{method}.yaml")
    algorithm = instantiate(config, _recursive_=False)
    assert fm.Recipe.from_config(OmegaConf.to_container(algorithm.recipe)) == fm.Recipe()
    algorithm.to_yaml(tmp_path / "method.yaml")
    assert type(BaseAlgorithm.from_yaml(tmp_path / "method.yaml")) is type(algorithm)


def test_experts_are_modulators_that_leave_no_trace() -> None:
    models = pool()
    states = {name: deepcopy(model.state_dict()) for name, model in models.items()}
    tuned = {name: states[name] for name in NAMES}
    modulated = FREEMerging(experts={"density": 0.1, "values": "fp32"}).run(models)
    expected = fm.merge(states["_pretrained_"], [*tuned.values()])
    assert same(modulated.backbone.state_dict(), expected)
    experts = fm.extract_experts(states["_pretrained_"], tuned, density=0.1, values="fp32")
    backbone = deepcopy(modulated.backbone)
    for name in [*NAMES, *reversed(NAMES)]:
        modulated.set_task(name)
        with fm.ExpertBank(backbone, experts).active(name):
            assert same(modulated.backbone.state_dict(), backbone.state_dict())
            assert not same(modulated.backbone.state_dict(), expected)
            tokens = torch.tensor([[1, 2]])
            assert torch.equal(modulated(tokens), backbone(tokens))
    modulated.modulators[modulated.current_task].remove(modulated)
    assert same(modulated.backbone.state_dict(), expected)


@pytest.mark.parametrize("convert", [lambda model: model.to("cpu", torch.float64), lambda model: model.half()])
def test_an_expert_is_taken_away_wherever_the_model_is_by_then(convert: Callable[[nn.Module], nn.Module]) -> None:
    modulated = FREEMerging(experts={"density": 0.1, "values": "fp32"}).run(pool())
    expected = convert(deepcopy(modulated.backbone)).state_dict()
    modulated.set_task("math")
    convert(modulated)
    modulated.set_task("code")
    assert not same(modulated.backbone.state_dict(), expected)
    modulated.modulators["code"].remove(modulated)
    assert same(modulated.backbone.state_dict(), expected)


def test_a_program_may_end_while_an_expert_is_on() -> None:
    script = """
        from hosts.test_fusion_bench import FREEMerging, pool
        model = FREEMerging(experts={"density": 0.1}).run(pool())
        model.set_task("math")
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # this file's folder, too
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_heads_that_the_recipe_leaves_alone_have_no_experts() -> None:
    def models(same_shape: bool) -> dict[str, nn.Module]:
        sides = [3 if same_shape else 3 + i for i in range(len(NAMES) + 1)]
        return {
            name: nn.ModuleDict({"encoder": model, "classifier": nn.Linear(6, side)})
            for (name, model), side in zip(pool().items(), sides, strict=True)
        }

    recipe = {"select": [{"pattern": "classifier.*", "action": "copy"}]}
    for same_shape in (True, False):
        modulated = FREEMerging(recipe=recipe).run(models(same_shape))
        before = modulated.backbone.classifier.weight.detach().clone()
        modulated.set_task("math")
        assert torch.equal(modulated.backbone.classifier.weight, before)
        head = modulated.double().backbone.classifier.weight
        with torch.no_grad():
            head += 1  # trained while an expert is on
        modulated.set_task("code")
        assert torch.equal(head, before.double() + 1)


@pytest.mark.parametrize("argument", ["recipe", "experts"])
def test_what_is_no_mapping_is_named(argument: str) -> None:
    with pytest.raises(fm.ArgumentError, match=f"{argument} must be a mapping of fields, got str"):
        FREEMerging(**{argument: "fr"}).run(pool())


def test_experts_that_need_the_pretrained_model_are_refused() -> None:
    for values in ("mask", "gains"):
        with pytest.raises(fm.ArgumentError, match=f"values {values} need the pretrained model"):
            FREEMerging(experts={"values": values, "backbone": "merged"}).run(pool())


class Lazy(BaseModelPool):  # type: ignore[misc]
    def load_model(self, name: str, *_: Any, **__: Any) -> LazyStateDict:
        return LazyStateDict(self._models[name], meta_module_class=LlamaForCausalLM)


def test_lazy_checkpoints_become_a_module(tmp_path: Path) -> None:
    paths = write_models(tmp_path, 2)
    merged = Merging(recipe={"cutoff": 0.3}).run(Lazy(dict(zip(["_pretrained_", *NAMES], paths, strict=False))))
    base, *others = [tensors_of(path) for path in paths]
    assert isinstance(merged, LlamaForCausalLM)
    assert same(dict(merged.state_dict()), fm.merge(base, others, fm.Recipe(cutoff=0.3)))
    assert torch.isfinite(merged(torch.tensor([[1, 2, 3]])).logits).all()
    made = LlamaForCausalLM(merged.config)
    assert same(dict(merged.named_buffers()), dict(made.named_buffers())), "which no file holds"
    assert {name: p.dtype for name, p in merged.named_parameters()} == {n: p.dtype for n, p in made.named_parameters()}


def test_what_a_lazy_checkpoint_does_not_give_is_refused(tmp_path: Path) -> None:
    models = Lazy(dict(zip(["_pretrained_", *NAMES], write_models(tmp_path, 2), strict=False)))
    recipe = {"select": [{"pattern": "model.norm.weight", "action": "drop"}]}
    with pytest.raises(fm.CheckpointError, match=r"LlamaForCausalLM needs model\.norm\.weight"):
        Merging(recipe=recipe).run(models)


TIES = ["method.recipe.method=ties", "~method.recipe.weights", "~method.recipe.cutoff", "+method.recipe.density=0.3"]


@pytest.mark.parametrize(
    ("changes", "recipe"),
    [(["method.recipe.cutoff=0.2"], fm.Recipe(cutoff=0.2)), (TIES, fm.Recipe(method="ties", density=0.3))],
    ids=["fr", "ties"],
)
def test_the_command_of_fusion_bench(changes: list[str], recipe: fm.Recipe, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
    assert all(change in page for change in changes)
    paths = write_models(tmp_path, 2)
    (tmp_path / "conf" / "modelpool").mkdir(parents=True)
    models = dict(zip(["_pretrained_", "math", "code"], paths, strict=True))
    content = {"_target_": "fusion_bench.modelpool.CausalLMPool", "_recursive_": False, "models": models}
    (tmp_path / "conf" / "modelpool" / "small.yaml").write_text(OmegaConf.to_yaml(content | {"tokenizer": None}))
    command = [Path(sys.executable).with_name("fusion_bench"), "--config-dir", CONF, "method=freemerge/fr"]
    overrides = [
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "modelpool=small", "taskpool=dummy",
        *changes, f"merged_model_save_path={tmp_path / 'merged'}",
        "+merged_model_save_kwargs.save_tokenizer=false", "fabric.accelerator=cpu", f"path.log_dir={tmp_path / 'log'}",
    ]  # fmt: skip
    done = subprocess.run([*command, *overrides], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    base, *others = [tensors_of(path) for path in paths]
    assert same(tensors_of(tmp_path / "merged"), fm.merge(base, others, recipe))
