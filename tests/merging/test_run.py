"""Merging from end to end against the float64 reference, on state dicts and on real checkpoint files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from llamas import llama, read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import freemerge as fm
from freemerge import accumulate
from freemerge.checkpoint import Checkpoint, Inputs, TensorSpec, verify
from freemerge.merging.engine import Merger
from freemerge.merging.units import plan_units
from reference import reference_merge

State = dict[str, Tensor]

SHAPES = {
    "embed.weight": (61, 24),
    "attn.q.weight": (24, 24),
    "attn.k.weight": (12, 24),
    "attn.v.weight": (12, 24),
    "attn.qkv.weight": (48, 24),
    "mlp.up.weight": (40, 24),
    "mlp.up.bias": (40,),
    "experts.weight": (3, 16, 20),
    "conv.weight": (4, 3, 3, 3),
    "norm.weight": (24,),
    "logit_scale": (),
}


def random_models(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[State, list[State]]:
    """A base and fine-tuned models whose task vectors have a strong low-frequency part, and an integer buffer."""
    generator = torch.Generator().manual_seed(seed)

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = {name: noise(shape).to(dtype) for name, shape in SHAPES.items()}
    models = [
        {n: (t.float() + 0.01 * (i + 1) * (noise(SHAPES[n]) + 0.5)).to(dtype) for n, t in base.items()}
        for i in range(count)
    ]
    for state in (base, *models):
        state["position_ids"] = torch.arange(7)
    return base, models


def reference(base: Mapping[str, Tensor], models: list[State], recipe: fm.Recipe) -> dict[str, Tensor]:
    specs = {name: TensorSpec(name, tuple(base[name].shape), base[name].dtype) for name in sorted(base)}
    return reference_merge(base, models, recipe, plan_units(specs, recipe.select, recipe.views))


def assert_close(result: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Equal within float32 rounding of the merged task vector."""
    for name, tensor in expected.items():
        assert result[name].dtype == base[name].dtype
        error = (result[name].double() - tensor).norm()
        assert error <= 2e-6 * (1 + tensor.norm()), name


