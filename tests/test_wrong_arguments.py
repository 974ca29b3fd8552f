"""Whatever a public function is given by mistake, it names the argument in an error of freemerge."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freemerge as fm

BASE = {"a.weight": torch.randn(6, 5), "b.bias": torch.zeros(6)}
MODEL = {name: tensor + 0.1 for name, tensor in BASE.items()}
MODELS = [MODEL, MODEL]
EXPERTS = fm.extract_experts(BASE, {"t": MODEL})
BANK = fm.ExpertBank(dict(BASE), EXPERTS, base=BASE)
NET = nn.Linear(3, 2)
NET_EXPERTS = fm.extract_experts(NET.state_dict(), {"t": {name: t + 0.1 for name, t in NET.state_dict().items()}})
NET_BANK = fm.ExpertBank(NET, NET_EXPERTS)
FEATURES = torch.randn(4, 3)
ROUTER = fm.Router.fit(FEATURES, ["a", "b", "a", "t"], hidden=2, steps=1)
HIGH = fm.HighPass(0.4)

WRONG: dict[str, Any] = {
    "None": None, "3": 3, "2.5": 2.5, "zz": "zz", "''": "", "[]": [], "['x']": ["x"], "object": object(),
    "{'q'}": {"q": 1}, "b'x'": b"x", "nan": float("nan"), "True": True,
}  # fmt: skip


def logits(state: dict[str, Tensor]) -> Iterator[Tensor]:
    yield state["a.weight"]


def score(state: dict[str, Tensor]) -> dict[str, float]:
    return {"t": 1.0}


def explain_tensor(x: Tensor, response: fm.Response, backend: str = "auto") -> object:
    """Without the dtype and the device of a shape."""
    return fm.explain(x, response, backend=backend)


def extract_of_budget(budget: object) -> object:
    return fm.extract_experts(BASE, {"t": MODEL}, backbone=BASE, budget=budget)


def extract_of_rank(rank: object) -> object:
    return fm.extract_experts(BASE, {"t": MODEL}, backbone=BASE, rank=rank)


def route(model: Any, bank: Any, router: Any, features: Any, combine: Any = "add") -> object:
    """A routed model, and a batch for it."""
    return fm.RoutedModel(model, bank, router, features=features, combine=combine)(FEATURES)


# Every function, with arguments that it takes as they are, but for paths.
CALLS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (fm.analyze, {"base": BASE, "models": MODELS}),
    (fm.diff, {"first": BASE, "second": MODEL}),
    (fm.evaluate, {"model": BASE, "function": score}),
    (fm.evaluate_experts, {"model": BASE, "experts": EXPERTS, "function": score}),
    (explain_tensor, {"x": torch.randn(4, 4), "response": HIGH}),
    (fm.explain, {"x": (4, 4), "response": HIGH}),
    (fm.extract_experts, {"base": BASE, "models": {"t": MODEL}}),
    (extract_of_budget, {"budget": 0.5}),
    (extract_of_rank, {"rank": 2}),
    (fm.extract_lora, {"base": BASE, "model": MODEL, "out": "lora", "rank": 2, "force": True}),
    (fm.filter_, {"x": torch.randn(4, 4), "response": HIGH}),
    (fm.filtered, {"x": torch.randn(4, 4), "response": HIGH}),
    (fm.inspect, {"base": BASE, "models": MODELS, "out": "planned"}),
    (fm.iter_experts, {"base": BASE, "models": {"t": MODEL}}),
    (fm.merge, {"base": BASE, "models": MODELS}),
    (fm.merge_checkpoints, {"base": BASE, "models": MODELS, "out": "merged", "force": True, "progress": False}),
    (fm.merge_deltas, {"deltas": [MODEL["a.weight"]]}),
    (fm.merge_tensors, {"base": BASE["a.weight"], "tensors": [MODEL["a.weight"]]}),
    (fm.save_experts, {"experts": EXPERTS, "out": "experts", "force": True}),
    (fm.sweep, {"base": BASE, "models": MODELS, "recipe": fm.Recipe(), "scales": [1.0], "function": score}),
    (fm.task_weights, {"base": BASE, "models": MODELS}),
    (fm.tune, {"base": BASE, "models": MODELS, "recipe": fm.Recipe(method="average"), "function": logits,
               "iterations": 1}),
    (fm.verify, {"directory": "merged"}),
    (fm.ExpertBank, {"model": BASE, "experts": EXPERTS}),
    (fm.ExpertBank.load, {"model": BASE, "folder": "experts"}),
    (BANK.active, {"experts": "t"}),
    (NET_BANK.deltas, {"experts": ["t"]}),
    (NET_BANK.serves_deltas, {"tasks": ["t"]}),
    (fm.Expert.load, {"path": "t.safetensors"}),
    (EXPERTS["t"].save, {"path": "t.safetensors", "force": True}),
    (fm.Recipe, {}),
    (fm.Recipe.from_config, {"config": {}}),
    (fm.Recipe.from_yaml, {"path": "recipe.yml"}),
    (fm.Recipe.preset, {"name": "fr"}),
    (fm.Router.fit, {"features": FEATURES, "tasks": ["a", "b", "a", "t"], "hidden": 2, "steps": 1}),
    (fm.Router.load, {"path": "router.safetensors"}),
    (ROUTER.save, {"path": "router.safetensors"}),
    (route, {"model": NET, "bank": NET_BANK, "router": lambda x: x[:, :1], "features": lambda x: x}),
    (fm.Rule, {"pattern": "a", "action": "copy"}),
    (fm.Split, {"pattern": "a", "parts": 2}),
    (fm.Stack, {"patterns": ("a*", "b*")}),
    *((fm.responses.RESPONSES[name], options) for name, options in {
        "BandGain": {"cutoff": 0.2, "low": 1.0, "high": 2.0}, "BandPass": {"low": 0.1, "high": 0.3},
        "BandStop": {"low": 0.1, "high": 0.3}, "Butterworth": {"cutoff": 0.2}, "Gaussian": {"cutoff": 0.2},
        "HighPass": {"cutoff": 0.2}, "LowPass": {"cutoff": 0.2}, "Official": {"ratio": 0.2},
    }.items()),
]  # fmt: skip


def listed(table: dict[str, str]) -> dict[str, set[str]]:
    """The table with its keys and values one by one."""
    return {name: set(values.split()) for names, values in table.items() for name in names.split()}


ANY, TRUE = " ".join(WRONG), " ".join(key for key, value in WRONG.items() if value)
# What of WRONG is none, by the name of the parameter and, first, of its function.
TAKEN = listed({
    "backbone budget density filter into method out_dtype png rank recipe run values": "None",
    "evaluate_experts.base ExpertBank.base ExpertBank.load.base Recipe.response": "None",
    "Recipe.method tune.recipe": "",  # None is FR, which is not tuned as it is
    "methods select rename views layers filter_.x filtered.x save_experts.experts ExpertBank.deltas.experts": "[]",
    "cutoff low high order ratio scale rescale rate learning_rate weight_decay": "3 2.5",
    "BandPass.low BandStop.low": "",  # above the high one
    "extract_of_budget.budget": "",
    "extract_lora.rank extract_of_rank.rank hidden iterations max_shard_bytes memory parts seed steps": "3",
    "out Router.save.path": "zz",
    "analyze.out inspect.out": "None zz",
    "merge_deltas.out merge_tensors.out": "None",
    "name": "None zz ''",
    "Recipe.preset.name": "",
    "pattern": "zz ''",
    "explain.x explain_tensor.x scales": "b'x'",  # a sequence of numbers
    "weights": "None b'x'",
    "route.features": "''",  # the model itself
    "ExpertBank.serves_deltas.tasks": "None []",
    "force": TRUE,
    "analyze.force analyze.progress inspect.force": ANY,  # nothing is there
    "progress": "True",
    "resume": "None '' []",
})  # fmt: skip
PATHS = {"base", "backbone", "directory", "experts", "first", "folder", "model", "models", "path", "second"}
# How the few messages begin that have another word for the argument.
SAID = {
    "ExpertBank.model": "experts: 't' has an entry 'a.weight', which the model lacks",
    "ExpertBank.load.model": "experts: 't' has an entry 'a.weight', which the model lacks",
    "extract_lora.out": "the name of the output is empty",
    "save_experts.out": "the name of the output is empty",
    "tune.recipe": "method fr as it is here is not linear",
    "Recipe.from_config.config": "a recipe (must be a mapping|of method fr has no field)",
    "Recipe.preset.name": "preset must be",
    "route.features": "submodule 'zz' is not in Linear",
    "Stack.patterns": "views: a stack (is a list of patterns|needs at least two patterns)",
    **dict.fromkeys(["extract_of_budget.budget", "extract_of_rank.rank"],  # for None
                    "backbone must be given for rescale='projection' or 'least_squares', and for that only"),
    **dict.fromkeys(["extract_experts.budget", "extract_experts.rank", "iter_experts.budget", "iter_experts.rank"],
                    "backbone must be given for values svd2, which budget and rank choose"),
}  # fmt: skip


def names(argument: str, value: object, error: Exception) -> bool:
    """Whether a message begins with the argument, or with the path that it is."""
    parameter = argument.rpartition(".")[2]
    if parameter == "force":
        return "force=True" in str(error)
    begins = [rf"((select|views): (a )?)?{parameter}\b", *([SAID[argument]] if argument in SAID else [])]
    path = value[0] if isinstance(value, list) and value else value
    if parameter in PATHS and isinstance(path, str):
        begins.append(rf"((cannot read|recipe|router) )?{re.escape(str(Path(path)))}(:|/| holds no )")
    return re.match("|".join(begins), str(error)) is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("function", "given"), CALLS, ids=[getattr(call[0], "__qualname__", "") for call in CALLS])
def test_errors_are_freemerge_s_and_name_the_argument(
    function: Callable[..., Any], given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fm.merge_checkpoints(BASE, MODELS, "merged", progress=False)
    fm.extract_lora(BASE, MODEL, "lora", rank=2)
    EXPERTS["t"].save("t.safetensors")
    ROUTER.save("router.safetensors")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD or name == "workers":
            continue
        argument = f"{function.__qualname__}.{name}"
        taken = set()
        fm.save_experts(EXPERTS, "experts", force=True)  # some of the calls replace them
        for key, value in WRONG.items():
            try:
                result = function(**{**given, name: value})
                if hasattr(result, "__exit__") and not isinstance(result, Tensor):
                    with result:
                        pass
                if inspect.isgenerator(result):
                    list(result)
                taken.add(key)
            except fm.FreemergeError as error:
                if not names(argument, value, error):
                    raise AssertionError(f"{argument}={value!r}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{argument}={value!r}") from error
        assert taken == TAKEN.get(argument, TAKEN.get(name, set())), argument


SINGLE = ["math", Path("math"), MODEL, nn.Linear(2, 2), torch.tensor(1.0)]


@pytest.mark.parametrize(
    "call",
    [fm.analyze, fm.inspect, fm.iter_experts, fm.merge, fm.task_weights,
     lambda base, models: fm.tune(base, models, fm.Recipe(method="average"), logits)],
)  # fmt: skip
@pytest.mark.parametrize("single", SINGLE, ids=["name", "path", "state", "module", "tensor"])
def test_a_single_model_is_no_list(call: Callable[..., Any], single: object) -> None:
    with pytest.raises(fm.ArgumentError, match="models must be a list of models, got a single one"):
        call(BASE, single)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("function must be a function, got 'score.py:score'", lambda: fm.evaluate(BASE, "score.py:score")),
        ("function must be a function", lambda: fm.tune(BASE, MODELS, fm.Recipe(method="average"), None)),
        ("the function must yield the logits of batches, got None",
         lambda: fm.tune(BASE, MODELS, fm.Recipe(method="average"), lambda state: None)),
        ("iso_c as it is here is not linear in the weights; average, task_arithmetic, ",
         lambda: fm.tune(BASE, MODELS, fm.Recipe(method="iso_c"), logits)),
        ("progress must be True, False or 'json'", lambda: fm.merge_checkpoints(BASE, MODELS, "x", progress="jsn")),
        ("max_shard_bytes: expected a size such as 500MB",
         lambda: fm.merge_checkpoints(BASE, MODELS, "x", max_shard_bytes="2XB")),
        ("out must be a path, got None", lambda: fm.merge_checkpoints(BASE, MODELS, None)),
        ("models must be a list of models, got set", lambda: fm.merge(BASE, {"math", "code"})),
        ("into must be a module", lambda: fm.merge(BASE, MODELS, into="x")),
        ("ExpertBank.load reads a folder", lambda: fm.ExpertBank(BASE, "experts")),
        ("experts must be the name of one, or map names to weights", lambda: BANK.active(["t"]).__enter__()),
        ("the weight of 't' must be a finite number, got 'x'", lambda: BANK.active({"t": "x"}).__enter__()),
        ("pairs of a task and its expert", lambda: fm.save_experts([EXPERTS["t"]], "x")),
    ],
)  # fmt: skip
def test_messages_say_what_is_wanted(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        call()


def test_the_keys_of_a_mapping_are_no_set(tmp_path: Path) -> None:
    paths = {tmp_path / f"{i}.safetensors": model for i, model in enumerate(MODELS)}
    for path, model in paths.items():
        fm.merge_checkpoints(BASE, [model], path, fm.Recipe(method="average"), progress=False)
    found, expected = fm.merge(BASE, paths.keys()), fm.merge(BASE, list(paths))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_size_in_words_is_one_in_bytes(tmp_path: Path) -> None:
    for out, size in (("bytes", 1000), ("words", "1KB")):
        fm.merge_checkpoints(BASE, MODELS, tmp_path / out, max_shard_bytes=size, memory=size, progress=False)
    names = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("bytes", "words")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (fm.evaluate_experts, "experts"), (fm.extract_lora, "out"), (fm.inspect, "out"), (fm.merge_checkpoints, "out"),
        (fm.save_experts, "out"), (fm.verify, "directory"), (fm.Expert.load, "path"), (fm.ExpertBank.load, "folder"),
        (fm.Recipe.from_yaml, "path"), (fm.Router.load, "path"), (fm.Router.save, "path"),
    ],
)  # fmt: skip
def test_a_path_has_one_type_everywhere(function: Callable[..., Any], name: str) -> None:
    assert inspect.get_annotations(function)[name].startswith("str | os.PathLike[str]")


def test_extracted_experts_are_saved_as_they_are(tmp_path: Path) -> None:
    (saved,) = fm.save_experts(EXPERTS, tmp_path / "experts")
    assert saved.task == "t"
    assert fm.ExpertBank.load(BASE, tmp_path / "experts")["t"].entries == EXPERTS["t"].entries
