"""Routed models: every sample as under its own experts, and how many passes that takes."""

import copy
from collections import UserDict, namedtuple
from dataclasses import replace
from typing import Any

import pytest
import torch
from routing import TASKS, Sequences, blobs
from torch import Tensor, nn

from freemerge.errors import ArgumentError
from freemerge.experts import ExpertBank, PooledState, Routed, RoutedModel, Router, extract_experts


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


def by_first_token(ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    return ids[:, :1].float()


def one_expert_a_token(features: Tensor) -> Tensor:
    """Token 0-2 -> that expert; anything else -> the backbone."""
    return nn.functional.one_hot(features[:, 0].long().clamp(max=3), 4)[:, :3].float()


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
    model = RoutedModel(sequences, bank, soft, features=lambda ids: features[: len(ids)])
    for passes in (2, 1):  # the first time, one sample shows that deltas serve this model
        before = sequences.passes
        routed = model(ids)
        assert sequences.passes - before == passes
        torch.testing.assert_close(routed.weights, soft(features))
        assert_rows(bank, sequences, ids, routed)
    before = sequences.passes
    model(ids[:3])  # no more passes than experts
    assert sequences.passes - before == 3


def assert_rows(bank: ExpertBank, model: nn.Module, ids: Tensor, routed: Routed) -> None:
    """Every sample's output is what the model returns for it alone with its mixture switched on."""
    for row, weights in enumerate(routed.weights.tolist()):
        with bank.active(dict(zip(routed.tasks, weights, strict=True))):
            alone = model(ids[row : row + 1])["logits"][0]
        torch.testing.assert_close(routed.output["logits"][row], alone, rtol=1e-5, atol=1e-5)


class SequenceFirst(Sequences):
    """Token by token inside: with as many tokens as samples, nothing but a pass of one sample tells the two apart."""

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> dict[str, Tensor | None]:
        self.passes += 1
        states = torch.tanh(self.mix(self.embed(ids).transpose(0, 1)))
        return {"logits": self.head(states.mean(0)), "loss": None}


class Functional(Sequences):
    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None) -> dict[str, Tensor | None]:
        self.passes += 1
        states = nn.functional.linear(self.embed(ids), self.mix.weight) + self.mix(self.embed(ids))
        return {"logits": self.head(torch.tanh(states).mean(1)), "loss": None}


@pytest.mark.parametrize("kind", [SequenceFirst, Functional])
def test_models_that_deltas_would_get_wrong_are_switched(kind: type[Sequences], router: Router) -> None:
    torch.manual_seed(4)
    model = kind().eval()
    bank = make_bank(model, TASKS)
    soft = replace(router, mode="softmax", temperature=20.0)
    features, _ = blobs(6, seed=9)
    routed_model = RoutedModel(model, bank, soft, features=lambda ids: features)
    ids = torch.arange(36).view(6, 6) % 11
    for passes in (7, 6):
        before = model.passes
        routed = routed_model(ids)
        assert model.passes - before == passes
        assert_rows(bank, model, ids, routed)


class Shortcut(Sequences):
    """It computes with a parameter itself where a keyword says so, or in training."""

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None, fast: bool = False) -> dict[str, Any]:
        self.passes += 1
        states = self.embed(ids)
        states = nn.functional.linear(states, self.mix.weight) if fast or self.training else self.mix(states)
        return {"logits": self.head(torch.tanh(states).mean(1)), "loss": None}


def test_each_way_through_the_modules_is_looked_at(router: Router) -> None:
    torch.manual_seed(4)
    model = Shortcut().eval()
    bank = make_bank(model, TASKS)
    features, _ = blobs(6, seed=9)
    routed = RoutedModel(
        model, bank, replace(router, mode="softmax", temperature=20.0), features=lambda ids, fast=False: features
    )
    ids = torch.arange(36).view(6, 6) % 11
    for fast, training, passes in (
        (False, False, 2),
        (True, False, 7),
        (False, True, 7),
        (False, False, 1),
        (True, False, 6),
        (False, True, 6),
    ):
        model.train(training)
        before = model.passes
        result = routed(ids, fast=fast)
        assert model.passes - before == passes
        for row, weights in enumerate(result.weights.tolist()):
            with bank.active(dict(zip(result.tasks, weights, strict=True))):
                alone = model(ids[row : row + 1], fast=fast)["logits"][0]
            torch.testing.assert_close(result.output["logits"][row], alone, rtol=1e-5, atol=1e-5)


def test_replacing_experts_are_switched(sequences: Sequences) -> None:
    bank = make_bank(sequences, TASKS)
    base = {name: value.detach().clone() for name, value in sequences.named_parameters()}
    bank = ExpertBank(sequences, dict(bank), base=base)
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(30).view(5, 6) % 11
    RoutedModel(sequences, bank, lambda _: weights, features=by_first_token, combine="replace")(ids)
    assert sequences.passes == 5


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


