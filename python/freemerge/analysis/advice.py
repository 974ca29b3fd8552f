"""A method to start with, and what the measures did and did not predict in our own evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from .measures import Measures

# Numbers of benchmarks/results/quality/texts: results.json (seeds that nothing was chosen on), measures.json (another).
ACCURACY = {
    "individual": 81.9,
    "Task Arithmetic": 73.9,
    "row means removed": 74.8,
    "FR-Merging": 74.8,
    "JSV": 78.6,
    "Iso-C": 78.6,
    "TSV-M": 78.5,
}
"""Accuracy in percent, mean over eight text tasks; methods by their labels."""

RANK_CORRELATION = {"cosine": -0.35, "effective rank": 0.47, "kept": 0.83}
"""Of a measure of the merged task vector with accuracy, over ten methods at tuned scales."""

FILTERED = {"energy": 26.9, "variance": 26.8}
"""What FR-Merging's filter removed there, in percent."""

LIMITS = (
    "All measures are of weights. None has seen data: what a merged model can do is known when it is scored, for "
    "instance by freemerge evaluate.",
    "In our evaluation, eight text tasks of one sentence encoder, the fine-tuned models reach "
    f"{ACCURACY['individual']} %, JSV {ACCURACY['JSV']} %, TSV-M {ACCURACY['TSV-M']} %, Iso-C {ACCURACY['Iso-C']} %, "
    f"FR-Merging {ACCURACY['FR-Merging']} %, and task arithmetic {ACCURACY['Task Arithmetic']} %. Removing the means "
    f"of rows and nothing else reaches {ACCURACY['row means removed']} %: there it does what FR-Merging's filter does. "
    "Other models may differ.",
    "Interference by frequency did not tell there what a filter is good for: cosine and variance of amplitude were "
    f"nearly the same in all bands, and the filter removed {FILTERED['energy']} % of the energy with "
    f"{FILTERED['variance']} % of the variance.",
    "The cosine of the merged task vector with the tasks' own does not rank methods: over ten methods, its rank "
    f"correlation with accuracy was {RANK_CORRELATION['cosine']:.2f}. Averaging has the highest cosine and the lowest "
    "accuracy.",
    f"The effective rank of the merged task vector had {RANK_CORRELATION['effective rank']:+.2f}, and the share of "
    f"each task's own vector that it keeps {RANK_CORRELATION['kept']:+.2f}, but at scales tuned on validation data, "
    "which weights do not know. Ten methods on one set of models are no law.",
    "Sign agreement and overlap of subspaces were not compared with accuracy. A cosine near 1 between two tasks does "
    "say something: they are the same model, or nearly so.",
)
"""What is said in every report."""

ALIKE = 0.9  #: cosine from which two models are said to be nearly the same


@dataclass(frozen=True)
class Advice:
    """A method to start with.

    Attributes:
        method: its name in recipes.
        title: as papers write it.
        scale: what its recipe's "auto" stands for, or the one to give; None where it was not measured.
        reason: in sentences.
        command: that merges so.
    """

    method: str
    title: str
    scale: float | None
    reason: str
    command: str


def advise(total: Measures, tasks: Sequence[str], scales: Mapping[str, float]) -> Advice:
    """What to start with, from the measures of the whole model and the scale of each method, by its name."""
    command = "freemerge merge BASE MODEL... -o OUT --method "
    if len(tasks) == 1:
        reason = "There is one model, so there is nothing to merge it with. Task arithmetic at scale 1 returns it."
        return Advice("task_arithmetic", "Task Arithmetic", 1.0, reason, command + "task_arithmetic --scale 1")
    alike = "".join(
        f" {tasks[i]} and {tasks[j]} change the weights almost alike (cosine {cosine:.2f}): what they share "
        "counts twice."
        for i, j in combinations(range(len(tasks)), 2)
        if (cosine := total.cosine[i][j]) is not None and cosine > ALIKE
    )
    if all(value is None for spectrum in total.spectra for value in spectrum.bands):
        reason = "No tensor is a matrix that changed, so methods by frequencies or singular values have nothing to do."
        scale = scales.get("task_arithmetic")
        return Advice("task_arithmetic", "Task Arithmetic", scale, reason + alike, command + "task_arithmetic")
    reason = (
        f"Of the methods that keep nothing for each task, JSV and Iso-C were among the best in our evaluation "
        f"({ACCURACY['JSV']} and {ACCURACY['Iso-C']} % against {ACCURACY['FR-Merging']} for FR-Merging and "
        f"{ACCURACY['Task Arithmetic']} for task arithmetic), and Iso-C takes a twentieth of JSV's time. That is the "
        "reason, and not a measure on this page. With a little kept for each task, gains on JSV came closest to the "
        "fine-tuned models."
    )
    scale = scales.get("iso_c")
    if scale is not None:
        reason += (
            f" The scale of Iso-C, {scale:.2f}, is found from these weights: the merged task vector then projects on "
            "the sum of the task vectors as they do themselves. If you can score the result, try scales around it."
        )
    return Advice("iso_c", "Iso-C", scale, reason + alike, command + "iso_c")
