"""Anonymous memory of a merge is bounded by a few of its largest tensors, whatever the size and number of models."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, script, tmp_path / "out", tmp_path / "0.safetensors", *models]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 3 * 4 * ROWS * COLUMNS + 300e6
