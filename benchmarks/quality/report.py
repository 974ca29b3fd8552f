"""The results as a table in Markdown and as a chart of accuracy against stored bytes."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

WIDTH = 120
PAIRS = (  # what the table compares seed by seed
    ("FR-Merging", "Task Arithmetic"),
    ("FR-Merging", "FR-Merging without its filter"),
    ("FR-Merging", "FR-Merging, rows and columns permuted"),
    ("FR-Merging", "row means removed, nothing else"),
    ("TSV-M", "Iso-C"),
    ("Iso-C", "FR-Merging"),
    ("FREE, 1 %", "FREE, 1 %, released mu"),
    ("FREE, 1 %", "FREE, 1 %, no filter"),
    ("FREE, 1 %", "FREE, 1 %, permuted"),
    ("FREE, 1 %", "FREE, 1 %, on the base"),
    ("FREE, 1 %", "Twin, sparse 1 %"),
    ("FREE, 1 %", "Twin, SVD rank 3"),
    ("FREE, 1 %", "FREE, 1 % signs"),
    ("Iso-C + low rank 0.6 %", "Iso-C + 1 % signs"),
    ("Iso-C + low rank 1 %", "EMR"),
)
ROUTED = ("oracle", "routed", "routed head", "wrong expert")


def mean_and_spread(runs: list[list[float]]) -> tuple[float, float]:
    """Mean over tasks and seeds, and the standard deviation over seeds of the mean over tasks.

    Without the first seed, on which scales are tuned, unless it is the only one.
    """
    means = [fmean(run) for run in runs[1:] or runs]
    return fmean(means), stdev(means) if len(means) > 1 else 0.0


def _cell(runs: list[list[float]], seeds: int) -> str:
    mean, spread = mean_and_spread(runs)
    cell = f"{mean:.1f} ± {spread:.1f}" if len(runs) > 2 else f"{mean:.1f}"
    return cell if len(runs) == seeds else f"{cell} ({len(runs)} of {seeds} seeds)"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def table(results: dict[str, Any]) -> str:
    """Every method, one row, and the routed ones again in a table of their own."""
    reference, methods, settings = results["reference"], results["methods"], results["settings"]
    seeds = len(settings["seeds"])
    lines = [
        fill(
            f"{len(settings['tasks'])} tasks of {settings['modality']} ({', '.join(settings['tasks'])}), seeds "
            f"{settings['seeds']}, {settings['steps']} fine-tuning steps, at most {settings['test']} test examples a "
            f"task. Accuracy in percent, mean over tasks. On seeds that nothing was chosen on, {_others(settings)} "
            f"(mean ± standard deviation over seeds): at the scale that was tuned on the validation data of seed "
            f"{settings['seeds'][0]}, and at the scale that needs no data. Seed {settings['seeds'][0]}: at the tuned "
            "scale. Gain: over the backbone, and the least on one of all seeds. Stored: bytes kept for each task, in "
            "percent of the merged part of the model in fp16. Merge: CPU seconds for all tasks. Switch: CPU "
            "milliseconds to switch one expert on and off (copying all weights from memory: "
            f"{_milliseconds(reference['switch_seconds'])}).",
            WIDTH,
        ),
        "",
        f"| method | scale | tuned | no data | seed {settings['seeds'][0]} | gain | stored % | merge s | switch ms |",
        "|---|---|---|---|---|---|---|---|---|",
        _reference_row("pretrained", reference["pretrained"], seeds, ""),
        _reference_row("individual", reference["individual"], seeds, "100"),
    ]
    for name, entry in methods.items():
        found = entry["data_free_scale"]
        scale = f"{entry['value']:g}, {fmean(found[1:] or found):.2f}" if entry["tuning"] else ""
        data_free = _cell(entry["data_free"], seeds) if entry["tuning"] else ""
        stored = f"{entry['storage']:.2f}" if entry["storage"] else "0"
        lines.append(
            f"| {name} | {scale} | {_cell(entry['accuracy'], seeds)} | {data_free} | {fmean(entry['accuracy'][0]):.1f} "
            f"| {_gain(entry, methods)} | {stored} | {entry['merge_seconds']:.1f} "
            f"| {_milliseconds(entry['switch_seconds'])} |"
        )
    routed = {name: entry for name, entry in methods.items() if entry["routed"]}
    if routed:
        lines += [
            "",
            fill(
                f"The router sends {fmean(reference['routing'][1:] or reference['routing']):.1f} % of the test "
                "examples to their own task. Oracle: the right expert; routed: the router's expert, the task's own "
                "head; routed head: expert and head by the router, so an example sent astray is lost; wrong expert: "
                "the next task's expert for every example.",
                WIDTH,
            ),
            "",
            "| method | " + " | ".join(ROUTED) + " |",
            "|---|" + "---|" * len(ROUTED),
        ]
        for name, entry in routed.items():
            keys = ("accuracy", "routed", "routed_head", "wrong_expert")
            lines.append(f"| {name} | " + " | ".join(_cell(entry[key], seeds) for key in keys) + " |")
    compared = _comparisons(methods)
    if compared:
        lines += ["", "Differences on the same seeds, in points; the mean is over all but the first:", ""]
        lines += ["| method | against | mean | " + " | ".join(f"seed {seed}" for seed in settings["seeds"]) + " |"]
        lines += ["|---|---|---|" + "---|" * seeds, *compared]
    return "\n".join(lines) + "\n"


def _others(settings: dict[str, Any]) -> str:
    return ", ".join(map(str, settings["seeds"][1:] or settings["seeds"]))


def _reference_row(name: str, runs: list[list[float]], seeds: int, stored: str) -> str:
    return f"| {name} | | {_cell(runs, seeds)} | | {fmean(runs[0]):.1f} | | {stored} | | |"


def _gain(entry: dict[str, Any], methods: dict[str, Any]) -> str:
    """What experts add to their backbone: the mean over the seeds that nothing was chosen on, and the least of all."""
    if entry["backbone"] not in methods:
        return ""
    runs = zip(entry["accuracy"], methods[entry["backbone"]]["accuracy"], strict=False)
    gains = [fmean(own) - fmean(backbone) for own, backbone in runs]
    return f"{fmean(gains[1:] or gains):+.1f}, {min(gains):+.1f}"


def _comparisons(methods: dict[str, Any]) -> list[str]:
    """The differences that tell what helps, paired by seed: the seeds' tasks differ more than the methods do."""
    lines = []
    for better, worse in PAIRS:
        if better in methods and worse in methods:
            runs = zip(methods[better]["accuracy"], methods[worse]["accuracy"], strict=False)  # of seeds that both have
            differences = [fmean(first) - fmean(second) for first, second in runs]
            mean = fmean(differences[1:] or differences)
            # Rounded before it is shown, as there is no -0.0.
            cells = " | ".join(f"{round(value, 1) + 0.0:+.1f}" for value in (mean, *differences))
            lines.append(f"| {better} | {worse} | {cells} |")
    return lines


