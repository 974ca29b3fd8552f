"""Routers, feature extractors and routed models."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from freemerge.errors import ArgumentError, CheckpointError
from freemerge.experts import ExpertBank, PooledState, RoutedModel, Router, extract_experts
from freemerge.experts.router import pooled

TASKS = ("cats", "dogs", "birds")


def blobs(count: int, seed: int, spread: float = 0.5) -> tuple[Tensor, list[str]]:
    """Features around three fixed centres in 6-D, far from standardised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (count,), generator=generator)
    centres = torch.eye(6)[:3] * 4
    features = centres[ids] + spread * torch.randn(count, 6, generator=generator)
    return 100 * features + 1000, [TASKS[i] for i in ids]


@pytest.fixture(scope="module")
def router() -> Router:
    return Router.fit(*blobs(150, seed=0), hidden=16, steps=100)


def test_a_fitted_router_tells_held_out_tasks_apart(router: Router) -> None:
    features, ids = blobs(300, seed=1)
    chosen = [router.tasks[column] for column in router(features).argmax(1).tolist()]
    assert sum(a == b for a, b in zip(chosen, ids, strict=True)) >= 297
    assert sorted(router.tasks) == sorted(TASKS)


def test_top1_is_one_hot_and_softmax_has_the_temperature(router: Router) -> None:
    features, _ = blobs(40, seed=2)
    hard = router(features)
    assert torch.equal(hard.sum(1), torch.ones(40))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    soft = replace(router, mode="softmax", temperature=3.0)(features)
    torch.testing.assert_close(soft, torch.softmax(router.logits(features).double() / 3, 1).float())


def test_a_router_abstains_between_the_tasks(router: Router) -> None:
    careful = replace(router, abstain=0.9, temperature=2.0)
    features, _ = blobs(100, seed=3)
    far_between = torch.cat([features, features.mean(0, keepdim=True)])
    probabilities = torch.softmax(router.logits(far_between) / 2, 1).amax(1)
    weights = careful(far_between)
    assert torch.equal(weights.sum(1) == 0, probabilities < 0.9)
    assert weights[-1].tolist() == [0.0, 0.0, 0.0]
    assert (weights.sum(1) == 1).any()


def test_fitting_depends_on_its_arguments_only() -> None:
    features, ids = blobs(60, seed=4)
    torch.manual_seed(0)
    first = Router.fit(features, ids, hidden=8, steps=20)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    second = Router.fit(features, ids, hidden=8, steps=20)
    other = Router.fit(features, ids, hidden=8, steps=20, seed=9)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first.tensors[name], tensor) for name, tensor in second.tensors.items())
    assert not torch.equal(first.tensors["hidden.weight"], other.tensors["hidden.weight"])


def test_fitting_works_without_gradients_around_it() -> None:
    with torch.no_grad():
        assert not Router.fit(*blobs(30, seed=5), hidden=4, steps=5).tensors["output.bias"].requires_grad


def test_a_constant_feature_is_harmless() -> None:
    features, ids = blobs(60, seed=6)
    features[:, 3] = 7.0
    assert torch.isfinite(Router.fit(features, ids, hidden=8, steps=20).logits(features)).all()


def test_saving_and_loading(router: Router, tmp_path: Path) -> None:
    options = replace(router, mode="softmax", temperature=2.0, abstain=0.25)
    options.save(tmp_path / "router.safetensors")
    loaded = Router.load(tmp_path / "router.safetensors")
    features, _ = blobs(20, seed=7)
    assert torch.equal(loaded(features), options(features))
    assert (loaded.tasks, loaded.mode, loaded.temperature, loaded.abstain) == (options.tasks, "softmax", 2.0, 0.25)
    assert [path.name for path in tmp_path.iterdir()] == ["router.safetensors"]


