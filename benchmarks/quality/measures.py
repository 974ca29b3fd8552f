"""What the measures of `freemerge analyze` say about the fine-tuned encoders, beside the accuracy of each method."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.torch import save_file

import freemerge as fm
from freemerge.methods import DARE, FR, PCB, TIES, TSVM, Average, IsoC, Method, TaskArithmetic

from .encoder import Encoder, finetuned
from .measure import RESULTS
from .suite import weights
from .texts import load as load_task

METHODS: dict[str, Method] = {
    "weight average": Average(),
    "Task Arithmetic": TaskArithmetic(),
    "TIES, top 20 %": TIES(),
    "DARE, p = .9": DARE(),
    "PCB, top 10 %": PCB(),
    "FR-Merging without its filter": FR(fm.HighPass(0)),
    "row means removed, nothing else": FR(fm.Center(-1)),
    "FR-Merging": FR(),
    "Iso-C": IsoC(),
    "TSV-M": TSVM(),
}
"""The methods of the evaluation, by their names there, that give one model and are the package's own."""


def measure_encoders(cache: Path, out: Path, seed: int = 0) -> dict[str, Any]:
    """Write ``measures.json`` from the weights of one seed and the accuracies in ``results.json``; a report as well.

    The report, ``report.html``, is in the cache. Scales are the tuned ones of the evaluation. Encoders that the cache
    lacks are fine-tuned.
    """
    results = json.loads((out / RESULTS).read_text())
    settings = results["settings"]
    encoder = Encoder(cache)
    models = {"base": {name: tensor.clone() for name, tensor in weights(encoder).items()}}
    for name in settings["tasks"]:
        task = load_task(name, cache, seed, settings["test"])
        models[name] = finetuned(cache, encoder, task, seed, settings["steps"], settings["test"])
    with TemporaryDirectory() as folder:  # the report calls models by their files' names
        for name, model in models.items():
            save_file(model, f"{folder}/{name}.safetensors")
        base, *tuned = (f"{folder}/{name}.safetensors" for name in models)
        analysis = fm.analyze(base, tuned, methods=METHODS)
        fm.analyze(base, tuned, out=cache / "report.html", force=True)
    index = settings["seeds"].index(seed)
    methods = {}
    for name, merged in analysis.total.methods.items():
        entry = results["methods"][name]
        tuning = entry["value"] / analysis.scales[name]
        methods[name] = {
            "accuracy": fmean(entry["accuracy"][index]),
            "scale": entry["value"],
            "cosine": _mean(merged.cosine),
            "kept": _mean(merged.kept) * tuning,
            "norm": (merged.norm or 0.0) * tuning,
            "effective rank": merged.spectrum.effective_rank,
        }
    total = analysis.total
    (effect,) = [merged.filter for name, merged in total.methods.items() if name == "FR-Merging"]
    measured = {
        "seed": seed,
        "band edges": analysis.to_dict()["band_edges"],
        "energy": [_mean(column) for column in zip(*(s.bands for s in total.spectra), strict=True)],
        "row means": _mean([s.row_means for s in total.spectra]),
        "cosine": total.mean_cosine,
        "cosine by band": total.band_cosine,
        "variance": total.variance,
        "variance by band": total.band_variance,
        "FR-Merging's filter keeps": vars(effect),
        "variance after it": total.variance * effect.variance / effect.energy,
        "rank correlation with accuracy": {
            measure: _rank_correlation(*np.array([(m[measure], m["accuracy"]) for m in methods.values()]).T)
            for measure in ("cosine", "kept", "norm", "effective rank")
        },
        "methods": methods,
    }
    (out / "measures.json").write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def _mean(values: Any) -> float:
    return fmean(value for value in values if value is not None)


def _rank_correlation(first: Any, second: Any) -> float:
    """Spearman's: the correlation of the ranks; equal values share theirs."""
    ranks = [np.sign(values[:, None] - values[None, :]).sum(1) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])
