"""What an error message advises is done here, and then it works; tests/checkpoint has those about kinds of inputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import freemerge as fm
from freemerge.cli import main

BASE = {"a.weight": torch.arange(64.0).reshape(8, 8), "b.bias": torch.ones(8)}
TUNED = {name: tensor + 1 for name, tensor in BASE.items()}
MERGE = [fm.Rule("*", "merge")]
EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=MERGE)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.allclose(found[name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore")
def test_resize_one_vocabulary_to_the_other() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base, model = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=rows, tie_word_embeddings=tied))
        for rows, tied in ((40, False), (43, False))
    )
    with pytest.raises(fm.CheckpointError, match=r"token embeddings differ: 40 rows in base .*resize one vocabulary"):
        fm.merge(base, [model], EXACT)
    base.resize_token_embeddings(43)
    assert same(fm.merge(base, [model], EXACT), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_take_the_base_s_vocabulary(tied: bool, tmp_path: Path) -> None:
    """As docs/faq.md says it, word for word."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, rows in (("base", 40), ("model", 43)):
        config = transformers.LlamaConfig(**sizes, vocab_size=rows, tie_word_embeddings=tied)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    inputs = [str(tmp_path / "base"), str(tmp_path / "model")]
    with pytest.raises(fm.CheckpointError, match=r"or take the base's with select ") as refusal:
        fm.merge(inputs[0], inputs[1:])
    page = (Path(__file__).parents[1] / "docs" / "faq.md").read_text()
    printed = re.search(r"For a Llama they\nare `--select '(.*?)' --select '(.*?)'`, and only the first where", page)
    assert printed is not None
    rules = printed.groups()[: 1 if tied else 2]
    assert set(re.findall(r"'([^']*=copy)'", str(refusal.value))) == set(rules)
    options = [word for rule in rules for word in ("--select", rule)]
    assert main(["merge", *inputs, "-o", str(tmp_path / "out"), *options]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items():
        assert torch.equal(merged[name], tensor) == (len(tensor) == 40 or "norm" in name), name
    if tied:
        assert main(["merge", *inputs, "-o", str(tmp_path / "no"), *options, "--select", printed[2]]) == 2


def test_copy_a_mask() -> None:
    mask = {"attn.mask": torch.full((4, 4), -torch.inf).triu(1)}
    with pytest.raises(
        fm.CheckpointError, match=r"'attn\.mask' holds NaN or infinity \(a mask can be selected to 'copy'"
    ):
        fm.merge(BASE | mask, [TUNED | mask], EXACT)
    recipe = EXACT.replace(select=[("attn.mask", "copy"), *MERGE])
    assert same(fm.merge(BASE | mask, [TUNED | mask], recipe), TUNED | mask)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_overflowed_get_no_such_advice(value: float) -> None:
    broken = TUNED | {"b.bias": torch.full((8,), value)}
    with pytest.raises(fm.CheckpointError, match=r"'b\.bias' holds NaN or infinity$"):
        fm.merge(BASE, [broken], EXACT)


def test_take_the_base_s_integers() -> None:
    base, model = BASE | {"positions": torch.arange(4)}, TUNED | {"positions": torch.arange(4) + 1}
    with pytest.raises(fm.CheckpointError, match="select it with action 'copy' to take the base's"):
        fm.merge(base, [model], EXACT)
    merged = fm.merge(base, [model], EXACT.replace(select=[("positions", "copy"), *MERGE]))
    assert same(merged, TUNED | {"positions": torch.arange(4)})


@pytest.mark.filterwarnings("ignore")
def test_merge_what_torch_quantised() -> None:
    original = nn.Sequential(nn.Linear(8, 8))
    packed = torch.ao.quantization.quantize_dynamic(original, {nn.Linear})
    with pytest.raises(fm.CheckpointError, match="pass the model that it was quantised from"):
        fm.merge(nn.Sequential(nn.Linear(8, 8)), [packed])
    assert same(fm.merge(nn.Sequential(nn.Linear(8, 8)), [original], EXACT), dict(original.state_dict()))


def stored(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_write_somewhere_else_or_use_force(tmp_path: Path) -> None:
    base, model = stored(tmp_path / "base", BASE), stored(tmp_path / "model", TUNED)
    for out in (base, model, tmp_path, base / "inside"):
        with pytest.raises(fm.RefusedError, match="write somewhere else"):
            fm.merge_checkpoints(base, [model], out, EXACT, force=True, progress=False)
    out = tmp_path / "new" / "merged"
    out.parent.mkdir()
    fm.merge_checkpoints(base, [model], out, EXACT, progress=False)
    with pytest.raises(fm.RefusedError, match="use --force "):
        fm.merge_checkpoints(base, [model], out, EXACT, progress=False)
    fm.merge_checkpoints(base, [model], out, EXACT, force=True, progress=False)


@pytest.mark.parametrize("stale", ["model.safetensors", "model.safetensors.index.json"])
def test_remove_the_stale_one_or_name_one(stale: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "model", TUNED)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = (
        '{"weight_map": {"a.weight": "model-00001-of-00001.safetensors", "b.bias": "model-00001-of-00001.safetensors"}}'
    )
    (folder / "model.safetensors.index.json").write_text(index)
    save_file(TUNED, folder / "model.safetensors")
    with pytest.raises(fm.CheckpointError, match="remove the stale one, or name one"):
        fm.merge(BASE, [folder])
    for named in ("model.safetensors", "model.safetensors.index.json"):
        assert same(fm.merge(BASE, [folder / named], EXACT), TUNED)
    (folder / stale).unlink()
    assert same(fm.merge(BASE, [folder], EXACT), TUNED)


def test_give_each_of_two_tasks_a_name(tmp_path: Path) -> None:
    models = [stored(tmp_path / run, {n: t + i for n, t in BASE.items()}) for i, run in enumerate(("a-b", "a/b"), 1)]
    models.append(stored(tmp_path / "c" / "b", TUNED))
    with pytest.raises(fm.ArgumentError, match="two are called 'a-b'; each needs a path of its own, or a name"):
        fm.extract_experts(BASE, models)
    assert fm.extract_experts(BASE, dict(zip("abc", models, strict=True))).keys() == {"a", "b", "c"}


def test_give_the_base_to_the_bank() -> None:
    experts = fm.extract_experts(BASE, {"a": TUNED}, density=0.5)
    model = {name: tensor.clone() for name, tensor in BASE.items()}
    with (
        pytest.raises(fm.ArgumentError, match="needs the base: give it to ExpertBank"),
        _on(fm.ExpertBank(model, experts)),
    ):
        pass
    with _on(fm.ExpertBank(model, experts, base=BASE)):
        assert not same(model, BASE)
    assert same(model, BASE)


def _on(bank: fm.ExpertBank) -> Any:
    return bank.active("a", combine="replace")


UNREADABLE: dict[str, Any] = {
    "to_dense()": lambda: torch.eye(8).to_sparse(),
    "dequantize()": lambda: torch.quantize_per_tensor(torch.eye(8), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("advice", UNREADABLE)
def test_pass_a_plain_tensor(advice: str) -> None:
    tensor = UNREADABLE[advice]()
    with pytest.raises(fm.CheckpointError, match=r"models\[0\] .*a\.weight") as refusal:
        fm.merge(BASE, [TUNED | {"a.weight": tensor}], EXACT)
    assert f"pass {advice}" in str(refusal.value)
    plain = getattr(tensor, advice.removesuffix("()"))()
    assert torch.equal(fm.merge(BASE, [TUNED | {"a.weight": plain}], EXACT)["a.weight"], plain)