def test_files_that_are_no_routers_are_refused(router: Router, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        Router.load(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_bytes(b"not a router at all")
    with pytest.raises(CheckpointError, match="text"):
        Router.load(tmp_path / "text")
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(CheckpointError, match="format is None"):
        Router.load(tmp_path / "weights")
    save_file({"x": torch.zeros(2)}, tmp_path / "empty", metadata={"format": "freemerge-router-1"})
    with pytest.raises(CheckpointError, match="options"):
        Router.load(tmp_path / "empty")
    Router(router.tasks[:2], router.tensors).save(tmp_path / "short")
    with pytest.raises(CheckpointError, match=r"output\.weight must have shape \(2, 16\)"):
        Router.load(tmp_path / "short")
    broken = {**router.tensors, "hidden.bias": torch.full_like(router.tensors["hidden.bias"], float("nan"))}
    Router(router.tasks, broken).save(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"hidden\.bias must hold finite floats"):
        Router.load(tmp_path / "broken")
    Router(router.tasks, {"center": torch.zeros(3)}).save(tmp_path / "poor")
    with pytest.raises(CheckpointError, match="tensors must be"):
        Router.load(tmp_path / "poor")


def test_bad_arguments_are_named(router: Router) -> None:
    features, ids = blobs(10, seed=8)
    with pytest.raises(ArgumentError, match="task_ids"):
        Router.fit(features, ids[:9])
    with pytest.raises(ArgumentError, match="hidden and steps"):
        Router.fit(features, ids, hidden=0)
    with pytest.raises(ArgumentError, match="finite"):
        Router.fit(torch.full((10, 6), float("nan")), ids)
    with pytest.raises(ArgumentError, match=r"\(N, D\)"):
        Router.fit(torch.zeros(10), ids)
    with pytest.raises(ArgumentError, match=r"\(N, 6\)"):
        router(torch.zeros(4, 5))
    with pytest.raises(ArgumentError, match="finite"):
        router(torch.full((1, 6), float("inf")))
    for name, value in (("temperature", 0.0), ("abstain", 1.5), ("mode", "x")):
        with pytest.raises(ArgumentError, match=name):
            replace(router, **{name: value})


class Sequences(nn.Module):
    """Token ids (N, T) -> embeddings -> logits (N, 4), with a mask, as text classifiers are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.passes = 0

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> dict[str, Tensor | None]:
        states = self.embed(ids)
        self.passes += 1
        states = torch.tanh(self.mix(states))
        return {"logits": self.head(pooled(states, attention_mask, "mean")), "loss": None}


class Vision(nn.Module):
    """Images (N, 3, 8, 8) -> logits (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = torch.relu(self.norm(self.conv(images))).mean((2, 3))
        return self.head(features)


def make_bank(model: nn.Module, names: tuple[str, ...]) -> ExpertBank:
    """Experts that move half of every tensor's entries by about one."""
    generator = torch.Generator().manual_seed(0)
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}
    models = {
        name: {key: tensor + torch.randn(tensor.shape, generator=generator) for key, tensor in base.items()}
        for name in names
    }
    return ExpertBank(model, extract_experts(base, models, density=0.5, rescale=1.0, values="fp32"))


@pytest.fixture
def sequences() -> Sequences:
    torch.manual_seed(3)
    return Sequences().eval()


def by_first_token(ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return ids[:, :1].float()


def one_expert_a_token(features: Tensor) -> Tensor:
    """Token 0-2 -> that expert; anything else -> the backbone."""
    return nn.functional.one_hot(features[:, 0].long().clamp(max=3), 4)[:, :3].float()


def test_pooled_state_stops_at_the_submodule_and_leaves_out_padding(sequences: Sequences) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    features = PooledState(sequences, "embed")(ids, attention_mask=mask)
    table = sequences.embed.weight.detach()
    torch.testing.assert_close(features, torch.stack([table[[1, 2, 3]].mean(0), table[[4, 5]].mean(0)]))
    torch.testing.assert_close(PooledState(sequences, "embed", "first")(ids), table[[1, 4]])
    assert sequences.passes == 0
    assert not sequences.embed._forward_hooks
    sequences(ids)
    assert sequences.passes == 1


def test_pooled_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 4, generator=generator)
    torch.testing.assert_close(pooled(images, None, "mean"), images.flatten(2).mean(2))
    rows = torch.randn(2, 3, generator=generator)
    assert torch.equal(pooled(rows, None, "mean"), rows)
    assert pooled(rows.bfloat16(), None, "mean").dtype == torch.float32
    with pytest.raises(ArgumentError, match="dimensions"):
        pooled(torch.zeros(3), None, "mean")


def test_pooled_state_of_a_module_with_a_tuple_output() -> None:
    model = nn.Sequential(nn.GRU(4, 5, batch_first=True))
    states = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(PooledState(model, "0")(states), model[0](states)[0].detach().mean(1))


def test_pooled_state_names_what_is_wrong(sequences: Sequences) -> None:
    with pytest.raises(ArgumentError, match=r"'nothing\.here'"):
        PooledState(sequences, "nothing.here")
    with pytest.raises(ArgumentError, match="pool"):
        PooledState(sequences, "embed", "max")  # type: ignore[arg-type]
    sequences.unused = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="'unused'"):
        PooledState(sequences, "unused")(torch.zeros(1, 2, dtype=torch.long))
    assert not sequences.unused._forward_hooks


def test_a_routed_batch_equals_each_sample_under_its_expert_alone(sequences: Sequences) -> None:
    bank = make_bank(sequences, TASKS)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, (17, 6), generator=generator)
    mask = (torch.rand(17, 6, generator=generator) < 0.8).long()
    mask[:, 0] = 1
    before = {name: tensor.clone() for name, tensor in sequences.state_dict().items()}
    routed = RoutedModel(sequences, bank, one_expert_a_token, features=by_first_token)(ids, attention_mask=mask)
    assert sequences.passes == 4  # three experts and the backbone, once each
    assert routed.output["loss"] is None
    for row in range(17):
        expert = TASKS[int(ids[row, 0])] if ids[row, 0] < 3 else None
        assert routed.served[row] == expert
        with bank.active({} if expert is None else expert):
            alone = sequences(ids[row : row + 1], attention_mask=mask[row : row + 1])["logits"]
        torch.testing.assert_close(routed.output["logits"][row], alone[0], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sequences.state_dict().items())


