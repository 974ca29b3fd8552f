"""Experts in the forward pass: agreement with switching, and what cannot be served."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from expert_models import (
    TASKS,
    Text,
    Vision,
    assert_forward_adds_what_active_does,
    assert_same,
    make,
    snapshot,
    tuned,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import freemerge.experts as fx
from freemerge.errors import ArgumentError


@pytest.mark.parametrize("kind", [Text, Vision])
def test_a_mixed_batch_in_delta_mode_equals_each_sample_under_its_expert(kind: Callable[[], nn.Module]) -> None:
    model, experts, _ = make(kind)
    bank = fx.ExpertBank(model, experts)
    generator = torch.Generator().manual_seed(5)
    x = (
        torch.randint(50, (6, 11), generator=generator)
        if kind is Text
        else torch.randn(6, 3, 8, 8, generator=generator)
    )
    assignment = ["task3", None, "task0", "task3", {"task1": 0.4, "task2": 0.6}, {}]
    before = snapshot(model)
    with torch.no_grad():
        expected = []
        for sample, chosen in zip(x, assignment, strict=True):
            with bank.active(chosen or {}):
                expected.append(model(sample[None]))
        with bank.deltas(assignment):
            out = model(x)
            assert_same(model, before)
        torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-5)
        alone = model(x)
        with bank.deltas([None] * 6):
            assert torch.equal(model(x), alone)
    assert not any(module._forward_hooks for module in model.modules())


def test_delta_mode_names_what_it_cannot_serve() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    state = tuned(attention, 1)
    experts = fx.extract_experts(attention.state_dict(), {"t": state}, density=0.1)
    bank = fx.ExpertBank(attention, experts)
    with pytest.raises(ArgumentError, match="deltas cannot serve 'in_proj_bias': it belongs to a MultiheadAttention"):
        bank.deltas(["t"]).__enter__()

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    scaled = Scaled(4, 4)
    experts = fx.extract_experts(scaled.state_dict(), {"t": tuned(scaled, 1)})
    with pytest.raises(ArgumentError, match="it belongs to a Scaled"):
        fx.ExpertBank(scaled, experts).deltas(["t"]).__enter__()
    model, experts, _ = make(Vision)
    bank = fx.ExpertBank(model, experts)
    with pytest.raises(ArgumentError, match="first dimension should be the batch, 3"), bank.deltas(["task0"] * 3):
        model(torch.zeros(2, 3, 8, 8))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x)

    named = Named().eval()
    its = fx.ExpertBank(named, fx.extract_experts(named.state_dict(), {"t": tuned(named, 1)}))
    with pytest.raises(ArgumentError, match="'norm' got NoneType where the first dimension"), its.deltas(["t"]):
        named(torch.zeros(1, 3))
    model.train()
    with pytest.raises(ArgumentError, match=r"use model\.eval"), bank.deltas(["task0"] * 2):
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ArgumentError, match="attached to a module"):
        fx.ExpertBank(model.state_dict(), experts).deltas(["task0"]).__enter__()
    with pytest.raises(ArgumentError, match="no expert 'poetry'"):
        bank.serves_deltas(["poetry"])
    for wrong in ("task0", 3):
        with pytest.raises(ArgumentError, match="tasks must be a list of names"):
            bank.serves_deltas(wrong)  # type: ignore[arg-type]

    class Shifted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("shift", torch.zeros(4))

    shifted = Shifted()
    experts = fx.extract_experts(shifted.state_dict(), {"t": tuned(shifted, 1)})
    assert (
        fx.ExpertBank(shifted, experts).serves_deltas()
        == "deltas cannot serve 'shift': it is not a parameter, nor a batch norm's"
    )


@given(
    weights=st.lists(st.lists(st.sampled_from([0.0, 0.3, 1.0, -0.7]), min_size=3, max_size=3), min_size=1, max_size=5),
    kind=st.sampled_from([Text, Vision]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=30)
def test_any_weights_agree_with_switching_to_rounding(
    weights: list[list[float]], kind: Callable[[], nn.Module], dtype: torch.dtype
) -> None:
    model, experts, _ = make(kind, dtype)
    bank = fx.ExpertBank(model, experts)
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(50, (len(weights), 4), generator=generator)
    if kind is Vision:
        x = torch.randn(len(weights), 3, 8, 8, generator=generator).to(dtype)
    mixtures = [dict(zip(TASKS, row, strict=False)) for row in weights]
    with torch.no_grad():
        expected = []
        for sample, mixture in zip(x, mixtures, strict=True):
            with bank.active(mixture):
                expected.append(model(sample[None]))
        with bank.deltas(mixtures):
            out = model(x)
    error = float((out - torch.cat(expected)).norm() / torch.cat(expected).norm())
    assert out.dtype == dtype
    assert error < {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.05}[dtype]


class Functional(Text):
    """The head as a function of the embedding's weight."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None]))
        return nn.functional.linear(self.down(torch.relu(self.up(x))), self.tokens.weight)


