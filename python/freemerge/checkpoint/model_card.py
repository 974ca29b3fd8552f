"""The README.md of a merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..errors import CheckpointError
from .architecture import read_config
from .hub_cache import hub_id
from .locate import distinct_names, entry
from .reader import Checkpoint
from .side_files import is_tokenizer_file

# How a class of transformers ends, with the Auto class that loads it and what hubs call its task.
_HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "GPT2LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
}


def model_card(
    *,
    base: Checkpoint,
    models: Sequence[Checkpoint],
    files: Sequence[str],
    recipe: str,
    method: str = "FR-Merging",
    paper: str | None = None,
) -> str:
    """A model card in Markdown with the front matter that model hubs read.

    ``base_model`` lists the inputs that come from the Hub's cache, and nothing else; the license is that of the inputs'
    cards, if all that have one agree; the task and how to load the model follow from the base's ``config.json``.

    Args:
        base, models: the inputs; no local path of theirs is written.
        files: names of the merged model's weight files.
        recipe: the recipe as YAML.
        method, paper: what the merging method is called, and its arXiv number if it has one.
    """
    inputs = [base, *models]
    cards = [_front_matter(source.directory) for source in inputs]
    library, usage, task = _loading(base.directory, files)
    ids = [name for source in inputs if source.path is not None and (name := hub_id(source.path)) is not None]
    licenses = [card.get("license") for card in cards if card.get("license")]
    front = {
        "base_model": ids,
        "base_model_relation": "merge" if ids else None,
        "library_name": library,
        "license": licenses[0] if cards[0].get("license") and licenses.count(licenses[0]) == len(licenses) else None,
        "pipeline_tag": cards[0].get("pipeline_tag") or task,
        "tags": ["merge", "freemerge"],
    }
    cited = f"{method}, [arXiv {paper}](https://arxiv.org/abs/{paper})" if paper else method
    base_name, *names = distinct_names([source.name for source in inputs], [source.path for source in inputs])
    listed = "\n".join(f"- `{name}`" for name in names)
    return f"""---
{yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False, allow_unicode=True).strip()}
---
# {_title(names)}

Merged with freemerge {__version__} ({cited}) from the base
`{base_name}` and

{listed}

Recipe:

```yaml
{recipe.strip()}
```

`freemerge.json` records the inputs' hashes and what was done to each tensor. `freemerge verify` checks the files.

```python
{usage}
```
"""


def _title(names: Sequence[str]) -> str:
    short = [name.rpartition("/")[2] for name in names]
    told = short if len(set(short)) == len(set(names)) else names
    return f"Merge of {' and '.join(told) if len(names) < 4 else f'{len(names)} models'}"


def _loading(directory: Path | None, files: Sequence[str]) -> tuple[str | None, str, str | None]:
    """The library that loads a model with the config of this directory, the lines that do, and the model's task."""
    place = '"path/to/this/directory"'
    config = read_config(directory)
    if "_diffusers_version" in config and _is_class(kind := config.get("_class_name")):
        return "diffusers", f"from diffusers import {kind}\n\nmodel = {kind}.from_pretrained({place})", None
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not _is_class(classes[0]):
        return None, _reading(place, files), None
    auto, task = _auto_class(classes[0], config)
    lines = [f"from transformers import {auto}", "", f"model = {auto}.from_pretrained({place})"]
    if directory is not None and any(is_tokenizer_file(path.name) for path in directory.glob("*token*")):
        lines[0] += ", AutoTokenizer"
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({place})")
    return "transformers", "\n".join(lines), task


def _reading(place: str, files: Sequence[str]) -> str:
    """How the weights are read by safetensors alone."""
    if len(files) == 1:
        file = place.replace("directory", f"directory/{files[0]}")
        return f"from safetensors.torch import load_file\n\nstate = load_file({file})"
    return f"""from pathlib import Path

from safetensors.torch import load_file

state = {{}}
for file in Path({place}).glob("*.safetensors"):
    state |= load_file(file)"""


def _is_class(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier()


def _auto_class(name: str, config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The Auto class of transformers for a class of a model, or the class itself, and its task."""
    if name.endswith("ForConditionalGeneration") and "vision_config" in config:
        return "AutoModelForImageTextToText", "image-text-to-text"
    return next((found for end, found in _HEADS.items() if name.endswith(end)), (name, None))


def _front_matter(directory: Path | None) -> dict[str, str]:
    """The words that the model card of a directory says to machines; none where there is no card that can be read."""
    try:
        text = entry(directory, "README.md").read_text(encoding="utf-8") if directory is not None else ""
        front = yaml.safe_load(text.split("\n---", 1)[0]) if text.startswith("---\n") else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, CheckpointError):
        return {}
    return {key: value for key, value in front.items() if isinstance(value, str)} if isinstance(front, dict) else {}
