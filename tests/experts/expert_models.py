"""Small models with experts of eight tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import freemerge.experts as fx

TASKS = [f"task{i}" for i in range(8)]


class Text(nn.Module):
    """Token and position embeddings, a block, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 24)
        self.positions = nn.Embedding(12, 24)
        self.norm = nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])[None])
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x)


class Vision(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
            nn.GroupNorm(2, 8),
            nn.Flatten(),
            nn.Linear(8 * 3 * 3, 5),
        )


def tuned(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noise: dict[int, Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in noise:
            noise[value.data_ptr()] = 0.1 * torch.randn(value.shape, generator=generator)
        moved = value + noise[value.data_ptr()] if value.is_floating_point() else value
        state[name] = moved.abs() if "running_var" in name else moved
    return state


def make(
    kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, density: float = 0.1
) -> tuple[nn.Module, dict[str, fx.Expert], dict[str, Tensor]]:
    """A backbone, the experts of eight tasks, and the base they are counted from."""
    torch.manual_seed(0)
    model = kind().eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    tasks = {task: untied(tuned(model, i + 1)) for i, task in enumerate(TASKS)}
    experts = fx.extract_experts(untied(base), tasks, density=density)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.to(dtype), experts, base


def untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "head.weight"}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_forward_adds_what_active_does(
    model: nn.Module, bank: fx.ExpertBank, x: Tensor, chosen: Sequence[str | dict[str, float] | None]
) -> None:
    """One forward pass with an expert for each sample gives what each sample gives with its expert switched on."""
    with torch.no_grad(), bank.deltas(chosen):
        together = model(x)
    for i, own in enumerate(chosen):
        with torch.no_grad(), bank.active(own or {}):
            torch.testing.assert_close(together[i], model(x[i : i + 1])[0], rtol=1e-4, atol=1e-4)


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