class Fused(Text):
    """Two layers as one, from the weights of both."""

    def forward(self, ids: Tensor) -> Tensor:
        self.down(torch.relu(self.up(self.norm(self.tokens(ids)))))
        both = torch.cat([self.up.weight, self.down.weight.T])
        return self.head(nn.functional.linear(self.positions(torch.arange(ids.shape[1])[None]), both)[..., :24])


class SequenceFirst(Text):
    def forward(self, ids: Tensor) -> Tensor:
        x = (self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])).transpose(0, 1)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x))))).transpose(0, 1)


class Flat(Text):
    def forward(self, ids: Tensor) -> Tensor:
        x = (self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])).flatten(0, 1)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x))))).view(*ids.shape, -1)


class Idle(Text):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])))


class Curious(Text):
    """Looks at a weight without using its values."""

    def forward(self, ids: Tensor) -> Tensor:
        assert self.up.weight.dtype == self.tokens.weight.dtype
        assert len(self.up.weight.shape) == self.up.weight.dim() == 2
        return super().forward(ids)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Text, None),
        (Curious, None),
        (Functional, "'tokens.weight': it is used outside of its module"),
        (Fused, "'down.weight': it is used outside of its module"),
        (SequenceFirst, "'norm.weight': its module does not get the batch in front"),
        (Flat, "'norm.weight': its module does not get the batch in front"),
        (Idle, "'down.weight': its module is not called"),
    ],
)
def test_a_pass_of_one_sample_shows_what_the_modules_do_not_tell(kind: Callable[[], nn.Module], reason: str) -> None:
    model, experts, _ = make(kind)
    bank = fx.ExpertBank(model, experts)
    assert bank.serves_deltas() is None
    found = bank.serves_deltas(["task1"], lambda: model(torch.arange(7)[None]))
    assert found == (None if reason is None else f"deltas cannot serve {reason}")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_of_others_work_on_what_experts_have_changed() -> None:
    model, experts, _ = make(Vision)
    hooks = [
        model[0].register_forward_hook(lambda module, args, output: output * 2),
        model[0].register_forward_pre_hook(lambda module, args: (args[0] - 1,)),
        model[6].register_forward_hook(lambda module, args, output: output.relu()),
    ]
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert_forward_adds_what_active_does(model, fx.ExpertBank(model, experts), x, ["task0", None, "task1"])
    assert [len(model[i]._forward_hooks) for i in (0, 6)] == [1, 1]
    for hook in hooks:
        hook.remove()


def test_a_forward_that_was_replaced_is_not_served() -> None:
    model, experts, _ = make(Vision)
    bank = fx.ExpertBank(model, experts)
    forward = model[6].forward
    model[6].forward = lambda x: 2 * forward(x)
    assert bank.serves_deltas() == "deltas cannot serve '6.bias': it belongs to a Linear, whose forward was replaced"
    model[6]._old_forward = forward  # as accelerate has it, which computes the same, on the right device
    assert bank.serves_deltas() is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("rewrite", "name"),
    [
        (lambda module: prune.identity(module, "weight"), "weight_orig"),
        (nn.utils.weight_norm, "weight_g"),
        (nn.utils.spectral_norm, "weight_orig"),
    ],
)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_what_a_module_makes_its_weight_of_is_not_served(
    kind: type[nn.Module], rewrite: Callable[[nn.Module], object], name: str
) -> None:
    model = nn.Sequential(kind(4, 4)).eval()
    rewrite(model[0])
    held = dict(model.named_parameters())
    state = {key: tensor + 1 if key in held else tensor for key, tensor in model.state_dict().items()}
    bank = fx.ExpertBank(model, fx.extract_experts(model, {"t": state}))
    reason = f"deltas cannot serve '0.{name}': it is neither weight nor bias of its {kind.__name__}"
    assert bank.serves_deltas() == reason


