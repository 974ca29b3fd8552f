"""Measures every method on every seed: tuned on the first seed's validation splits, accuracy on the test sets."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

import freemerge as fm
from freemerge.experts import ExpertBank

from .archives import pinned
from .methods import SPECIFIC, STATIC, Inputs, Kept, Specific, Static
from .rivals import TaskVector
from .suite import Suite, build

RESULTS = "results.json"
REPEATS = 20


@dataclass
class Measured:
    """One method. Accuracies are lists over tasks, one list a seed, in percent; times in CPU seconds, the least."""

    storage: float  # bytes kept for each task, in percent of the merged part of the encoder in fp16
    value: float | None = None  # the tuned number
    tuning: dict[str, float] = field(default_factory=dict)  # candidate -> mean validation accuracy
    accuracy: list[list[float]] = field(default_factory=list)
    routed: list[list[float]] = field(default_factory=list)
    routed_head: list[list[float]] = field(default_factory=list)
    wrong_expert: list[list[float]] = field(default_factory=list)
    merge_seconds: float = float("inf")
    switch_seconds: float | None = None


@dataclass(frozen=True)
class Settings:
    tasks: list[str]
    seeds: list[int]
    steps: int
    test: int


def measure(cache: Path, out: Path, settings: Settings, patterns: Sequence[str] = ("*",)) -> dict[str, Any]:
    """Measure the methods whose names match, write ``results.json`` after each, and return its content.

    Results of other methods in an existing file with the same settings are kept.
    """
    results = _start(out, settings)
    tuned: dict[str, float] = {name: entry["value"] for name, entry in results["methods"].items()}
    done: dict[str, Measured] = {}
    for number, seed in enumerate(settings.seeds):
        suite = build(cache, settings.tasks, seed, settings.steps, settings.test)
        inputs = Inputs(suite.base, dict(zip(suite.names, suite.models, strict=True)))
        _reference(suite, results, number)
        for method in STATIC:
            wanted = _matches(method.name, patterns)
            if wanted or method.name in tuned:
                _static(method, suite, inputs, done if wanted else None, tuned)
            _save(out, results, done)
        for specific in SPECIFIC:
            if _matches(specific.name, patterns):
                _specific(specific, suite, inputs, done, tuned)
                _save(out, results, done)
    return results


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _start(out: Path, settings: Settings) -> dict[str, Any]:
    path = out / RESULTS
    fresh: dict[str, Any] = {
        "settings": asdict(settings),
        "environment": _environment(),
        "reference": {},
        "methods": {},
    }
    if not path.exists():
        return fresh
    old: dict[str, Any] = json.loads(path.read_text())
    if old["settings"] != fresh["settings"]:
        raise SystemExit(f"{path} was measured with {old['settings']}; move it away to measure with other settings")
    return old | {"environment": fresh["environment"]}


def _environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "freemerge": fm.__version__,
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "packages": pinned(),
        "arithmetic": "evaluation under bfloat16 autocast, merging in float32",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _save(out: Path, results: dict[str, Any], done: dict[str, Measured]) -> None:
    results["methods"] |= {name: asdict(measured) for name, measured in done.items()}
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{RESULTS}.part"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(out / RESULTS)


def _reference(suite: Suite, results: dict[str, Any], number: int) -> None:
    """The pretrained and the individual models, and what the router gets right."""
    reference = results["reference"]
    if len(reference.setdefault("routing", [])) > number:
        return
    nothing: TaskVector = {name: torch.zeros_like(tensor) for name, tensor in suite.base.items()}
    count = len(suite.names)
    reference.setdefault("pretrained", []).append(suite.accuracies([[nothing]] * count, suite.test))
    reference.setdefault("individual", []).append(suite.accuracies([[v] for v in suite.vectors], suite.test))
    reference["routing"].append(suite.routing_accuracy())
    reference["switch_seconds"] = _least(lambda: suite.apply())


def _static(
    method: Static, suite: Suite, inputs: Inputs, done: dict[str, Measured] | None, tuned: dict[str, float]
) -> None:
    """Merge, tune the scale if this is the first seed, and measure, unless the method is only a backbone this time."""
    count = len(suite.names)
    started = time.process_time()
    unscaled = method.merge(inputs)
    seconds = time.process_time() - started
    measured = None if done is None else done.setdefault(method.name, Measured(storage=0.0))
    if measured is not None and not measured.accuracy:
        measured.tuning = {
            str(scale): suite.validate([[_times(unscaled, scale)]] * count)
            for scale in (method.scales if len(method.scales) > 1 else ())
        }
        measured.value = tuned[method.name] = _best(measured.tuning, method.scales)
    inputs.merged[method.name] = _times(unscaled, tuned[method.name])
    if measured is not None:
        measured.merge_seconds = min(measured.merge_seconds, seconds)
        measured.accuracy.append(suite.accuracies([[inputs.merged[method.name]]] * count, suite.test))
        _say(method.name, measured)


def _specific(
    method: Specific, suite: Suite, inputs: Inputs, done: dict[str, Measured], tuned: dict[str, float]
) -> None:
    measured = done.setdefault(method.name, Measured(storage=0.0))
    if not measured.accuracy:
        measured.tuning = {
            str(value): suite.validate(method.build(inputs, value).parts)
            for value in (method.values if len(method.values) > 1 else ())
        }
        measured.value = tuned[method.name] = _best(measured.tuning, method.values)
    started = time.process_time()
    kept = method.build(inputs, tuned[method.name])
    measured.merge_seconds = min(measured.merge_seconds, time.process_time() - started)
    measured.storage = 100.0 * kept.bytes_per_task / suite.dense_bytes
    measured.accuracy.append(suite.accuracies(kept.parts, suite.test))
    if method.routed:
        own_head, picked_head = suite.routed(kept.parts)
        measured.routed.append(own_head)
        measured.routed_head.append(picked_head)
        measured.wrong_expert.append(suite.wrong_expert(kept.parts))
    if kept.experts is not None:
        measured.switch_seconds = _switch_seconds(suite, kept)
    _say(method.name, measured)


def _switch_seconds(suite: Suite, kept: Kept) -> float:
    """CPU time to switch one expert on and off again in the encoder."""
    assert kept.experts is not None
    bank = ExpertBank(suite.encoder.bert.encoder, kept.experts)

    def switch() -> None:
        with bank.active(suite.names[0]):
            pass

    return _least(switch)


def _least(action: Any) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


def _times(vector: TaskVector, scale: float) -> TaskVector:
    return {name: scale * tensor for name, tensor in vector.items()}


def _best(tuning: dict[str, float], values: Sequence[float]) -> float:
    return float(max(tuning, key=lambda value: tuning[value])) if tuning else values[0]


def _say(name: str, measured: Measured) -> None:
    accuracy = sum(measured.accuracy[-1]) / len(measured.accuracy[-1])
    chosen = "" if measured.value is None else f" at {measured.value:g}"
    print(f"{name}{chosen}: {accuracy:.1f} % with {measured.storage:.2f} % a task", flush=True)
