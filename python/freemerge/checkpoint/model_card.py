"""The README.md of a merged model."""

from __future__ import annotations

import json
from collections.abc import Sequence

from .. import __version__


def model_card(
    *, title: str, base: str, models: Sequence[str], recipe: str, method: str = "FR-Merging", paper: str | None = None
) -> str:
    """A model card in Markdown with the front matter that model hubs read.

    Args:
        title: heading, for instance the output's name.
        base, models: names of the inputs, without local paths (:attr:`Checkpoint.name`).
        recipe: the recipe as YAML.
        method, paper: what the merging method is called, and its arXiv number if it has one.
    """
    cited = f"{method}, [arXiv {paper}](https://arxiv.org/abs/{paper})" if paper else method
    inputs = [base, *models]
    front = ["base_model:", *(f"- {json.dumps(name, ensure_ascii=False)}" for name in inputs)]
    front += ["base_model_relation: merge", "library_name: transformers", "tags:", "- merge", "- freemerge"]
    listed = "\n".join(f"- `{name}`" for name in models)
    return f"""---
{chr(10).join(front)}
---
# {title}

Merged with freemerge {__version__} ({cited}) from the base
`{base}` and

{listed}

Recipe:

```yaml
{recipe.strip()}
```

`freemerge.json` records the inputs' hashes and what was done to each tensor. `freemerge verify` checks the files.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```
"""
