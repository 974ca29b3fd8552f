"""Measures methods on every seed: tuned on the first seed's validation splits, accuracy on the test sets."""

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

from . import encoder, images, texts, vision
from .archives import pinned
from .methods import SPECIFIC, STATIC, Inputs, Kept, Specific, Static
from .suite import Build, Suite, TaskVector

RESULTS = "results.json"
REPEATS = 20


@dataclass(frozen=True)
class Modality:
    """Kind of models and data: how a suite is made, its tasks, fine-tuning steps, and packages by task."""

    build: Build
    tasks: list[str]
    steps: int
    packages: Callable[[list[str]], set[str]]


MODALITIES = {
    "texts": Modality(encoder.build, list(texts.SOURCES), encoder.STEPS, encoder.packages),
    "images": Modality(vision.build, list(images.SOURCES), vision.STEPS, lambda tasks: {images.PACKAGE}),
}


@dataclass
class Measured:
    """One method. Accuracies are lists over tasks, one list a seed, in percent; times in CPU seconds, the least."""

    storage: float = 0.0  # bytes kept for each task, in percent of the merged part of the model in fp16
    backbone: str | None = None
    value: float | None = None  # the tuned scale
    tuning: dict[str, float] = field(default_factory=dict)  # candidate -> mean validation accuracy
    accuracy: list[list[float]] = field(default_factory=list)  # at the tuned scale, if there is one
    data_free: list[list[float]] = field(default_factory=list)  # at the scale that needs no data
    data_free_scale: list[float] = field(default_factory=list)
    routed: list[list[float]] = field(default_factory=list)
    routed_head: list[list[float]] = field(default_factory=list)
    wrong_expert: list[list[float]] = field(default_factory=list)
    merge_seconds: float = float("inf")
    switch_seconds: float | None = None


@dataclass(frozen=True)
class Settings:
    modality: str
    tasks: list[str]
    seeds: list[int]  # scales are tuned on the first
    steps: int
    test: int


def measure(cache: Path, out: Path, settings: Settings, patterns: Sequence[str] = ("*",)) -> dict[str, Any]:
    """Measure the methods that match a pattern on every seed, write ``results.json`` after each, return its content.

    What an existing file with the same settings holds is not measured again, so an interrupted run goes on where it
    was, and a run with more seeds where that with fewer ended.
    """
    results = _start(out, settings)
    done = {name: Measured(**entry) for name, entry in results["methods"].items()}
    chosen = [name for name in (*STATIC, *SPECIFIC) if any(fnmatchcase(name, pattern) for pattern in patterns)]
    build = MODALITIES[settings.modality].build
    for number, seed in enumerate(settings.seeds):
        suite = build(cache, settings.tasks, seed, settings.steps, settings.test)
        scales = {name: measured.value for name, measured in done.items() if measured.value is not None}
        inputs = Inputs(suite.base, dict(zip(suite.names, suite.models, strict=True)), scales, suite.unlabelled())
        _reference(suite, results, number)
        for name in chosen:
            measured = done.setdefault(name, Measured())
            if len(measured.accuracy) == number:
                if name in STATIC:
                    _static(STATIC[name], suite, inputs, measured)
                else:
                    _specific(SPECIFIC[name], suite, inputs, measured)
                _save(out, results, done)
    return results


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
    measured = old["settings"]["seeds"]
    if old["settings"] | {"seeds": settings.seeds[: len(measured)]} != asdict(settings) | {"seeds": measured}:
        raise SystemExit(f"{path} was measured with {old['settings']}; move it away to measure with other settings")
    commits = [*old["environment"]["commits"], *fresh["environment"]["commits"]]
    return old | {
        "settings": asdict(settings),
        "environment": fresh["environment"] | {"commits": list(dict.fromkeys(commits))},
    }


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
    order = (*STATIC, *SPECIFIC)
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


def tuned(candidates: Sequence[float], validate: Callable[[float], float]) -> dict[float, float]:
    """Accuracy by scale: of the candidates, and of more beyond them for as long as the best lies at an end."""
    found = {scale: validate(scale) for scale in candidates}
    while len(found) > 1:
        scales, best = sorted(found), max(found, key=found.__getitem__)  # the earliest of equals, so this ends
        if best == scales[0]:
            beyond = best * best / scales[1]
        elif best == scales[-1]:
            beyond = best * best / scales[-2]
        else:
            break
        beyond = float(f"{beyond:.2g}")
        found[beyond] = validate(beyond)
    return found


def _static(method: Static, suite: Suite, inputs: Inputs, measured: Measured) -> None:
    count = len(suite.names)
    started = time.process_time()
    merged = method.merge(inputs)
    measured.merge_seconds = min(measured.merge_seconds, time.process_time() - started)

    def everywhere(scale: float) -> list[list[TaskVector]]:
        return [[{name: scale * tensor for name, tensor in merged.items()}]] * count

    if measured.value is None:
        found = tuned(method.candidates, lambda scale: suite.validate(everywhere(scale)))
        measured.value = max(found, key=found.__getitem__)
        measured.tuning = {str(scale): accuracy for scale, accuracy in found.items()} if len(found) > 1 else {}
    inputs.scales[method.name] = measured.value
    scale = method.data_free(inputs, merged)
    measured.data_free_scale.append(scale)
    measured.accuracy.append(suite.accuracies(everywhere(measured.value), suite.test))
    same = scale == measured.value
    measured.data_free.append(measured.accuracy[-1] if same else suite.accuracies(everywhere(scale), suite.test))
    _say(f"{method.name} at {measured.value:g}", measured)


def _specific(method: Specific, suite: Suite, inputs: Inputs, measured: Measured) -> None:
    started = time.process_time()
    kept = method.build(inputs)
    measured.merge_seconds = min(measured.merge_seconds, time.process_time() - started)
    measured.storage = 100.0 * kept.bytes_per_task / suite.dense_bytes
    measured.backbone = method.backbone
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


def _switch_seconds(suite: Suite, kept: Kept) -> float:
    """CPU time to switch one expert on and off again in the encoder."""
    assert kept.experts is not None
    suite.apply(kept.parts[0][0])  # the backbone
    bank = ExpertBank(suite.model.merged, kept.experts, base=suite.base)

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


def _say(name: str, measured: Measured) -> None:
    accuracy = sum(measured.accuracy[-1]) / len(measured.accuracy[-1])
    print(f"{name}: {accuracy:.1f} % with {measured.storage:.2f} % a task", flush=True)
