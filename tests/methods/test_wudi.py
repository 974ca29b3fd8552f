"""WUDI in closed form against the normal equations, plain gradient descent and the flow, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import freemerge as fm

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 17), (17, 1), (7, 13), (3, 16, 20)]


def updates(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(i + 1) * torch.randn(shape, generator=generator) for i in range(count)]


def merged(vectors: list[Tensor], **options: Any) -> Tensor:
    base = torch.zeros_like(vectors[0])
    return fm.merge_tensors(base, vectors, recipe=fm.Recipe(method="wudi", scale=1.0, out_dtype="float64", **options))


def operator(vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A and B of the normal equations X A = B."""
    grams = [v.double().mT @ v.double() / v.double().square().sum((-2, -1), keepdim=True) for v in vectors]
    right = [v.double() @ gram for v, gram in zip(vectors, grams, strict=True)]
    return torch.stack(grams).sum(0), torch.stack(right).sum(0)


def total(vectors: list[Tensor]) -> Tensor:
    return torch.stack(vectors).double().sum(0)


def close(actual: Tensor, expected: Tensor, error: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=error * float(expected.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [0.0, 3.0, 300.0])
def test_the_flow(shape: tuple[int, ...], count: int, steps: float) -> None:
    """X(t) of dX/dt = B - X A from the sum of the task vectors, by a matrix exponential of twice the size."""
    vectors = updates(shape, count)
    gram, right = operator(vectors)
    largest = torch.linalg.eigvalsh(gram)[..., -1:, None]
    time = steps / largest
    height, width = shape[-2:]
    generator = torch.zeros(*shape[:-2], height + width, height + width, dtype=torch.float64)
    generator[..., height:, height:] = -gram * time
    generator[..., :height, height:] = right * time
    flow = torch.linalg.matrix_exp(generator)
    expected = total(vectors) @ flow[..., height:, height:] + flow[..., :height, height:]
    close(merged(vectors, steps=steps), expected, 1e-6)
    close(merged(vectors, steps=steps, compute_dtype="float64"), expected, 1e-9)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16), (3, 16, 20)])
def test_gradient_descent(shape: tuple[int, ...]) -> None:
    """Small steps along the gradient of the objective, by autograd."""
    vectors = [v.double() for v in updates(shape, 3)]
    gram, _ = operator(vectors)
    x = total(vectors).requires_grad_()
    length = 0.01 / torch.linalg.eigvalsh(gram)[..., -1:, None]
    for _ in range(400):
        loss = sum((((x - v) @ v.mT).square().sum((-2, -1)) / v.square().sum((-2, -1))).sum() for v in vectors)
        (gradient,) = torch.autograd.grad(torch.as_tensor(loss), x)
        x = (x - length * gradient / 2).detach().requires_grad_()
    close(merged(vectors, steps=4.0), x.detach(), 0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_at_the_end_are_the_normal_equations(shape: tuple[int, ...], count: int) -> None:
    vectors = updates(shape, count)
    gram, right = operator(vectors)
    expected = right @ torch.linalg.pinv(gram, hermitian=True, rtol=1e-9)
    close(merged(vectors, steps=1e10), expected, 1e-5)
    close(merged(vectors, steps=1e10) @ gram, right, 1e-6)


@pytest.mark.parametrize("rank", [0.0, 0.25, 0.5])
def test_the_rank_cut_leaves_the_sum_along_the_other_directions(rank: float) -> None:
    vectors = updates((24, 20), 3)
    gram, _ = operator(vectors)
    _, directions = torch.linalg.eigh(gram)
    cut = 20 - round(20 * rank)
    all_of_it, result = merged(vectors), merged(vectors, rank=rank)
    close(result @ directions[:, :cut], total(vectors) @ directions[:, :cut], 1e-6)
    if rank:
        close(result @ directions[:, cut:], all_of_it @ directions[:, cut:], 1e-6)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (280, 290)])
@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_updates_are_merged_in_their_rows(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    height, width = shape
    vectors = [
        (torch.randn(height, rank, generator=generator) @ torch.randn(rank, width, generator=generator)) / (i + 1)
        for i in range(3)
    ]
    gram, right = operator(vectors)
    values, directions = torch.linalg.eigh(gram)
    values = (values / values[-1]).clamp(min=1e-15)
    kept = torch.exp(-300 * values)
    start = total(vectors) @ directions
    expected = (
        start * kept + right @ directions / values / torch.linalg.eigvalsh(gram)[-1] * (1 - kept)
    ) @ directions.mT
    close(merged(vectors), expected, 1e-5)


def test_one_task_none_and_equal_ones() -> None:
    (vector,) = updates((9, 14), 1)
    zero = torch.zeros_like(vector)
    close(merged([vector]), vector.double(), 1e-6)
    close(merged([vector, zero]), vector.double(), 1e-6)
    assert not merged([zero, zero]).any()
    assert not torch.isnan(merged([zero, zero], steps=0.0)).any()
    # Equal tasks: the sum goes to their mean where they have inputs.
    close(merged([vector, vector, vector], steps=1e9), vector.double(), 1e-5)


@pytest.mark.parametrize("factor", [1e-12, 1e6])
def test_nothing_depends_on_the_size_of_the_updates(factor: float) -> None:
    vectors = updates((10, 24), 3)
    close(merged([factor * v for v in vectors]), factor * merged(vectors), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    vectors = [v.to(dtype) for v in updates((12, 10), 3)]
    expected = merged([v.double() for v in vectors])
    result = fm.merge_tensors(torch.zeros(12, 10, dtype=dtype), vectors, recipe=fm.Recipe(method="wudi", scale=1.0))
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_embeddings_and_what_is_no_matrix_are_averaged() -> None:
    averaged = {
        "model.embed_tokens.weight": (10, 4),
        "wte.weight": (6, 4),
        "shared.weight": (9, 4),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (8, 4),
        "norm.weight": (5,),
        "conv.weight": (4, 3, 3, 3),
    }
    shapes = {**averaged, "up.weight": (6, 4), "mlp.shared_expert.down_proj.weight": (4, 6)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    vectors = {name: updates(shape, 3) for name, shape in shapes.items()}
    models = [{name: each[i] for name, each in vectors.items()} for i in range(3)]
    for name, found in fm.merge(base, models, fm.Recipe(method="wudi", scale=1.0)).items():
        assert torch.allclose(found, sum(vectors[name]) / 3, atol=1e-6) == (name in averaged)
    up = fm.merge(
        {"up": torch.zeros(4, 4)}, [{"up": torch.eye(4)}, {"up": 3 * torch.eye(4)}], fm.Recipe(method="wudi", scale=1.0)
    )
    torch.testing.assert_close(up["up"], 2 * torch.eye(4))