def test_a_copy_serves_from_a_model_of_its_own(router: Router, sequences: Sequences) -> None:
    bank = make_bank(sequences, TASKS)
    ids = torch.arange(12).view(2, 6) % 11
    routed = RoutedModel(sequences, bank, replace(router, mode="softmax"), features="embed")
    other = copy.deepcopy(routed)
    before, passes = routed(ids), sequences.passes
    with torch.no_grad():
        torch.testing.assert_close(other(ids).output, before.output)
        sequences.embed.weight.zero_()
        torch.testing.assert_close(other(ids).output, before.output)
    assert sequences.passes == passes


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


def test_mappings_keep_their_type() -> None:
    class Batch(UserDict[str, Tensor]):
        """With attributes, as transformers' BatchEncoding has."""

        @property
        def x(self) -> Tensor:
            return self["x"]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, batch: Batch) -> Batch:
            return Batch(x=self.weight * batch.x)

    model, x = Model(), torch.arange(4.0)
    bank = make_bank(model, ("a", "b"))
    weights = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    batch = Batch(x=x)
    output = RoutedModel(model, bank, lambda _: weights, features=lambda batch: batch.x[:, None])(batch).output
    factors = [1 + float(bank[name].dense()["weight"]) if name else 1.0 for name in ("b", "a", None, "b")]
    assert isinstance(output, Batch)
    torch.testing.assert_close(output.x, torch.tensor(factors) * x)
    assert batch.x is x


def test_a_model_that_is_compiled_later_is_switched() -> None:
    """Its graph, made before, does not know of what deltas hook to the modules."""
    torch.manual_seed(5)
    model = Vision().eval()
    bank = make_bank(model, ("a", "b"))
    images, weights = torch.rand(5, 3, 8, 8), torch.rand(5, 2)
    routed = RoutedModel(model, bank, lambda _: weights, features=lambda images: images)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = routed(images).output
        routed.model = torch.compile(model, backend="eager")
        routed.model(images)
        torch.testing.assert_close(routed(images).output, expected, rtol=1e-5, atol=1e-5)


def test_misfits_are_named(router: Router, sequences: Sequences) -> None:
    bank = make_bank(sequences, TASKS[:2])
    with pytest.raises(ArgumentError, match="'birds'"):
        RoutedModel(sequences, bank, router, features="embed")
    wide = RoutedModel(sequences, bank, lambda features: torch.ones(len(features), 3), features=by_first_token)
    with pytest.raises(ArgumentError, match=r"expected weights \(2, 2\), got \(2, 3\)"):
        wide(torch.zeros(2, 3, dtype=torch.long))
    other = copy.deepcopy(sequences)
    with pytest.raises(ArgumentError, match="model must be the one that the bank is attached to"):
        RoutedModel(other, bank, lambda f: f, features=by_first_token)
    assert RoutedModel(nn.DataParallel(sequences), bank, lambda f: f, features=by_first_token)
    with pytest.raises(ArgumentError, match="router must return a tensor, got list"):
        RoutedModel(sequences, bank, lambda f: [1.0, 0.0], features=by_first_token)(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ArgumentError, match="features must return a tensor, got NoneType"):
        RoutedModel(sequences, bank, lambda f: f, features=lambda x: None)(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ArgumentError, match="features must return a tensor with a row for each sample"):
        RoutedModel(sequences, bank, lambda f: f, features=lambda x: torch.tensor(1.0))(torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match="empty"):
        RoutedModel(sequences, bank, lambda f: torch.ones(len(f), 2), features=by_first_token)(
            torch.zeros(0, 3, dtype=torch.long)
        )


def test_a_bank_without_experts_cannot_be_routed(sequences: Sequences) -> None:
    with pytest.raises(ArgumentError, match="bank has no experts"):
        RoutedModel(sequences, ExpertBank(sequences, {}), lambda x: x[:, :0], features=by_first_token)


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


def test_outputs_of_different_forms_cannot_be_joined() -> None:
    class Varied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.kind = nn.Parameter(torch.ones(1)), ""

        def forward(self, x: Tensor) -> object:
            one = len(x) == 1
            if self.kind == "list":  # an element a sample, as of detectors
                return [*(x * self.weight)]
            if self.kind == "dict":
                return {"x": x} if one else {"x": x, "y": x}
            return None if one else x

    model = Varied()
    tasks = torch.eye(2)[[0, 1, 0]]
    routed = RoutedModel(model, make_bank(model, ("a", "b")), lambda f: tasks, features=lambda x: x)
    for model.kind, message in (
        ("list", "list of different"),
        ("dict", "dict of different"),
        ("", "NoneType and Tensor|Tensor and NoneType"),
    ):
        with pytest.raises(ArgumentError, match=message):
            routed(torch.ones(3, 2))