def test_soft_mixtures_sample_by_sample(router: Router, sequences: Sequences) -> None:
    bank = make_bank(sequences, TASKS)
    soft = replace(router, mode="softmax", temperature=20.0)
    features, _ = blobs(5, seed=9)
    ids = torch.arange(30).view(5, 6) % 11
    routed = RoutedModel(sequences, bank, soft, features=lambda ids: features)(ids)
    torch.testing.assert_close(routed.weights, soft(features))
    for row in range(5):
        with bank.active(dict(zip(soft.tasks, soft(features)[row].tolist(), strict=True))):
            torch.testing.assert_close(routed.output["logits"][row], sequences(ids[row : row + 1])["logits"][0])


def test_a_routed_vision_model_with_features_by_name() -> None:
    torch.manual_seed(5)
    model = Vision().eval()
    bank = make_bank(model, ("light", "dark"))
    images = torch.rand(12, 3, 8, 8)
    images[::3] += 4
    features = PooledState(model, "conv")(images)
    router = Router.fit(features, ["light" if row % 3 == 0 else "dark" for row in range(12)], hidden=8, steps=60)
    routed = RoutedModel(model, bank, router, features="conv")(images)
    assert routed.served == tuple("light" if row % 3 == 0 else "dark" for row in range(12))
    for row, expert in enumerate(routed.served):
        assert expert is not None
        with bank.active(expert):
            torch.testing.assert_close(routed.output[row], model(images[row : row + 1])[0], rtol=1e-5, atol=1e-5)


def test_structures_come_back_as_they_were() -> None:
    Pair = namedtuple("Pair", "first second")

    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, pair: list[Tensor] | Pair, scale: Tensor) -> Pair:
            return Pair(self.weight * pair[0] * scale, [pair[1], (pair[0],)])

    model = Structured()
    bank = make_bank(model, ("a", "b"))
    first, second = torch.arange(4.0), torch.arange(8.0).view(4, 2)
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    routed = RoutedModel(model, bank, lambda _: weights, features=lambda pair, scale: pair[0][:, None])
    factors = [1 + float(bank[name].dense()["weight"]) if name else 1.0 for name in ("b", "a", None, "b")]
    for pair in ([first, second], Pair(first, second)):
        output = routed(pair, torch.tensor(2.0)).output
        assert isinstance(output, Pair)
        torch.testing.assert_close(output.first, torch.tensor(factors) * first * 2)
        assert torch.equal(output.second[0], second)
        assert torch.equal(output.second[1][0], first)


def test_misfits_are_named(router: Router, sequences: Sequences) -> None:
    bank = make_bank(sequences, TASKS[:2])
    with pytest.raises(ArgumentError, match="'birds'"):
        RoutedModel(sequences, bank, router, features="embed")
    wide = RoutedModel(sequences, bank, lambda features: torch.ones(len(features), 3), features=by_first_token)
    with pytest.raises(ArgumentError, match=r"expected weights \(2, 2\), got \(2, 3\)"):
        wide(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ArgumentError, match="empty"):
        RoutedModel(sequences, bank, lambda f: torch.ones(len(f), 2), features=by_first_token)(
            torch.zeros(0, 3, dtype=torch.long)
        )


def test_a_model_that_sums_over_the_batch_cannot_be_routed(sequences: Sequences) -> None:
    class Summing(nn.Module):
        def __init__(self, result: object) -> None:
            super().__init__()
            self.weight, self.result = nn.Parameter(torch.ones(1)), result

        def forward(self, x: Tensor) -> object:
            return self.result if self.result is not None else x.sum()

    for result, message in ((None, "shape"), ("text", "str")):
        model = Summing(result)
        routed = RoutedModel(model, make_bank(model, ("a",)), lambda f: torch.ones(len(f), 1), features=lambda x: x)
        with pytest.raises(ArgumentError, match=message):
            routed(torch.ones(3, 2))


def test_a_routed_transformers_classifier() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    bank = make_bank(model, ("a", "b"))
    ids = torch.randint(1, 50, (9, 7))
    mask = (torch.arange(7) < torch.randint(2, 8, (9, 1))).long()
    features = PooledState(model, "bert.embeddings")(input_ids=ids, attention_mask=mask)
    router = Router.fit(features, ["a", "b", "a"] * 3, hidden=32, steps=80)
    with torch.no_grad():
        routed = RoutedModel(model, bank, router, features="bert.embeddings")(input_ids=ids, attention_mask=mask)
        assert isinstance(routed.output, transformers.modeling_outputs.SequenceClassifierOutput)
        assert routed.served == ("a", "b", "a") * 3
        for row, expert in enumerate(routed.served):
            assert expert is not None
            with bank.active(expert):
                alone = model(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).logits[0]
            torch.testing.assert_close(routed.output.logits[row], alone, rtol=1e-5, atol=1e-5)
