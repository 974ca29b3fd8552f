"""FREE-Merging of small networks: a merged backbone, an expert a task, and a router that picks the expert.

python examples/router.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import freemerge as fm

TASKS = {"sum": lambda x: x.sum(1) > 0, "first": lambda x: x[:, 0] > x[:, 1], "last": lambda x: x[:, 6] + x[:, 7] > 0}
WIDTH = 32


def inputs(task: str, count: int, seed: int) -> Tensor:
    """Numbers [count, 16]; those of each task lie around another point, by which a router tells them apart."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.zeros(16)
    centre[8 + 2 * list(TASKS).index(task)] = 4.0
    return torch.randn(count, 16, generator=generator) + centre


def answers(task: str, x: Tensor) -> Tensor:
    return TASKS[task](x[:, :8]).long()


def train(state: dict[str, Tensor] | None, tasks: list[str], steps: int) -> dict[str, Tensor]:
    """A network that answers the questions of some tasks, from new weights or those of a base."""
    model = network(state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        task = tasks[step % len(tasks)]
        x = inputs(task, 64, seed=step)
        loss = nn.functional.cross_entropy(model(x), answers(task, x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def network(state: dict[str, Tensor] | None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
    if state is not None:
        model.load_state_dict(state)
    return model


def right(output: Tensor, task: str, x: Tensor) -> float:
    return float((output.argmax(1) == answers(task, x)).float().mean())


def main() -> dict[str, dict[str, float]]:
    """Train, merge, extract experts, fit a router; the share of right answers, by setting and task."""
    base = train(None, list(TASKS), 60)
    tuned = {task: train(base, [task], 300) for task in TASKS}
    model = network(fm.merge(base, list(tuned.values()), method="iso_c"))
    experts = fm.extract_experts(base, tuned, backbone=model, budget="40%")
    bank = fm.ExpertBank(model, experts)
    samples = torch.cat([inputs(task, 50, seed=1000) for task in TASKS])
    router = fm.Router.fit(samples, [task for task in TASKS for _ in range(50)])
    routed = fm.RoutedModel(model, bank, router, features=lambda x: x)

    found: dict[str, dict[str, float]] = {"merged": {}, "with its expert": {}, "with a router": {}}
    for task in TASKS:
        x = inputs(task, 500, seed=2000)
        with torch.no_grad():
            found["merged"][task] = right(model(x), task, x)
            with bank.active(task):
                found["with its expert"][task] = right(model(x), task, x)
            found["with a router"][task] = right(routed(x).output, task, x)
    return found


if __name__ == "__main__":
    for setting, row in main().items():
        print(f"{setting:16}" + "".join(f"{task:>8} {share:.1%}" for task, share in row.items()))
