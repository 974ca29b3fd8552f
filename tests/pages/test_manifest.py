"""freemerge.json has the keys that docs/engine.md lists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

import freemerge as fm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engine.md"


def test_the_keys_of_a_manifest(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b")]
    for path in paths:
        save_file({"a.weight": torch.randn(16, 16)}, path)
    fm.merge_checkpoints(paths[0], paths[1:], tmp_path / "out", progress=False)
    manifest = json.loads((tmp_path / "out" / "freemerge.json").read_text())
    rows = re.findall(
        r"^\| (`[^|]+) \| (.+) \|$", PAGE.read_text().split("`freemerge.json` in a merged")[1], re.MULTILINE
    )
    listed = {key: set(re.findall(r"`(\w+)`", text)) for keys, text in rows for key in re.findall(r"`(\w+)`", keys)}
    assert listed.keys() == manifest.keys()
    assert manifest["tensors"]["a.weight"].keys() <= listed["tensors"]
    assert manifest["base"].keys() | manifest["base"]["files"][0].keys() == listed["base"]
    assert manifest["files"]["model.safetensors"].keys() == listed["files"]
    assert manifest["recipe"].keys() >= listed["recipe"]
