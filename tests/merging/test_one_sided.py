"""Tensors that only some inputs have: rules match the names of all, and every message names rules that work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import freemerge as fm
from freemerge.checkpoint.patterns import patterns_for
from freemerge.cli import main
from in_memory import same

BASE = {
    "model.embed_tokens.weight": torch.arange(80.0).reshape(10, 8),
    "model.layers.0.q.weight": torch.ones(8, 8),
    "model.layers.1.q.weight": torch.ones(8, 8),
    "model.norm.weight": torch.ones(8),
}
TUNED = {name: tensor + 1 for name, tensor in BASE.items()}
EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])

ONE_SIDED: dict[str, dict[str, Tensor]] = {
    "classifier": {"classifier.dense.weight": torch.ones(3, 8), "classifier.dense.bias": torch.ones(3)},
    "score": {"score.weight": torch.ones(1, 8)},
    "position_ids": {"text_model.embeddings.position_ids": torch.arange(9)[None]},
    "inv_freq": {f"model.layers.{i}.rotary_emb.inv_freq": torch.rand(4) for i in range(30)},
    "masks": {f"h.{i}.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool) for i in range(2)},
    "vision tower": {f"vision_tower.blocks.{i}.weight": torch.ones(6, 6) for i in range(40)},
    "moving average": {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)},
    "head": {"lm_head.weight": torch.ones(12, 8)},
    "more layers": {f"model.layers.{i}.q.weight": torch.ones(8, 8) for i in (2, 3)},
    "a lone name": {"temperature": torch.tensor(1.0)},
    "strange names": {"a[0].weight": torch.ones(2), "a*b": torch.ones(2)},
    "half of a module": {"model.norm.bias": torch.ones(8)},
}


def advised(message: str, action: str) -> list[tuple[str, str]]:
    """The rules that a message names, as a user would copy them."""
    return [(pattern, action) for pattern in re.findall(rf"'([^']+)={action}'", message)]


@pytest.mark.parametrize("kind", ONE_SIDED)
def test_what_only_a_model_has_is_left_out_by_the_rules_that_the_message_names(kind: str) -> None:
    extra = ONE_SIDED[kind]
    with pytest.raises(
        fm.CheckpointError, match=rf"^models\[0\] .*has {len(extra)} tensors? that the base lacks"
    ) as refusal:
        fm.merge(BASE, [{**TUNED, **extra}], EXACT)
    rules = advised(str(refusal.value), "drop")
    assert rules
    for action in ("drop", "copy"):
        recipe = EXACT.replace(select=[*((pattern, action) for pattern, _ in rules), *EXACT.select])
        assert same(fm.merge(BASE, [{**TUNED, **extra}], recipe), TUNED)
        exact = EXACT.replace(
            select=[*((name.replace("[", "[[]").replace("a*b", "a[*]b"), action) for name in extra), ("*", "merge")]
        )
        assert same(fm.merge(BASE, [{**TUNED, **extra}], exact), TUNED)


@pytest.mark.parametrize("kind", ONE_SIDED)
def test_what_only_the_base_has_is_copied_or_left_out_by_the_rules_that_the_message_names(kind: str) -> None:
    extra = ONE_SIDED[kind]
    with pytest.raises(fm.CheckpointError, match=rf"^models\[0\] .*lacks {len(extra)} tensors? of the base") as refusal:
        fm.merge({**BASE, **extra}, [TUNED], EXACT)
    rules = advised(str(refusal.value), "copy")
    assert rules
    for action, expected in (("copy", {**TUNED, **extra}), ("drop", TUNED)):
        recipe = EXACT.replace(select=[*((pattern, action) for pattern, _ in rules), *EXACT.select])
        assert same(fm.merge({**BASE, **extra}, [TUNED], recipe), expected)


def test_several_models_with_heads_of_different_shapes_and_files(tmp_path: Path) -> None:
    models = [{**TUNED, "classifier.weight": torch.ones(i + 2, 8)} for i in range(3)]
    recipe = fm.Recipe(weights="uniform", scale=1.0, select=[("classifier.*", "drop"), ("*", "merge")])
    assert same(fm.merge(BASE, models, recipe), TUNED)
    fm.merge_checkpoints(
        {**BASE, "classifier.weight": torch.ones(9, 8)}, models, tmp_path / "out", recipe, progress=False
    )
    assert same(load_file(tmp_path / "out" / "model.safetensors"), TUNED)
    assert {d.name for d in fm.inspect(BASE, models, recipe).decisions} == set(BASE)


def test_a_rule_that_matches_no_input_is_refused() -> None:
    for run in (
        lambda: fm.merge(BASE, [TUNED], fm.Recipe(select=[("clasifier.*", "drop")])),
        lambda: fm.extract_experts(BASE, {"a": TUNED}, select=[("clasifier.*", "drop")]),
    ):
        with pytest.raises(fm.ArgumentError, match=r"select: pattern 'clasifier\.\*' matches no tensor of the base or"):
            run()


def test_a_rule_that_matches_second_names_of_tied_tensors_alone_is_refused() -> None:
    def tied(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state | {"lm_head.weight": state["model.embed_tokens.weight"]}

    base, tuned = tied(BASE), tied(TUNED)
    own = TUNED | {"lm_head.weight": TUNED["model.embed_tokens.weight"] + 1}
    select = [("lm_head.*", "copy")]
    for run in (
        lambda: fm.merge(base, [tuned], fm.Recipe(select=select)),
        lambda: fm.extract_experts(base, {"a": tuned}, select=select),
    ):
        with pytest.raises(fm.ArgumentError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight, "):
            run()
    merged = fm.merge(base, [own], fm.Recipe(select=select))  # but the head of a model may be left out
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]


def test_experts_take_rules_and_renames(tmp_path: Path) -> None:
    head = {"classifier.weight": torch.ones(2, 8)}
    prefixed = {f"roberta.{name}": tensor for name, tensor in TUNED.items()}
    with pytest.raises(fm.CheckpointError, match=r"models\['a'\] .*'classifier\.\*=drop'"):
        fm.extract_experts(BASE, {"a": TUNED | head})
    plain = fm.extract_experts(BASE, {"a": TUNED}, density=0.5)["a"]
    for model, options in (
        (TUNED | head, {"select": [("classifier.*", "drop")]}),
        (TUNED | head, {"select": [fm.Rule("classifier.*", "copy")]}),
        (prefixed | head, {"select": [("classifier.*", "drop")], "rename": [("roberta.", "")]}),
    ):
        expert = fm.extract_experts(BASE, {"a": model}, density=0.5, **options)["a"]  # type: ignore[arg-type]
        assert expert.tensors.keys() == plain.tensors.keys()
    without = fm.extract_experts(BASE, {"a": TUNED}, density=0.5, select=[("*embed*", "copy")])["a"]
    assert plain.tensors.keys() - without.tensors.keys() == {"model.embed_tokens.weight"}


def test_the_command_lines_take_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "model")]
    prefixed = {f"bert.{name}": tensor for name, tensor in TUNED.items()} | {"classifier.weight": torch.ones(2, 8)}
    for path, state in zip(paths, (BASE, prefixed), strict=True):
        fm.merge_checkpoints(state, [state | {}], path, progress=False)
    common = [str(path) for path in paths]
    assert main(["merge", *common, "-o", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    advice = re.findall(r"(--rename) '([^']*)'", message) + [
        ("--select", f"{p}=drop") for p, _ in advised(message, "drop")
    ]
    options = [word for pair in advice for word in pair]
    assert options == ["--rename", "bert.=", "--select", "classifier.*=drop"]
    assert main(["merge", *common, "-o", str(tmp_path / "out"), *options]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == BASE.keys()
    assert main(["experts", *common, "-o", str(tmp_path / "experts"), *options]) == 0
    for wrong in (["--select", "x=keep"], ["--rename", "bert."], ["--rename", "a=a"]):
        with pytest.raises(SystemExit):
            main(["merge", *common, "-o", str(tmp_path / "wrong"), *wrong])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["drop", "copy"])
def test_the_remedy_for_roberta_in_the_docs_works_as_it_is_printed(form: str, tmp_path: Path) -> None:
    """docs/presets.md: classifiers on a pretrained masked language model."""
    transformers = pytest.importorskip("transformers")
    text = (Path(__file__).parents[2] / "docs" / "presets.md").read_text()
    select = re.search(r"--select '(lm_head\.\*=copy)' --select '(classifier\.\*=drop)'", text)
    assert select is not None
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 40}
    base = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    for task, labels in (("cola", 2), ("mnli", 3)):
        tuned = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes, num_labels=labels))
        tuned.roberta.load_state_dict(base.roberta.state_dict(), strict=False)
        for parameter in tuned.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        tuned.save_pretrained(tmp_path / task)
    rules = [word for rule in select.groups() for word in ("--select", rule.replace("=drop", f"={form}"))]
    command = ["merge", *(str(tmp_path / name) for name in ("base", "cola", "mnli")), "-o", str(tmp_path / "out")]
    assert main([*command, "--preset", "official-roberta", *rules]) == 0
    merged, info = transformers.RobertaForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not torch.equal(
        merged.roberta.embeddings.word_embeddings.weight, base.roberta.embeddings.word_embeddings.weight
    )
    assert torch.equal(merged.lm_head.dense.weight, base.lm_head.dense.weight)


# Prefixes and wrappers

PREFIXES = ["model.", "language_model.", "module.", "_orig_mod.", "roberta.", "base_model.model.", "a.b.c."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("prefixed", ["the base", "the model"])
def test_a_prefix_is_told_and_renamed_or_seen_through(prefix: str, prefixed: str) -> None:
    def with_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in state.items()}

    base, tuned = (with_prefix(BASE), TUNED) if prefixed == "the base" else (BASE, with_prefix(TUNED))
    expected = with_prefix(TUNED) if prefixed == "the base" else TUNED
    if prefix in ("module.", "_orig_mod."):
        assert same(fm.merge(base, [tuned], EXACT), expected)
        return
    with pytest.raises(
        fm.CheckpointError, match=r"differ by a prefix: rename '(.*)' to '(.*)' \(--rename '\1=\2'\)"
    ) as refusal:
        fm.merge(base, [tuned], EXACT)
    assert "ties" not in str(refusal.value)
    change = re.search(r"--rename '([^=]*)=([^']*)'", str(refusal.value))
    assert change is not None
    for rename in ([change.groups()], [{"from": change.group(1), "to": change.group(2)}]):
        assert same(fm.merge(base, [tuned], EXACT.replace(rename=rename)), expected)
        assert same(
            fm.merge(base, [tuned, tuned | {}, {**expected}], fm.Recipe(method="average", rename=rename)), expected
        )


def test_a_prefix_beside_other_differences_needs_the_rules_that_are_named_too() -> None:
    tower = {f"vision_tower.{i}.weight": torch.ones(4, 4) for i in range(5)}
    base = {f"language_model.{name}": tensor for name, tensor in BASE.items()} | tower
    model = TUNED | {"score.weight": torch.ones(1, 8)}
    with pytest.raises(fm.CheckpointError, match=r"rename '' to 'language_model\.'") as refusal:
        fm.merge(base, [model], EXACT)
    rules = [*advised(str(refusal.value), "copy"), *advised(str(refusal.value), "drop")]
    assert rules == [("vision_tower.*", "copy"), ("score.*", "drop")]
    recipe = EXACT.replace(rename=[("", "language_model.")], select=[*rules, *EXACT.select])
    expected = {f"language_model.{name}": tensor for name, tensor in TUNED.items()} | tower
    assert same(fm.merge(base, [model], recipe), expected)


def test_no_prefix_is_seen_where_shapes_or_most_names_differ() -> None:
    other = {f"x.{name}": torch.ones(3, 3) for name in BASE}
    with pytest.raises(fm.CheckpointError) as refusal:
        fm.merge(BASE, [other])
    assert "prefix" not in str(refusal.value)


def test_a_module_that_is_partly_like_another_is_not_that_module() -> None:
    base = BASE | {"lm_head.dense.weight": torch.ones(8, 8), "lm_head.norm.weight": torch.ones(8)}
    classifier = {"classifier.dense.weight": torch.ones(8, 8), "classifier.out.weight": torch.ones(3, 8)}
    with pytest.raises(fm.CheckpointError) as refusal:
        fm.merge(base, [TUNED | classifier], EXACT)
    message = str(refusal.value)
    assert "rename" not in message
    assert [*advised(message, "copy"), *advised(message, "drop")] == [("lm_head.*", "copy"), ("classifier.*", "drop")]
    whole = {name.replace("lm_head.", "head."): tensor + 1 for name, tensor in base.items()}
    with pytest.raises(fm.CheckpointError, match=r"--rename 'head\.=lm_head\.'"):
        fm.merge(base, [TUNED | whole], EXACT)


def test_a_prefix_is_told_where_the_wrapped_model_holds_more() -> None:
    model = {f"bert.{name}": tensor for name, tensor in TUNED.items()} | {"bert.pooler.weight": torch.ones(8, 8)}
    with pytest.raises(fm.CheckpointError, match=r"rename 'bert\.' to ''.* 'bert\.pooler\.\*=drop'") as refusal:
        fm.merge(BASE, [model], EXACT)
    rules = [*advised(str(refusal.value), "drop"), *EXACT.select]
    assert same(fm.merge(BASE, [model], EXACT.replace(rename=[("bert.", "")], select=rules)), TUNED)


def test_a_rename_of_no_name_is_refused(tmp_path: Path) -> None:
    head = {f"bert.{name}": tensor for name, tensor in TUNED.items()}
    for rename in ([("brt.", "")], [("bert.", ""), ("brt.", "x.")]):
        for run in (
            lambda rename=rename: fm.merge(BASE, [head], fm.Recipe(rename=rename)),
            lambda rename=rename: fm.extract_experts(BASE, {"a": head}, rename=rename),
            lambda rename=rename: fm.extract_lora(BASE, head, tmp_path / "adapter", rank=1, rename=rename),
        ):
            with pytest.raises(fm.ArgumentError, match=r"^rename: 'brt\.' \(to '.*'\) begins no name of the models"):
                run()
    recipe = EXACT.replace(rename=[("bert.", "")])
    assert same(fm.merge(BASE, [head, TUNED], recipe.replace(weights=(1.0, 0.0))), TUNED), "one of them is enough"
    name = "model.norm.weight"
    assert torch.equal(fm.merge_tensors(BASE[name], [TUNED[name]], recipe=recipe, name=name), TUNED[name])


def test_renames_are_written_down(tmp_path: Path) -> None:
    recipe = fm.Recipe(rename=[("a.", ""), {"from": "", "to": "b."}])
    assert recipe.rename == (("a.", ""), ("", "b."))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert fm.Recipe.from_yaml(tmp_path / "r.yaml") == recipe
    assert "rename" not in fm.Recipe().to_config()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.layer(x))
        return out


def wrapped(kind: str, net: Net) -> nn.Module:
    if kind == "compile":
        return torch.compile(net)  # type: ignore[return-value]
    if kind == "data parallel":
        return nn.DataParallel(net)
    if kind == "compiled data parallel":
        return torch.compile(nn.DataParallel(net))  # type: ignore[return-value]
    if kind == "a compiled layer":
        net.layer = torch.compile(net.layer)  # type: ignore[assignment]
    if kind == "checkpointed layer":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        net.layer = checkpoint_wrapper(net.layer)
    return net


WRAPPERS = ["compile", "data parallel", "compiled data parallel", "a compiled layer", "checkpointed layer", "none"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inner", WRAPPERS)
@pytest.mark.parametrize("outer", WRAPPERS)
def test_wrapped_modules_merge_and_switch_experts_as_plain_ones(inner: str, outer: str) -> None:
    torch.manual_seed(0)
    plain, tuned = Net(), Net()
    states = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in (plain, tuned)]
    base, model = wrapped(outer, plain), wrapped(inner, tuned)
    names = list(base.state_dict())
    merged = fm.merge(base, [model], EXACT)
    assert sorted(merged) == sorted(names)
    for name, original in zip(names, states[0], strict=True):
        torch.testing.assert_close(merged[name], states[1][original])
    experts = fm.extract_experts(base, {"a": model}, density=0.5)
    other = wrapped(inner, plain if outer == "none" else Net())
    other.load_state_dict(dict(zip(other.state_dict(), states[0].values(), strict=True)))
    bank = fm.ExpertBank(other, experts, base=base)
    for combine in ("add", "replace"):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with bank.active("a", combine=combine):  # type: ignore[arg-type]
            assert not same(other.state_dict(), before)
        assert same(other.state_dict(), before)


def test_a_peft_model_in_memory_is_refused_and_the_ways_out_work(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = Net()
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    with pytest.raises(
        fm.CheckpointError, match=r"holds an adapter that is not merged .*merge_and_unload\(\) returns, or"
    ):
        fm.merge(base, [adapted])
    adapted.save_pretrained(tmp_path)
    from_folder = fm.merge(base, [tmp_path], EXACT)
    from_module = fm.merge(base, [adapted.merge_and_unload()], EXACT)
    for name, tensor in from_module.items():
        torch.testing.assert_close(from_folder[name], tensor)
    assert not torch.equal(from_module["layer.weight"], base["layer.weight"])


def test_a_head_that_an_adapter_trained_is_left_out_by_the_rule_that_is_named(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("body", Net())
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.add_module("classifier", nn.Linear(8, 3))
    config = peft.LoraConfig(r=2, target_modules=["layer"], modules_to_save=["classifier"], init_lora_weights=False)
    adapted = peft.get_peft_model(net, config)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(fm.CheckpointError, match=r"has 2 tensors that the base lacks: classifier\.bias") as refusal:
        fm.merge(base, [tmp_path], EXACT)
    rules = advised(str(refusal.value), "drop")
    assert rules == [("classifier.*", "drop")]
    merged = fm.merge(base, [tmp_path], EXACT.replace(select=[*rules, *EXACT.select]))
    expected = adapted.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])
    assert merged.keys() == base.keys()


names = st.lists(
    st.lists(st.sampled_from(["a", "b", "layers", "0", "1", "12", "w", "x[0]", "*"]), min_size=1, max_size=4).map(
        ".".join
    ),
    min_size=1,
    max_size=12,
    unique=True,
)


@given(names=names, data=st.data())
def test_patterns_match_what_they_should_and_nothing_else(names: list[str], data: st.DataObject) -> None:
    from fnmatch import fnmatchcase

    wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    patterns = list(patterns_for(wanted, names))
    for name in names:
        assert any(fnmatchcase(name, pattern) for pattern in patterns) == (name in wanted)


def test_many_names_become_few_patterns() -> None:
    tower: Any = [f"vision.blocks.{i}.w" for i in range(400)]
    frequencies = [f"model.layers.{i}.rotary.inv_freq" for i in range(400)]
    others = [f"model.layers.{i}.q.weight" for i in range(400)]
    assert list(patterns_for(tower + frequencies, others)) == ["model.layers.*.rotary.*", "vision.*"]


BROKEN: dict[str, Any] = {
    "nothing": None,
    "a number": 3,
    "a list": [TUNED],
    "sparse": {**TUNED, "model.norm.weight": torch.eye(8).to_sparse()},
    "no data": {**TUNED, "model.norm.weight": torch.empty(8, device="meta")},
    "not finite": {**TUNED, "model.norm.weight": torch.full((8,), torch.nan)},
    "another shape": {**TUNED, "model.norm.weight": torch.ones(3)},
    "one more": {**TUNED, "more": torch.ones(3)},
    "one less": {name: tensor for name, tensor in TUNED.items() if "norm" not in name},
    "quantised": {"l.qweight": torch.ones(2, dtype=torch.int32), "l.qzeros": torch.ones(2, dtype=torch.int32)},
    "an adapter": {"layers.0.lora_A": torch.ones(2, 2), "layers.0.lora_B": torch.ones(2, 2)},
    "float8": {**TUNED, "model.norm.weight": torch.ones(8).to(torch.float8_e4m3fn)},
    "several": {"ema": dict(TUNED), "model": dict(TUNED)},
    "no state dict": {"a": {"b": 1}},
}


# Where base and model disagree, the message is of both; it begins with the one that lacks or has something, or neither.
DISAGREE = {"another shape", "one more", "one less", "an adapter", "float8"}
# A bank needs no base; of one it looks at the names and shapes that experts touch, and reads values when it needs them.
TAKEN_BY_A_BANK = {"nothing", "not finite", "one more", "float8"}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_message_names_the_argument_of_an_input_in_memory(kind: str, tmp_path: Path) -> None:
    broken = BROKEN[kind]
    experts = fm.extract_experts(BASE, {"t": TUNED}, density=0.2)
    copied = {name: tensor.clone() for name, tensor in BASE.items()}
    third = {name: tensor + 2 for name, tensor in BASE.items()}
    calls: list[tuple[str, Any]] = [
        ("models[1]", lambda: fm.merge(BASE, [TUNED, broken])),
        ("base", lambda: fm.merge(broken, [TUNED])),
        ("models[0]", lambda: fm.merge_checkpoints(BASE, [broken], tmp_path / "out", progress=False)),
        ("models[0]", lambda: fm.extract_experts(BASE, [broken])),
        ("models['a']", lambda: fm.extract_experts(BASE, {"a": broken})),
        ("base", lambda: fm.extract_experts(broken, [TUNED])),
        ("backbone", lambda: fm.extract_experts(BASE, [third], rescale="projection", backbone=broken)),
        ("base", lambda: fm.ExpertBank(copied, experts, base=broken)),
    ]
    for argument, call in calls:
        message = ""
        try:
            call()
        except fm.FreemergeError as error:
            message = str(error)
        if call is calls[-1][1] and kind in TAKEN_BY_A_BANK:
            assert message == ""
        elif kind in DISAGREE and not message.startswith(argument):
            assert f"{argument} (in-memory state dict)" in message, (argument, message)
        else:
            begins = rf"{re.escape(argument)}( \(in-memory state dict\)| must be )"
            assert re.match(begins, message), (argument, message)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", [None, 3, [1]])
def test_a_bank_needs_a_model(model: Any) -> None:
    with pytest.raises(fm.ArgumentError, match=r"^model must be a module or a state dict, got"):
        fm.ExpertBank(model, {})
