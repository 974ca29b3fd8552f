"""Measures every method on every seed: tuned on the first seed's validation splits, accuracy on the test sets."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
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


def measure(cache: Path, out: Path, settings: Settings, patterns: Sequence[str] = ()) -> dict[str, Any]:
    """Measure every method on every seed, write ``results.json`` after each, and return its content.

    What an existing file with the same settings holds is not measured again, so an interrupted run goes on where it
    was; ``patterns`` names methods to measure again, and no others.
    """
    results = _start(out, settings)
    done = {name: Measured(**entry) for name, entry in results["methods"].items()}
    static = [method for method in STATIC if _begin(method, done, patterns)]
    specific = [method for method in SPECIFIC if _begin(method, done, patterns)]
    for number, seed in enumerate(settings.seeds):
        suite = build(cache, settings.tasks, seed, settings.steps, settings.test)
        scales = {name: measured.value for name, measured in done.items() if measured.value is not None}
        inputs = Inputs(suite.base, dict(zip(suite.names, suite.models, strict=True)), scales)
        _reference(suite, results, number)
        for plain in static:
            if len(done[plain.name].accuracy) == number:
                _static(plain, suite, inputs, done[plain.name])
                _save(out, results, done)
        for method in specific:
            if len(done[method.name].accuracy) == number:
                _specific(method, suite, inputs, done[method.name])
                _save(out, results, done)
    return results


def _begin(method: Static | Specific, done: dict[str, Measured], patterns: Sequence[str]) -> bool:
    """Whether to measure a method; forgets what is to be measured again."""
    if patterns and not any(fnmatchcase(method.name, pattern) for pattern in patterns):
        return False
    candidates = [str(value) for value in method.candidates] if len(method.candidates) > 1 else []
    if patterns or method.name not in done or list(done[method.name].tuning) != candidates:
        done[method.name] = Measured(storage=0.0)
    return True


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
    commits = [*old["environment"]["commits"], *fresh["environment"]["commits"]]
    return old | {"environment": fresh["environment"] | {"commits": list(dict.fromkeys(commits))}}


def _environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "freemerge": fm.__version__,
        "commits": [commit.stdout.strip()],  # an interrupted run may go on with another one
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "packages": pinned(),
        "arithmetic": "evaluation and merging in float32",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _save(out: Path, results: dict[str, Any], done: dict[str, Measured]) -> None:
    order = [method.name for method in (*STATIC, *SPECIFIC)]
    results["methods"] = {name: asdict(done[name]) for name in order if name in done and done[name].accuracy}
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
    seconds = _least(lambda: suite.apply())
    reference["switch_seconds"] = min(seconds, reference.get("switch_seconds", seconds))


def _static(method: Static, suite: Suite, inputs: Inputs, measured: Measured) -> None:
    count = len(suite.names)
    started = time.process_time()
    unscaled = method.merge(inputs)
    measured.merge_seconds = min(measured.merge_seconds, time.process_time() - started)
    if not measured.accuracy:
        _tune(measured, method, lambda scale: suite.validate([[_times(unscaled, scale)]] * count))
    assert measured.value is not None
    inputs.scales[method.name] = measured.value
    measured.accuracy.append(suite.accuracies([[_times(unscaled, measured.value)]] * count, suite.test))
    _say(method.name, measured)


def _specific(method: Specific, suite: Suite, inputs: Inputs, measured: Measured) -> None:
    if not measured.accuracy:
        _tune(measured, method, lambda value: suite.validate(method.build(inputs, value).parts))
    assert measured.value is not None
    started = time.process_time()
    kept = method.build(inputs, measured.value)
    measured.merge_seconds = min(measured.merge_seconds, time.process_time() - started)
    measured.storage = 100.0 * kept.bytes_per_task / suite.dense_bytes
    measured.accuracy.append(suite.accuracies(kept.parts, suite.test))
    if method.routed:
        own_head, picked_head = suite.routed(kept.parts)
        measured.routed.append(own_head)
        measured.routed_head.append(picked_head)
        measured.wrong_expert.append(suite.wrong_expert(kept.parts))
    if kept.experts is not None:
        seconds = _switch_seconds(suite, kept)
        measured.switch_seconds = min(seconds, measured.switch_seconds or seconds)
    _say(method.name, measured)


def _tune(measured: Measured, method: Static | Specific, validate: Callable[[float], float]) -> None:
    """Choose the method's number on the validation splits; one with a single candidate has nothing to choose."""
    if len(method.candidates) > 1:
        measured.tuning = {str(value): validate(value) for value in method.candidates}
    best = max(measured.tuning, key=lambda value: measured.tuning[value]) if measured.tuning else method.candidates[0]
    measured.value = float(best)


def _switch_seconds(suite: Suite, kept: Kept) -> float:
    """CPU time to switch one expert on and off again in the encoder."""
    assert kept.experts is not None
    bank = ExpertBank(suite.encoder.bert.encoder, kept.experts)

    def switch() -> None:
        with bank.active(suite.names[0]):
            pass

    return _least(switch)


def _least(action: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


def _times(vector: TaskVector, scale: float) -> TaskVector:
    return {name: scale * tensor for name, tensor in vector.items()}


def _say(name: str, measured: Measured) -> None:
    accuracy = sum(measured.accuracy[-1]) / len(measured.accuracy[-1])
    chosen = "" if measured.value is None else f" at {measured.value:g}"
    print(f"{name}{chosen}: {accuracy:.1f} % with {measured.storage:.2f} % a task", flush=True)
