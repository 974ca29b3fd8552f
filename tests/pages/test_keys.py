"""What is printed with ``--json`` and written into ``freemerge.json`` has the keys that the pages list."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from freemerge.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"
FUNCTION = "def score(path):\n    return {'task': 1.0}\ndef logits(state):\n    yield state['a.weight'].T\n"


def documented(page: str, section: str, *rows: str) -> set[str]:
    """The words in backticks of the second column of rows of a table."""
    text = (DOCS / page).read_text().split(f"## {section}", 1)[1].split("\n## ", 1)[0]
    cells = [line.strip("|").split("|")[:2] for line in text.splitlines() if line.startswith("| `")]
    return {word for row, keys in cells if row.strip() in rows for word in re.findall(r"`(\w+)`", keys)}


def keys(value: object) -> set[str]:
    """Of objects, and of objects in lists."""
    if isinstance(value, list):
        return set[str]().union(*(keys(item) for item in value))
    if not isinstance(value, dict):
        return set()
    return set(value).union(*(keys(item) for item in value.values() if isinstance(item, list)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        save_file({"a.weight": torch.randn(16, 16), "a.bias": torch.randn(16)}, f"{name}.safetensors")
    Path("f.py").write_text(FUNCTION)
    return tmp_path


MODELS = ("base.safetensors", "a.safetensors", "b.safetensors")
CALLS = {
    "inspect": MODELS,
    "tune": (*MODELS, "-o", "t.yml", "--function", "f.py:logits", "--method", "task_arithmetic", "--iterations", "2"),
    "experts": (*MODELS, "-o", "experts"),
    "lora": (*MODELS[:2], "--rank", "2", "-o", "adapter"),
    "analyze": (*MODELS, "-o", "report.html"),
    "evaluate": (MODELS[1], "--function", "f.py:score"),
    "diff": MODELS[1:],
    "backends": (),
    "completion": ("bash",),
}


@pytest.mark.parametrize("command", CALLS)
def test_the_keys_of_a_command(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, *CALLS[command], "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[0])
    listed = documented("command-line.md", "What every command has", f"`{command}`", f"`{command}`, `merge --dry-run`")
    shallow = command in ("analyze", "tune", "backends")  # whose lists hold more than the page says
    assert (set(found) if shallow else keys(found)) <= listed
    assert set(found) <= listed <= keys(found) | set(found)


def test_the_keys_of_a_merge_and_its_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["merge", *MODELS, "-o", "out", "--json"])
    found = json.loads(capsys.readouterr().out)
    listed = documented("command-line.md", "What every command has", "`merge`")
    assert set(found) | keys(found["stages"]) | {"inspect"} == listed
    manifest = json.loads((folder / "out" / "freemerge.json").read_text())
    text = (DOCS / "engine.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", text.split("`freemerge.json` in a merged directory")[1], re.MULTILINE)
    assert {word for row in rows for word in re.findall(r"`(\w+)`", row)} == set(manifest)
    assert set(manifest["tensors"]["a.weight"]) <= set(re.findall(r"`(\w+)`", text.split("| `tensors` |")[1]))
