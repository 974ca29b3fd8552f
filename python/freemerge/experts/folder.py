"""A folder of expert files, one per task, that appears when all of them are complete."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from ..checkpoint.staging import Staging
from ..checkpoint.target import check_target, target
from ..errors import ArgumentError, CheckpointError
from ..workers import ALONE, Workers
from .expert import Expert, check_task_name
from .format import open_file


@dataclass(frozen=True)
class SavedExpert:
    """What was written for one task: the factor mu, the number of entries, and the size of the file."""

    task: str
    mu: float
    entries: int
    nbytes: int


def save_experts(
    experts: Mapping[str, Expert] | Iterable[tuple[str, Expert]],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    workers: Workers = ALONE,
) -> list[SavedExpert]:
    """Write ``TASK.safetensors`` for each task into the new directory ``out``, which :meth:`ExpertBank.load` reads.

    ``experts``: as :func:`extract_experts` returns them, or pairs of a task and its expert, which :func:`iter_experts`
    makes one by one, so that one is in memory at a time. An error leaves no ``out``. Raises RefusedError, before the
    first expert is made, if ``out`` exists and is not empty; ``force`` replaces a folder that holds expert files and
    nothing else, at once when all are complete.

    ``workers``: processes that each write the experts :func:`iter_experts` gives them; all get the whole list.
    """
    with workers.together("experts"):
        folder, pairs = target(out), _pairs(experts)
        check_target(folder, single_file=False, force=force, foreign=_other_than_experts)
        staging = Staging(folder, workers=workers)
        try:
            saved: dict[str, SavedExpert] = {}
            for task, expert in pairs:
                if task in saved:
                    raise ArgumentError(f"experts: two are called {task!r}")
                nbytes = expert.save(staging.directory / f"{task}.safetensors")
                saved[task] = SavedExpert(task, expert.mu, expert.entries, nbytes)
            written = workers.gather([*saved.values()])
            staging.publish(None, force=force, foreign=_other_than_experts)
        finally:
            staging.end()
    return [expert for expert in chain.from_iterable(zip_longest(*written)) if expert is not None]


def _pairs(experts: object) -> Iterator[tuple[str, Expert]]:
    """Tasks and their experts, each checked when its turn comes."""
    given = experts.items() if isinstance(experts, Mapping) else experts
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentError(f"experts must be a mapping of tasks to experts, or pairs of the two, got {experts!r}")
    return map(_pair, given)


def _pair(pair: object) -> tuple[str, Expert]:
    if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], Expert):
        raise ArgumentError(f"experts must be pairs of a task and its expert, got {pair!r}")
    return check_task_name(pair[0], "experts"), pair[1]


def _other_than_experts(folder: Path) -> str | None:
    """Folders of experts are told by their files, all of which are expert files by their headers."""
    for path in sorted(folder.iterdir()):
        try:
            if path.is_symlink() or path.suffix != ".safetensors":
                return f"{path.name} is no expert file"
            open_file(path)
        except (CheckpointError, OSError):
            return f"{path.name} is no expert file"
    return None
