"""One merge through every host and by freemerge itself: the same tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import sd_mecha
import torch
import yaml
from fusion_bench import BaseModelPool
from transformers import LlamaForCausalLM

import freemerge as fm
from freemerge.cli import main
from freemerge.integrations.fusion_bench import Merging
from freemerge.integrations.sd_mecha import freemerge_fr
from hosts.checkpoints import write_models
from hosts.states import tensors_of

WEIGHTS = [0.5, 0.3, 0.2]  # given, because mergekit and sd-mecha see one tensor at a time


@pytest.mark.filterwarnings("ignore")
def test_one_merge_everywhere(tmp_path: Path) -> None:
    models = write_models(tmp_path, 3)
    recipe = {"method": "fr", "cutoff": 0.2, "scale": 0.9}

    listed = [{"model": model, "parameters": {"weight": w}} for model, w in zip(models[1:], WEIGHTS, strict=True)]
    config = {
        "merge_method": "freemerge_fr",
        "base_model": models[0],
        "models": listed,
        "parameters": {"cutoff": 0.2, "scale": 0.9},
        "dtype": "float32",
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    assert main(["mergekit-yaml", str(tmp_path / "config.yml"), str(tmp_path / "out"), "--no-copy-tokenizer"]) == 0

    nodes = [sd_mecha.model(Path(model) / "model.safetensors") for model in models]
    node = freemerge_fr(*nodes, cutoff=0.2, scale="0.9", weights=",".join(map(str, WEIGHTS)))
    mecha = dict(sd_mecha.merge(node, output_dtype=torch.float32, check_extra_keys=False))
    mecha.pop("__metadata__")

    names = ["_pretrained_", "a", "b", "c"]
    loaded = {name: LlamaForCausalLM.from_pretrained(model) for name, model in zip(names, models, strict=True)}
    pooled = Merging(recipe={**recipe, "weights": WEIGHTS}).run(BaseModelPool(loaded))

    expected = fm.merge(models[0], models[1:], fm.Recipe(**recipe, weights=WEIGHTS))
    base = tensors_of(models[0])
    for found in (tensors_of(tmp_path / "out"), mecha, dict(pooled.state_dict())):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=1e-6, msg=name)
            assert (found[name] - base[name]).abs().max() > 1e-3, name