RECIPES = {
    "default": fm.Recipe(),
    "paper": fm.Recipe.preset("paper"),
    "uniform": fm.Recipe(weights="uniform", renormalize=None),
    "given": fm.Recipe(weights=[0.2, 0.5, -0.1], scale=0.7),
    "filtered statistics": fm.Recipe(stats="filtered"),
    "per tensor": fm.Recipe(scope="tensor"),
    "per tensor, filtered": fm.Recipe(scope="tensor", stats="filtered", renormalize=None),
    "aligned": fm.Recipe(align=True),
    "elected": fm.Recipe(sign_election=True, response=fm.Butterworth(0.2)),
    "aligned and elected": fm.Recipe(align=True, sign_election=True, renormalize=None, weights="sum"),
    "official vit": fm.Recipe.preset("official-vit8"),
    "official vit 30": fm.Recipe.preset("official-vit30"),
    "official roberta": fm.Recipe.preset("official-roberta"),
    "official llm": fm.Recipe.preset("official-llm"),
    "stacked": fm.Recipe(views=[fm.Stack(("*.q.weight", "*.k.weight", "*.v.weight"))]),
    "split": fm.Recipe(views=[fm.Split("*.qkv.weight", (24, 12, 12))]),
    "selected": fm.Recipe(
        select=[("embed.*", "merge"), ("mlp.up.weight", "copy"), ("*.bias", "filter"), ("conv.*", "filter")]
    ),
    **{
        f"stacked, per tensor, {stats}{', elected' * election}": fm.Recipe(
            scope="tensor", stats=stats, sign_election=election, views=[fm.Stack(("*.q.weight", "*.k.weight"))]
        )
        for stats in ("raw", "filtered")
        for election in (False, True)
    },
    "stacked, aligned": fm.Recipe(align=True, views=[fm.Stack(("*.q.weight", "*.k.weight"))]),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_merge_equals_the_reference(recipe: fm.Recipe) -> None:
    base, models = random_models(3)
    assert_close(fm.merge(base, models, recipe), reference(base, models, recipe), base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_merge_in_other_dtypes(dtype: torch.dtype) -> None:
    base, models = random_models(2, dtype)
    result, expected = fm.merge(base, models), reference(base, models, fm.Recipe())
    for name, tensor in expected.items():
        if dtype == torch.float64:
            assert (result[name] - tensor).norm() <= 1e-12 * (1 + tensor.norm())
        elif result[name].is_floating_point():
            assert_rounded(result[name], tensor, base[name], allowed=1)


def assert_rounded(result: Tensor, expected: Tensor, base: Tensor, *, allowed: int) -> None:
    """The reference correctly rounded, but for ``allowed`` entries that may be off by one unit in the last place.

    Where base and task vector cancel to almost nothing, that unit is smaller than float32 resolves the task vector;
    there the error counts against the task vector instead.
    """
    rounded = expected.to(result.dtype)
    bits = torch.int16 if result.dtype.itemsize == 2 else torch.int32
    distance = (result.view(bits).int() - rounded.view(bits).int()).abs()
    assert int(distance.count_nonzero()) <= allowed
    resolution = 2e-6 * (expected - base.double()).square().mean().sqrt()
    error = (result.double() - expected).abs()
    assert not ((distance > 1) & (error > resolution)).any()


def test_float64_arithmetic_on_request() -> None:
    base, models = random_models(2)
    recipe = fm.Recipe(compute_dtype="float64", out_dtype="float64")
    result = fm.merge(base, models, recipe)
    for name, tensor in reference(base, models, recipe).items():
        assert (result[name] - tensor).norm() <= 1e-12 * (1 + tensor.norm())


def test_out_dtype_spares_integers() -> None:
    base, models = random_models(2)
    result = fm.merge(base, models, fm.Recipe(out_dtype="bfloat16"))
    assert {name: tensor.dtype for name, tensor in result.items()} == {
        name: torch.bfloat16 if tensor.is_floating_point() else tensor.dtype for name, tensor in base.items()
    }


def test_inputs_are_untouched_and_not_shared() -> None:
    base, models = random_models(2)
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in (base, *models)]
    result = fm.merge(base, models)
    for state, copy in zip((base, *models), copies, strict=True):
        for name, tensor in state.items():
            assert torch.equal(tensor, copy[name])
            assert tensor.data_ptr() != result[name].data_ptr() or tensor.numel() == 0


def test_equal_models_give_the_base_back() -> None:
    base, _ = random_models(1)
    for name, tensor in fm.merge(base, [base, base]).items():
        assert torch.equal(tensor, base[name])


def test_a_filter_that_removes_everything_gives_the_base_back() -> None:
    base, models = random_models(2)
    result = fm.merge(base, models, fm.Recipe(fm.HighPass(2.0)))
    assert torch.equal(result["embed.weight"], base["embed.weight"])


@pytest.mark.parametrize(
    ("recipe", "per_tensor"),
    [
        (fm.Recipe(), 1),
        (fm.Recipe(stats="filtered"), 9),
        (fm.Recipe(align=True), 8),
        (fm.Recipe(stats="filtered", scope="tensor"), 8),
        (fm.Recipe(stats="filtered", scope="tensor", align=True), 8),
    ],
)
def test_linearity_saves_filters(recipe: fm.Recipe, per_tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = random_models(8)
    filtered: list[int] = []
    filter_ = fm.filter_

    def counting(matrices: list[Tensor], response: fm.Response, *, backend: str) -> list[Tensor]:
        filtered.append(len(matrices))
        return filter_(matrices, response, backend=backend)

    def counting_sums(
        *arguments: object, **named: object
    ) -> tuple[Tensor | accumulate.LateSum, list[float], tuple[float, float] | None]:
        found = filtered_sum(*arguments, **named)  # type: ignore[arg-type]
        filtered.append(int(found[2] is not None))
        return found

    filtered_sum = accumulate.filtered_sum
    monkeypatch.setattr("freemerge.filter.filter_", counting)
    monkeypatch.setattr(accumulate, "filtered_sum", counting_sums)
    fm.merge(base, models, recipe)
    matrices = sum(unit.action == "filter" for unit in plan_units(Checkpoint.open(base).specs))
    assert sum(filtered) == matrices * per_tensor


@pytest.mark.parametrize(
    "recipe",
    [
        fm.Recipe(),
        fm.Recipe(align=True),
        fm.Recipe(weights="uniform", sign_election=True, renormalize=None),
        fm.Recipe(scope="tensor"),
        fm.Recipe(scope="tensor", stats="filtered"),
    ],
)
def test_inspection_knows_how_often_tensors_are_read(recipe: fm.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = random_models(6)
    expected = fm.inspect(base, models, recipe).read_bytes
    checkpoints = [Checkpoint.open(state) for state in (base, *models)]
    read = [0] * len(checkpoints)

    def count(index: int, checkpoint: Checkpoint) -> None:
        original = checkpoint.read

        def counting(name: str) -> Tensor:
            read[index] += checkpoint.specs[name].nbytes
            return original(name)

        monkeypatch.setattr(checkpoint, "read", counting)

    for index, checkpoint in enumerate(checkpoints):
        count(index, checkpoint)
    merger = Merger(Inputs(checkpoints[0], checkpoints[1:]), recipe)
    reported: list[int] = []
    measured = merger.measure(lambda unit, read_bytes: reported.append(read_bytes))
    for unit in merger.units:
        merger.merged(unit, measured, lambda unit, read_bytes: reported.append(read_bytes))
    assert sum(reported) == expected, "the progress bar ends where it should"
    assert sum(read[1:]) == expected * 6 // 7
    assert read[0] >= expected // 7, "the base is read once more, to be added to the result"


def test_the_backend_is_checked_where_nothing_is_filtered() -> None:
    base = {"norm.weight": torch.ones(4)}
    with pytest.raises(fm.ArgumentError, match="'spam'"):
        fm.merge(base, [base], backend="spam")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64], ids=str)
def test_buffers_that_cannot_be_merged_are_compared_by_their_bytes(dtype: torch.dtype) -> None:
    buffer = torch.tensor([float("nan"), 1.0]).to(dtype)
    base = {"weight": torch.randn(4, 4), "buffer": buffer}
    assert "buffer" in fm.merge(base, [{"weight": torch.randn(4, 4), "buffer": buffer.clone()}])
    with pytest.raises(fm.CheckpointError, match="buffer"):
        fm.merge(base, [{"weight": torch.randn(4, 4), "buffer": torch.zeros(2).to(dtype)}])


def test_modules_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

    base, model = Tied(), Tied()
    result = fm.merge(base, [model])
    assert list(result) == ["embed.weight", "head.weight"]
    assert result["head.weight"] is result["embed.weight"]
    expected = reference(
        {"embed.weight": base.embed.weight.data}, [{"embed.weight": model.embed.weight.data}], fm.Recipe()
    )
    torch.testing.assert_close(result["embed.weight"].double(), expected["embed.weight"], rtol=1e-5, atol=1e-6)


def with_nan(state: State) -> None:
    state["mlp.up.weight"][3, 4] = float("nan")


def with_infinity(state: State) -> None:
    state["norm.weight"][0] = float("inf")


def without_a_tensor(state: State) -> None:
    del state["norm.weight"]


def with_another_shape(state: State) -> None:
    state["mlp.up.bias"] = torch.zeros(41)


def with_another_buffer(state: State) -> None:
    state["position_ids"] = torch.arange(1, 8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_nan, "two.safetensors.*mlp.up.weight.*NaN"),
        (with_infinity, "two.safetensors.*norm.weight.*infinity"),
        (without_a_tensor, "two.safetensors.*norm.weight"),
        (with_another_shape, "mlp.up.bias"),
        (with_another_buffer, "two.safetensors.*position_ids.*differs"),
    ],
)
@pytest.mark.parametrize("weights", ["magnitude", "sum"])
def test_bad_models_are_named_and_nothing_is_written(
    spoil: Callable[[State], None], message: str, weights: str, tmp_path: Path
) -> None:
    base, models = random_models(2)
    spoil(models[1])
    for name, state in zip(("base", "one", "two"), (base, *models), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    before = sorted(tmp_path.iterdir())
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    with pytest.raises(fm.CheckpointError, match=message):
        fm.merge_checkpoints(
            tmp_path / "base.safetensors", paths, tmp_path / "out", fm.Recipe(weights=weights), progress=False
        )
    assert sorted(tmp_path.iterdir()) == before


def test_a_copied_tensor_may_differ_or_be_missing() -> None:
    base, models = random_models(2)
    with_another_buffer(models[0])
    without_a_tensor(models[1])
    result = fm.merge(base, models, fm.Recipe(select=[("position_ids", "copy"), ("norm.*", "copy")]))
    assert torch.equal(result["position_ids"], base["position_ids"])
    assert torch.equal(result["norm.weight"], base["norm.weight"])


@pytest.mark.parametrize(
    ("models", "recipe", "message"),
    [
        ([], None, "models must hold at least one"),
        ("model", None, "models must be a list"),
        (["a", "b"], fm.Recipe(weights=[1.0]), "weights has 1 number for 2 models"),
        (["a"], {"scale": 1}, "recipe must be a Recipe, got dict"),
    ],
)
def test_bad_arguments(models: list[str], recipe: fm.Recipe | None, message: str) -> None:
    with pytest.raises(fm.ArgumentError, match=message):
        fm.merge({"w": torch.zeros(2, 2)}, models, recipe)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied_models(tmp_path: Path) -> tuple[Tensor, Tensor]:
    """A base file with a copy of the embeddings as its head, and a model file that leaves the head out."""
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(50, 16, generator=generator)
    tuned = embed + 0.1 * torch.randn(50, 16, generator=generator)
    save_file({EMBED: embed, HEAD: embed.clone()}, tmp_path / "base.safetensors")
    save_file({EMBED: tuned}, tmp_path / "model.safetensors")
    return embed, tuned


@pytest.mark.parametrize("action", ["filter", "merge", "copy"])
def test_a_head_that_one_file_copies_and_another_leaves_out(action: str, tmp_path: Path) -> None:
    embed, tuned = tied_models(tmp_path)
    recipe = fm.Recipe(select=[(EMBED, action)])
    paths = tmp_path / "base.safetensors", [tmp_path / "model.safetensors"]
    found = [fm.merge(*paths, recipe)]
    if action != "copy":  # which leaves the base as it is, and is not written
        fm.merge_checkpoints(*paths, tmp_path / "out.safetensors", recipe, progress=False)
        found.append(load_file(tmp_path / "out.safetensors"))
    expected = fm.merge({EMBED: embed}, [{EMBED: tuned}], recipe)[EMBED]
    for merged in found:
        assert sorted(merged) == [HEAD, EMBED], "the names that the base's config promises"
        assert torch.equal(merged[EMBED], expected)
        assert torch.equal(merged[HEAD], expected)


def test_what_is_tied_in_memory_is_copied_together(tmp_path: Path) -> None:
    embed, _ = tied_models(tmp_path)
    base = {EMBED: embed, HEAD: embed}
    merged = fm.merge(base, [tmp_path / "model.safetensors"], fm.Recipe(select=[(EMBED, "copy")]))
    assert merged[HEAD] is merged[EMBED]
    assert torch.equal(merged[EMBED], embed)


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    base, models = random_models(1)
    earlier = tmp_path / "earlier"
    fm.merge_checkpoints(base, models, earlier, progress=False)
    save_file(models[0], earlier / "mine.safetensors")
    for source in ("mine.safetensors", "model.safetensors"):
        with pytest.raises(fm.RefusedError, match="holds an input"):
            fm.merge_checkpoints(base, [earlier / source], earlier, force=True, progress=False)
    assert (earlier / "mine.safetensors").exists()


def test_inspection_checks_the_output_too(tmp_path: Path) -> None:
    base, models = random_models(1)
    fm.inspect(base, models, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(fm.RefusedError):
        fm.inspect(base, models, out=tmp_path / "out")


def test_empty_tensors_are_merged_to_empty_ones(tmp_path: Path) -> None:
    base, models = random_models(2)
    for state in (base, *models):
        state |= {"none": torch.zeros(0, 8), "nobody": torch.zeros(0), "experts.none": torch.zeros(2, 0, 32)}
    assert fm.merge(base, models)["none"].shape == (0, 8)
    assert fm.merge(base, models, fm.Recipe(select=[("none", "filter")], align=True))["none"].shape == (0, 8)
    fm.merge_checkpoints(base, models, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("value", "recipe", "message"),
    [
        (1e5, fm.Recipe(out_dtype="float16"), "merged model at scale 0.4 in float16: tensor 'w'"),
        (1.0, fm.Recipe(scale=1e300), r"scale 1e\+300 in float32: tensor 'w'"),
        (1e5, fm.Recipe(select=[("w", "copy")], out_dtype="float16"), "tensor 'w' does not fit into float16"),
    ],
)
def test_a_result_out_of_range_is_an_error(value: float, recipe: fm.Recipe, message: str, tmp_path: Path) -> None:
    base, model = ({"w": torch.full((4,), f * value), "x": torch.zeros(1)} for f in (1, 1.1))
    with pytest.raises(fm.CheckpointError, match=message):
        fm.merge_checkpoints(base, [model], tmp_path / "out", recipe, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_custom_mask_is_identified_in_the_manifest(tmp_path: Path) -> None:
    base, model = {"w": torch.zeros(6, 8)}, {"w": torch.ones(6, 8)}
    fm.merge_checkpoints(base, [model], tmp_path / "out", fm.Recipe(fm.Custom(np.ones((6, 8)))), progress=False)
    recipe = json.loads((tmp_path / "out" / "freemerge.json").read_text())["recipe"]
    assert recipe["response"]["type"] == "Custom"
    assert recipe["response"]["mask"].startswith("array (6, 8), blake2b ")


# Real checkpoints


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", ["paper", "official-roberta"])
def test_a_sharded_bf16_llama(tied: bool, preset: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    options = {"vocab_size": 50257, "hidden_size": 48, "intermediate_size": 130}  # the vocabulary of GPT-2
    options |= {"tie_word_embeddings": tied, "pad_token_id": 0}
    base, *models = (llama(tmp_path / str(seed), seed, 1e-3, "3MB", mean=0.3, **options) for seed in range(3))
    (base / "special.txt").write_text("carried over")
    recipe = fm.Recipe.preset(preset)
    out = tmp_path / "merged"
    report = fm.merge_checkpoints(base, models, out, recipe, max_shard_bytes=4_000_000, progress=False)

    merged, states = read(out), [read(folder) for folder in (base, *models)]
    expected = reference(states[0], states[1:], recipe)
    assert sorted(merged) == sorted(states[0])
    assert ("lm_head.weight" in merged) != tied
    for name, tensor in expected.items():
        assert_rounded(merged[name], tensor, states[0][name], allowed=round(2e-4 * tensor.numel()))
    exact = fm.merge(base, models, replace(recipe, compute_dtype="float64"))
    assert all(torch.equal(exact[name], tensor.to(torch.bfloat16)) for name, tensor in expected.items())
    assert any(not torch.equal(merged[name], states[0][name]) for name in merged)
    assert report.inspection.passes == (2 if preset == "paper" else 1)

    assert (out / "special.txt").read_text() == "carried over"
    assert "Merge of" in (out / "README.md").read_text()
    assert (out / "model.safetensors.index.json").exists()
    assert verify(out) == []
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    generated = model.generate(
        torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3), max_new_tokens=3, do_sample=False
    )
    assert generated.shape == (1, 6)

    again = fm.merge_checkpoints(base, [out, models[0]], tmp_path / "again", progress=False)
    assert verify(again.out) == []


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_bytes_for_any_thread_count_and_hash_seed(tmp_path: Path) -> None:
    base, models = random_models(3, torch.bfloat16)
    large = torch.randn(700, 900, generator=torch.Generator().manual_seed(9))
    for i, state in enumerate((base, *models)):
        state["large.weight"] = (large + 0.01 * i * large.flip(0)).bfloat16()
        save_file(state, tmp_path / f"{i}.safetensors")
    script = (
        "import sys, torch, freemerge as fm; torch.set_num_threads(int(sys.argv[1]));"
        "fm.merge_checkpoints(sys.argv[2], sys.argv[3:6], sys.argv[6], fm.Recipe(fm.HighPass(0.05)), progress=False)"
    )
    inputs = [str(tmp_path / f"{i}.safetensors") for i in range(4)]
    for threads, seed in ((1, "0"), (2, "1"), (4, "12345")):
        out = tmp_path / str(threads) / "merged"
        command = [sys.executable, "-c", script, str(threads), *inputs, str(out)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    first = digest(tmp_path / "1" / "merged")
    assert first == digest(tmp_path / "2" / "merged") == digest(tmp_path / "4" / "merged")


def test_a_single_file_output(tmp_path: Path) -> None:
    base, models = random_models(2)
    fm.merge_checkpoints(base, models, tmp_path / "merged.safetensors", progress=False)
    in_memory = fm.merge(base, models)
    for name, tensor in load_file(tmp_path / "merged.safetensors").items():
        assert torch.equal(tensor, in_memory[name])


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    base, models = random_models(1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(fm.RefusedError, match="out"):
        fm.merge_checkpoints(base, models, tmp_path / "out", progress=False)
    with pytest.raises(fm.RefusedError, match=r"no freemerge\.json"):
        fm.merge_checkpoints(base, models, tmp_path / "out", force=True, progress=False)
    assert (tmp_path / "out" / "precious").exists()


def test_an_input_is_never_replaced(tmp_path: Path) -> None:
    base, models = random_models(1)
    fm.merge_checkpoints(base, models, tmp_path / "earlier", progress=False)
    before = digest(tmp_path / "earlier")
    with pytest.raises(fm.RefusedError, match="is an input"):
        fm.merge_checkpoints(base, [tmp_path / "earlier"], tmp_path / "earlier", force=True, progress=False)
    assert digest(tmp_path / "earlier") == before


def test_inspection() -> None:
    base, models = random_models(2)
    recipe = fm.Recipe(fm.Official(0.7), views=[fm.Stack(("*.q.weight", "*.k.weight"))])
    inspection = fm.inspect(base, models, recipe)
    decisions = {decision.name: decision for decision in inspection.decisions}
    assert sorted(decisions) == sorted(base)
    assert decisions["attn.q.weight"].stacked_with == ("attn.q.weight", "attn.k.weight")
    assert decisions["attn.q.weight"].seen_as == ((36, 24),)
    assert decisions["embed.weight"].removed == fm.Official(0.7).removed_fraction((61, 24))
    assert decisions["norm.weight"].removed is None
    floats = sum(tensor.nbytes for tensor in base.values() if tensor.is_floating_point())
    integers = sum(tensor.nbytes for tensor in base.values()) - floats
    assert inspection.read_bytes == 3 * (2 * floats + integers), "statistics need no integers"
    assert inspection.write_bytes == sum(tensor.nbytes for tensor in base.values())
    warning, refusal = fm.inspect(base, models, fm.Recipe(fm.HighPass(2.0))).warnings
    assert "removes the whole spectrum" in refusal
    assert "more than 90%" in warning


@pytest.mark.parametrize("method", ["fr", "tsv_m"])
def test_a_vector_that_a_rule_filters_is_a_row(method: str, tmp_path: Path) -> None:
    base, models = random_models(2)
    recipe = fm.Recipe(method=method, scale=1.0, select=[("norm.weight", "filter")])
    merged = fm.merge(base, models, recipe)
    fm.merge_checkpoints(base, models, tmp_path / "out", recipe, progress=False)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["norm.weight"], merged["norm.weight"])


UNCHANGED = {
    "scale": fm.Recipe(scale=0),
    "weights": fm.Recipe(method="task_arithmetic", weights=(0, 0), layers=[("*", (0, 0))]),
    "density": fm.Recipe(method="ties", density=0),
    "select": fm.Recipe(select=[("*", "copy")]),
    "cutoff": fm.Recipe(fm.HighPass(0.9)),
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_the_base_is_not_published_as_a_merge(name: str, tmp_path: Path) -> None:
    base = {"w": torch.ones(8, 8), "b": torch.ones(8)}
    models = [{key: tensor + i for key, tensor in base.items()} for i in (1, 2)]
    for call in (
        lambda: fm.merge_checkpoints(base, models, tmp_path / "out", UNCHANGED[name], progress=False),
        lambda: fm.inspect(base, models, UNCHANGED[name], out=tmp_path / "out"),
    ):
        with pytest.raises(fm.ArgumentError, match=f"^{name}: "):
            call()
    assert not (tmp_path / "out").exists()
    merged = fm.merge(base, models, UNCHANGED[name])  # one of a series, say, beginning with 0
    assert torch.equal(merged["w"], base["w"]) or name == "cutoff"


def test_a_single_model_that_is_given_back_is_told() -> None:
    base, model = {"w": torch.zeros(8, 8)}, {"w": torch.randn(8, 8)}
    for recipe, told in (
        (fm.Recipe(method="average"), True),
        (fm.Recipe(method="task_arithmetic", scale=1), True),
        (fm.Recipe(method="task_arithmetic"), False),  # at 0.4
        (fm.Recipe(method="average", filter="after"), False),
        (fm.Recipe(method="average", weights=(0.5,)), False),
        (fm.Recipe(), False),
    ):
        assert ("one model: the result is that model" in fm.inspect(base, [model], recipe).warnings) == told
        assert torch.equal(fm.merge(base, [model], recipe)["w"], model["w"]) == told
    assert not fm.inspect(base, [model, {"w": torch.ones(8, 8)}], fm.Recipe(method="average")).warnings


def test_the_copy_of_a_tensor_that_is_dropped_is_dropped(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    base = {"embed_tokens.weight": weight, "lm_head.weight": weight.clone(), "layer.weight": torch.randn(4, 4)}
    model = {name: tensor + 0.1 for name, tensor in base.items() if name != "lm_head.weight"}
    for name, state in (("base", base), ("model", model)):
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "model")]
    recipe = fm.Recipe(select=[("embed_tokens.weight", "drop")])
    assert fm.merge(paths[0], paths[1:], recipe).keys() == {"layer.weight"}
    fm.merge_checkpoints(paths[0], paths[1:], tmp_path / "out.safetensors", recipe, progress=False)
    assert load_file(tmp_path / "out.safetensors").keys() == {"layer.weight"}


def test_inputs_whose_names_are_no_text_are_merged(tmp_path: Path) -> None:
    folders = [tmp_path / os.fsdecode(name) for name in (b"base-\xff", b"model-\xfe")]
    for i, folder in enumerate(folders):
        folder.mkdir()
        save_file({"w": torch.full((4, 4), float(i))}, folder / "model.safetensors")
    fm.merge_checkpoints(folders[0], folders[1:], tmp_path / "out", progress=False)
    assert fm.verify(tmp_path / "out") == []
    manifest = json.loads((tmp_path / "out" / "freemerge.json").read_text(encoding="utf-8"))
    assert manifest["base"]["name"] == folders[0].name


def test_trimming_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 4)}
    for options in ({"beta": 1.0}, {"beta": 0.6, "gamma": 0.4}):
        recipe = fm.Recipe(method="breadcrumbs", **options)
        with pytest.raises(
            fm.ArgumentError, match="beta, gamma: they leave out everything; the merged model is the base"
        ):
            fm.merge_checkpoints(state, [state], tmp_path / "out", recipe, progress=False)


def test_small_tensors_and_copies_are_fetched_before_they_are_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Touching a page of a file that has become too short ends the process."""
    state = {"a": torch.randn(8), "b": torch.randn(8), "mask": torch.ones(8, dtype=torch.int64)}
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        save_file(state, path)
    seen: list[str] = []

    def fetched(tensor: torch.Tensor, source: Checkpoint, name: str) -> torch.Tensor:
        seen.append(str(source.path))
        return tensor

    monkeypatch.setattr("freemerge.merging.engine.fetched", fetched)  # several, end to end
    monkeypatch.setattr("freemerge.merging.pinned.fetched", fetched)
    fm.merge_checkpoints(paths[0], paths[1:], tmp_path / "out", fm.Recipe(method="average"), progress=False)
    assert {seen.count(str(path)) for path in paths} == {3, 2}  # the base once more, to add to