def by_task(results: dict[str, Any]) -> str:
    """Accuracy on each task, mean over seeds."""
    names = results["settings"]["tasks"]
    rows = {key: results["reference"][key] for key in ("pretrained", "individual")}
    rows |= {name: entry["accuracy"] for name, entry in results["methods"].items()}
    lines = ["| method | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for name, runs in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{fmean(column):.1f}" for column in zip(*runs, strict=True)) + " |")
    return "\n".join(lines) + "\n"


FAMILIES = {
    "FREE": ("FREE-Merging: entries on FR-Merging", "#b3261e", "o"),
    "Iso-C +": ("experts on Iso-C", "#e08a00", "D"),
    "TSV-M +": ("experts on TSV-M", "#2e7d32", "P"),
    "FR-": ("FR-Merging, its controls and low rank on it", "#b3261e", "s"),
    "Twin": ("Twin-Merging", "#1f5fa8", "^"),
    "JSV +": ("gains of joint singular vectors", "#00838f", "*"),
    "EMR": ("EMR-Merging", "#5b2a86", "v"),
}
OTHER = ("other methods of one model", "#666666", "s")


def chart(results: dict[str, Any], path: Path) -> None:
    """Accuracy against stored bytes, as PNG; methods that store nothing stand in a column of their own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.6), dpi=140, layout="constrained")
    zero, axes = figure.subplots(1, 2, width_ratios=(1, 3.2), sharey=True)
    labelled: set[str] = set()
    for name, entry in results["methods"].items():
        family = next((value for key, value in FAMILIES.items() if name.startswith(key)), OTHER)
        label, colour, marker = family
        target, x = (axes, entry["storage"]) if entry["storage"] else (zero, 0.0)
        mean, spread = mean_and_spread(entry["accuracy"])
        handle = target.errorbar(x, mean, yerr=spread, fmt=marker, color=colour, markersize=5, elinewidth=0.8)
        if label not in labelled:
            labelled.add(label)
            handle.set_label(label)
    for key, style in (("individual", "-"), ("pretrained", ":")):
        mean, _ = mean_and_spread(results["reference"][key])
        for target in (zero, axes):
            target.axhline(mean, color="black", linestyle=style, linewidth=0.8)
        axes.annotate(f"{key} {mean:.1f}", (0.99, mean), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    ticks = [share for share in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if left <= share <= right]
    axes.set_xticks(ticks, [f"{share:g}" for share in ticks])
    axes.minorticks_off()
    axes.set_xlabel("stored for each task, % of the merged part in fp16")
    zero.set_xticks([0.0], ["nothing stored"])
    zero.set_xlim(-1, 1)
    zero.set_ylabel("accuracy, %, mean over tasks and unseen seeds")
    for target in (zero, axes):
        target.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def write(results: dict[str, Any], out: Path) -> None:
    """``table.md``, ``by_task.md`` and ``chart.png`` beside ``results.json``."""
    modality, seeds = results["settings"]["modality"], " ".join(map(str, results["settings"]["seeds"]))
    command = f"python -m benchmarks.quality run --modality {modality} --seeds {seeds} --cache CACHE --out OUT"
    head = f"Made by `{command}`.\n\n"
    (out / "table.md").write_text(head + table(results), encoding="utf-8")
    (out / "by_task.md").write_text(head + by_task(results), encoding="utf-8")
    chart(results, out / "chart.png")
