"""Memory is bounded by a few tensors, however large the model: measured in a process of its own."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TENSORS, ROWS, COLUMNS = 12, 4096, 6144  # bfloat16: 48 MiB each, 576 MiB in all
LARGEST_KIB = ROWS * COLUMNS * 2 // 1024

PREAMBLE = f"""
    import os, re, sys
    from pathlib import Path
    import torch
    from freemerge.checkpoint import Checkpoint, CheckpointWriter, InputHashes, TensorSpec, check_finite, verify

    folder = Path(sys.argv[1])
    names = [f"t{{i:02d}}" for i in range({TENSORS})]
    specs = [TensorSpec(name, ({ROWS}, {COLUMNS}), torch.bfloat16) for name in names]

    def kib(field):
        return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

    class Peak:
        def __enter__(self):
            Path("/proc/self/clear_refs").write_text("5")
            self.before = kib("VmRSS")
        def __exit__(self, *error):
            print(kib("VmHWM") - self.before)

    def write(out):
        with CheckpointWriter(folder / out, specs, max_shard_bytes=2 * specs[0].nbytes, memory=1, force=True) as writer:
            for number, name in enumerate(names):
                writer.write(name, torch.full(specs[0].shape, float(number), dtype=torch.bfloat16))

    def read_all(path):
        with Checkpoint.open(path) as checkpoint:
            for number, name in enumerate(names):
                tensor = checkpoint.read(name)
                check_finite(name, tensor, "here")
                assert tensor[0, 0] == tensor[-1, -1] == number

    warm = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    check_finite("warm", warm, "here")
"""


def peaks(tmp_path: Path, body: str) -> list[int]:
    """Run a script; each ``with Peak()`` in it gives the growth of the resident set, file pages included, in KiB."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(body))
    run = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_and_reading_hold_a_few_tensors(tmp_path: Path) -> None:
    body = """
        with Peak():
            write("out")
        with Peak():
            read_all(folder / "out")
        with Peak(), Checkpoint.open(folder / "out") as checkpoint, InputHashes([checkpoint]) as hashes:
            hashes.records()
        with Peak():
            assert verify(folder / "out") == []
    """
    written, read, hashed, verified = peaks(tmp_path, body)
    assert written < 3 * LARGEST_KIB  # one waits, one is handed over, one may not be gone yet
    assert read < 2.5 * LARGEST_KIB
    assert hashed < 0.6 * LARGEST_KIB
    assert verified < 0.6 * LARGEST_KIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_files_are_let_go_of(tmp_path: Path) -> None:
    body = """
        for file in ("a.bin", "b.bin"):
            held = names[: len(names) // 2] if file == "a.bin" else names[len(names) // 2 :]
            torch.save({name: torch.full(specs[0].shape, float(names.index(name)), dtype=torch.bfloat16)
                        for name in held}, folder / file)
        weight_map = {name: "a.bin" if index < len(names) // 2 else "b.bin" for index, name in enumerate(names)}
        import json
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with Peak():
            read_all(folder)
    """
    (read,) = peaks(tmp_path, body)
    assert (
        read < 7.5 * LARGEST_KIB
    )  # 256 MiB until a file is mapped anew, and the tensor that goes beyond; of 12 in all
