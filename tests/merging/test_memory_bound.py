"""Anonymous memory of a merge is bounded by a few of its largest tensors, whatever the size and number of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import freemerge as fm

ROWS, COLUMNS, TENSORS = 3000, 4096, 4

SCRIPT = """
    import re, sys, threading
    from pathlib import Path
    import freemerge as fm
    import freemerge.merging.run

    paths = [Path(name) for name in sys.argv[2:]]
    peak, done = 0, threading.Event()

    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))

    thread = threading.Thread(target=watch)
    thread.start()
    fm.merge_checkpoints(paths[0], paths[1:], sys.argv[1], progress=False)
    done.set()
    thread.join()
    print(peak * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [2, 16])
def test_three_of_the_largest_tensors_and_300_megabytes(count: int, tmp_path: Path) -> None:
    for index in range(2):
        generator = torch.Generator().manual_seed(index)
        state = {f"{i}.w": torch.randn(ROWS, COLUMNS, generator=generator).bfloat16() for i in range(TENSORS)}
        save_file(state, tmp_path / f"{index}.safetensors")
    models = [tmp_path / f"model-{index}.safetensors" for index in range(count)]
    for model in models:
        os.link(tmp_path / "1.safetensors", model)
    assert peak(tmp_path, tmp_path / "0.safetensors", *models) < 3 * 4 * ROWS * COLUMNS + 300e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["LoRA", "float8"])
def test_what_is_computed_when_it_is_read_is_held_once_and_told(kind: str, tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(2 * ROWS, COLUMNS).bfloat16()}
    save_file(weights, tmp_path / "base.safetensors")
    model = tmp_path / "model"
    model.mkdir()
    if kind == "LoRA":
        factors = {"A": torch.ones(8, COLUMNS) / 64, "B": torch.ones(2 * ROWS, 8) / 64}
        stored = {f"base_model.model.a.lora_{name}.weight": factor for name, factor in factors.items()}
        (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8}))
        save_file(stored, model / "adapter_model.safetensors")
    else:
        stored = {"a.weight": weights["a.weight"].to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(47, 32)}
        save_file(stored, model / "model.safetensors")
    held = peak(tmp_path, tmp_path / "base.safetensors", model)
    plain, told = (
        fm.inspect(tmp_path / "base.safetensors", [tuned]).memory_bytes
        for tuned in (tmp_path / "base.safetensors", model)
    )
    tensor = 4 * 2 * ROWS * COLUMNS
    assert told - plain == tensor
    assert held < min(told, 4 * tensor + 300e6)


def peak(tmp_path: Path, *inputs: Path) -> int:
    """Anonymous bytes of a process that merges them."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, script, tmp_path / "out", *inputs]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)