@pytest.mark.parametrize("tie", ["parameter", "assigned"])
def test_weights_are_tied_by_their_memory(tie: str) -> None:
    """Two parameters over it, as load_state_dict(assign=True) makes them, are changed as one, and used as one."""
    model, experts, _ = make(Text)
    if tie == "parameter":
        model.head.weight = nn.Parameter(model.tokens.weight)
    else:
        model.load_state_dict(model.state_dict(), assign=True)
    assert model.head.weight is not model.tokens.weight
    bank = fx.ExpertBank(model, experts)
    assert_forward_adds_what_active_does(model, bank, torch.arange(20).view(2, 10), ["task0", "task1"])
    x, table = torch.arange(10)[None], nn.Parameter(model.tokens.weight)
    assert bank.serves_deltas(run=lambda: model(x)) is None
    reason = bank.serves_deltas(run=lambda: (model(x), table.sum()))
    assert reason == "deltas cannot serve 'tokens.weight': it is used outside of its module"


def test_weights_that_overlap_others_are_not_served() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12, bias=False), "k": nn.Linear(4, 4, bias=False)})
    model["k"].weight = nn.Parameter(model["qkv"].weight[4:8])
    state = {"k.weight": torch.zeros(4, 4)}
    bank = fx.ExpertBank(model, fx.extract_experts(state, {"t": {"k.weight": torch.ones(4, 4)}}))
    reason = "deltas cannot serve 'k.weight': it has a part of its memory in common with 'qkv.weight'"
    assert bank.serves_deltas() == reason


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Lazy modules")
def test_tensors_without_memory_elsewhere_in_the_model_are_no_obstacle() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "lazy": nn.LazyLinear(3)})
    model.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    state = {f"used.{name}": tensor for name, tensor in model["used"].state_dict().items()}
    bank = fx.ExpertBank(model, fx.extract_experts(state, {"t": {name: x + 1 for name, x in state.items()}}))
    assert bank.serves_deltas(run=lambda: model["used"](torch.ones(1, 4))) is None
    with bank.deltas(["t"]):
        model["used"](torch.ones(1, 4))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_inputs_adds_its_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    state = {"1.bias": torch.zeros(2)}
    experts = fx.extract_experts(state, {"t": {"1.bias": torch.ones(2)}})
    x = torch.ones(2, 5, 3)
    bank = fx.ExpertBank(model, experts)
    with torch.no_grad(), bank.active("t"):
        expected = model(x)
    with torch.no_grad(), bank.deltas(["t", None]):
        out = model(x)
    assert torch.equal(out[0], expected[0])
    assert torch.equal(out[1], model(x)[1])


def test_statistics_do_not_overflow_where_those_of_the_expert_do_not() -> None:
    """The merged model's variance is ten million times the expert's: no input of half precision makes up for that."""
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    base = snapshot(model)
    models = {"t": {**base, "0.running_var": torch.full((4,), 1e-3), "0.weight": torch.full((4,), 0.5)}}
    model[0].running_var.fill_(1e4)
    experts = fx.extract_experts(base, models, values="mask", backbone=model)
    bank = fx.ExpertBank(model.half(), experts, base=base)
    x = torch.tensor([[50.0, 30.0, -50.0, 0.1]]).half()
    with torch.no_grad(), bank.active("t"):
        expected = model(x)
    with torch.no_grad(), bank.deltas(["t"]):
        torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)
    assert expected.isfinite().all()


def test_blocks_within_each_other_do_not_lose_statistics_silently() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    base = snapshot(model)
    moved = {**base, "1.running_mean": torch.ones(4), "1.weight": torch.full((4,), 2.0)}
    scaled = {**base, "1.weight": torch.full((4,), 3.0), "0.weight": torch.ones(4, 3)}
    experts = fx.extract_experts(base, {"moved": moved, "scaled": scaled}, density=0.5)
    experts["scaled"] = experts["again"] = replace(experts["scaled"], statistics={})
    bank = fx.ExpertBank(model, experts)
    for outer, inner in (("moved", "scaled"), ("scaled", "moved"), ("moved", "moved")):
        with bank.deltas([outer]), pytest.raises(ArgumentError, match="'1' has statistics of samples"):
            bank.deltas([inner]).__enter__()
    x = torch.ones(1, 3)
    with torch.no_grad():
        with bank.active("scaled"), bank.active("again"):
            expected = model(x)
        with bank.deltas(["scaled"]), bank.deltas(["again"]):
            torch.testing.assert_close(model(x), expected)
        assert not any(module._forward_hooks for module in model.modules())


