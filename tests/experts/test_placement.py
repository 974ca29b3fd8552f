"""Experts made of files act on the model that transformers loads from them, stacked and renamed as it keeps it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import freemerge as fm
import freemerge.evaluation
from freemerge.checkpoint import Checkpoint
from freemerge.checkpoint.conversion import Layout, Piece, layout_of
from freemerge.checkpoint.views import InModuleLayout
from freemerge.experts.placement import Part, gathered
from freemerge.experts.select import Selection
from freemerge.experts.values import coding_of
from in_memory import same
from stacked_models import build

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = ["Qwen3Moe", "Mixtral", "Olmoe", "Phimoe", "GPTNeoX", "GptOss"]


@pytest.mark.parametrize("name", MODELS)
def test_experts_of_files_on_a_loaded_model(name: str, tmp_path: Path) -> None:
    for task, seed in (("base", 0), ("a", 1), ("b", 2)):
        build(name, seed).save_pretrained(tmp_path / task)
    experts = fm.extract_experts(tmp_path / "base", {task: tmp_path / task for task in "ab"}, density=0.05)
    model = type(build(name, 0)).from_pretrained(tmp_path / "base").eval()
    bank = fm.ExpertBank(model, experts, base=tmp_path / "base")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    stored = load_file(tmp_path / "base" / "model.safetensors")
    dense = {task: experts[task].dense() for task in "ab"}
    cases: list[tuple[Any, dict[str, float]]] = [("a", {"a": 1.0}), ({"a": 0.5, "b": -0.25}, {"a": 0.5, "b": -0.25})]
    for chosen, weights in cases:
        expected = {key: tensor.clone() for key, tensor in stored.items()}
        for task, weight in weights.items():
            for key, tensor in dense[task].items():
                expected[key] += weight * tensor
        in_memory = Checkpoint.open(expected)
        layout = layout_of(model)
        view = in_memory if layout is None else InModuleLayout(in_memory, layout)
        for combine in ("add", "replace"):
            with bank.active(chosen, combine=combine):  # type: ignore[arg-type]
                changed = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            for key in view.specs:
                torch.testing.assert_close(changed[key], view.read(key), rtol=1e-5, atol=1e-6, msg=key)
            assert same(model.state_dict(), before)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_experts_from_files_and_from_memory(name: str, tmp_path: Path) -> None:
    base, tuned = build(name, 0), build(name, 1)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "a")
    from_files = fm.extract_experts(tmp_path / "base", {"a": tmp_path / "a"}, density=0.05)["a"]
    mixed: list[tuple[Any, Any]] = [(base, tuned), (tmp_path / "base", tuned), (base, tmp_path / "a")]
    for sources in mixed:
        expert = fm.extract_experts(sources[0], {"a": sources[1]}, density=0.05)["a"]
        assert expert.mu == from_files.mu
        assert same(expert.dense(), from_files.dense())
    saved = fm.experts.folder.save_experts([("a", from_files)], tmp_path / "experts")
    assert saved[0].entries == from_files.entries
    with fm.ExpertBank.load(copy.deepcopy(base), tmp_path / "experts").active("a"):
        pass


def sparse(shape: tuple[int, ...]) -> Any:
    numel = int(torch.tensor(shape).prod())
    indices = torch.arange(0, numel, 2)
    return coding_of("fp32").encode(shape, Selection(indices, indices.float() + 1))  # type: ignore[attr-defined]


def test_pieces_of_any_kind() -> None:
    """Stacked, split along either side, transposed, interleaved: what the layout views is what the entries reach."""

    def piece(file: str, module: str, shape: tuple[int, ...], strides: tuple[int, ...], **where: Any) -> Piece:
        own = tuple(torch.empty(shape).stride())
        return Piece(shape, file, where.get("start", 0), where.get("file_strides", own), module, where["at"], strides)

    layout = Layout(
        {"e0": (4, 6), "e1": (4, 6), "turned": (5, 3), "fused": (6, 2), "wide": (3, 5), "mixed": (1, 6, 2)},
        {"stack": (2, 4, 6), "t": (3, 5), "q": (2, 2), "k": (4, 2), "l": (3, 2), "r": (3, 3), "halves": (6, 2)},
        [
            piece("e0", "stack", (4, 6), (6, 1), at=0),
            piece("e1", "stack", (4, 6), (6, 1), at=24),
            piece("turned", "t", (5, 3), (1, 5), at=0),
            piece("fused", "q", (2, 2), (2, 1), at=0),
            piece("fused", "k", (4, 2), (2, 1), at=0, start=4),
            piece("wide", "l", (3, 2), (2, 1), at=0, file_strides=(5, 1)),
            piece("wide", "r", (3, 3), (3, 1), at=0, start=2, file_strides=(5, 1)),
            piece("mixed", "halves", (1, 3, 2, 2), (12, 2, 6, 1), at=0),
        ],
    )
    entries = {name: sparse(shape) for name, shape in layout.files.items()}
    dense = {name: tensor.dense() for name, tensor in entries.items()}
    for name, shape in layout.shapes.items():
        parts = [Part(piece.file, piece) for piece in layout.module[name]]
        vector = gathered(parts, entries)
        found = torch.zeros(shape).flatten()
        found[vector.indices.long()] = vector.values
        assert torch.equal(found.view(shape), layout.module_tensor(name, dense.__getitem__))
        assert bool((vector.indices.diff() > 0).all())


def test_entries_under_names_of_older_versions_and_of_a_bare_encoder() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, vocab_size=40)
    model = transformers.BertForSequenceClassification(config)
    bare = {name: tensor.clone() for name, tensor in transformers.BertModel(config).state_dict().items()}
    older = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in bare.items()}
    tuned = {name: tensor + 1.0 if tensor.is_floating_point() else tensor for name, tensor in older.items()}
    bank = fm.ExpertBank(model, fm.extract_experts(older, {"a": tuned}, density=0.5))
    norm = model.bert.embeddings.LayerNorm.weight
    before = norm.clone()
    with bank.active("a"):
        assert not torch.equal(norm, before)
    assert torch.equal(norm, before)


def test_names_and_shapes_that_the_model_has_in_no_form_are_refused() -> None:
    model = build("Qwen3Moe", 0)
    tuned = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    expert = fm.extract_experts(model.state_dict(), {"a": tuned}, density=0.05)["a"]
    fm.ExpertBank(model, {"a": expert})  # the module's own names
    (first, *_) = expert.tensors
    wrong = {"model.layers.9.mlp.experts.0.up_proj.weight": expert.tensors[first]}
    with pytest.raises(fm.ArgumentError, match=r"'a' has an entry 'model\.layers\.9\..*', which the model lacks"):
        fm.ExpertBank(model, {"a": type(expert)(wrong, 1.0, 0.1, "tensor", "number", "fp32")})
    misfit = {"model.layers.0.mlp.experts.0.up_proj.weight": sparse((3, 3))}
    with pytest.raises(fm.ArgumentError, match=r"up_proj\.weight' has shape \(3, 3\), files of the model hold"):
        fm.ExpertBank(model, {"a": type(expert)(misfit, 1.0, 0.1, "tensor", "number", "fp32")})


def test_a_module_is_scored_with_experts_of_its_files(tmp_path: Path) -> None:
    """The function gets the module's own names, and the module stays as it is; ties stay ties."""
    for task, seed in (("base", 0), ("a", 1)):
        build("Qwen3Moe", seed).save_pretrained(tmp_path / task)
    experts = fm.extract_experts(tmp_path / "base", {"a": tmp_path / "a"}, density=0.05)
    fm.experts.folder.save_experts(experts.items(), tmp_path / "experts")
    model = build("Qwen3Moe", 0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = copy.deepcopy(model)
    bank = fm.ExpertBank(expected, experts)
    for given in (experts, tmp_path / "experts"):
        seen: list[dict[str, Tensor]] = []

        def score(weights: dict[str, Tensor], seen: list[dict[str, Tensor]] = seen) -> dict[str, float]:
            seen.append({key: tensor.clone() for key, tensor in weights.items()})
            return {"a": 1.0}

        evaluation = fm.evaluation.evaluate_experts(model, given, score)  # type: ignore[arg-type]
        assert evaluation.scores == {"a": 1.0}
        with bank.active("a"):
            assert same(seen[0], dict(expected.state_dict()))
        assert not same(seen[0], before)
        assert same(dict(model.state_dict()), before)