def test_products_are_not_rounded_under_autocast() -> None:
    """A difference of one in a thousand, which factors of 16 bits do not have."""
    base, tuned = {"weight": torch.zeros(1, 4)}, {"weight": torch.tensor([[1.0, -1.0, 0.0, 0.0]])}
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    experts = {
        "entries": fx.extract_experts(base, {"t": tuned}, density=0.75, rescale=1.0)["t"],
        "low rank": fx.extract_experts(base, {"t": tuned}, backbone=base, rank=1, values="svd16")["t"],
    }
    bank = fx.ExpertBank(model, experts)
    x = torch.tensor([[1 + 2**-10, 1.0, 0.0, 0.0]] * 2)
    with torch.no_grad(), bank.deltas(["entries", "low rank"]), torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    torch.testing.assert_close(out, torch.full((2, 1), 2**-10, dtype=torch.bfloat16), rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", [Text, Vision])
def test_a_copy_made_in_the_block_is_a_backbone_after_it(kind: Callable[[], nn.Module]) -> None:
    model, experts, _ = make(kind)
    x = torch.arange(12).view(2, 6) if kind is Text else torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        with fx.ExpertBank(model, experts).deltas(["task0", "task1"]):
            made = copy.deepcopy(model)
            assert torch.equal(made(x), model(x))
        assert torch.equal(made(x[:1]), model(x[:1]))


def test_gradients_go_through_deltas() -> None:
    model, experts, _ = make(Text)
    ids = torch.arange(12).view(2, 6)
    with fx.ExpertBank(model, experts).deltas(["task0", {"task0": 0.5, "task1": 0.5}]):
        model(ids).sum().backward()
    gradient = model.get_parameter("up.weight").grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


def test_a_transformers_text_classifier() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    base = model.state_dict()
    experts = fx.extract_experts(base, {task: tuned(model, i + 1) for i, task in enumerate(TASKS)}, density=0.05)
    bank = fx.ExpertBank(model, experts)
    before = snapshot(model)
    ids = torch.randint(60, (4, 9), generator=torch.Generator().manual_seed(1))
    assignment = ["task1", "task0", None, "task1"]
    with torch.no_grad():
        expected = []
        for sample, task in zip(ids, assignment, strict=True):
            with bank.active({} if task is None else task):
                expected.append(model(sample[None]).logits)
        with bank.deltas(assignment):
            mixed = model(ids).logits
    torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert_same(model, before)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_in_part(model: nn.Module) -> nn.Module:
    model.register_module("up", compiled(model.get_submodule("up")))
    return model


@pytest.mark.parametrize("how", [compiled, compiled_in_place, compiled_in_part])
def test_compiled_modules_are_not_served(how: Callable[[nn.Module], nn.Module]) -> None:
    """Graphs that were made before do not see hooks: the experts would be left out without a word."""
    model, experts, _ = make(Text)
    bank = fx.ExpertBank(how(model), experts)
    with pytest.raises(ArgumentError, match="its module is compiled"):
        bank.deltas(["task0"]).__enter__()


def test_what_inference_mode_has_decoded_takes_gradients_later() -> None:
    model, _, base = make(Text)
    base = {name: tensor for name, tensor in base.items() if name != "head.weight"}
    tasks = {"t": {name: tensor + torch.randn(tensor.shape) for name, tensor in base.items()}}
    bank = fx.ExpertBank(model, fx.extract_experts(base, tasks, values="svd16", rank=2, backbone=base))
    ids = torch.arange(12).view(2, 6)
    with torch.inference_mode(), bank.deltas(["t", None]):
        expected = model(ids)
    with bank.deltas(["t", None]):
        out = model(ids)
        out.sum().backward()
    torch.testing.assert_close(out.detach(), expected)


def test_embeddings_that_change_when_they_are_used_are_not_served() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    base = {"0.weight": torch.ones(5, 4)}
    bank = fx.ExpertBank(model, fx.extract_experts(base, {"t": {"0.weight": torch.randn(5, 4)}}))
    with pytest.raises(ArgumentError, match="max_norm"):
        bank.deltas(["t"]).__enter__()
