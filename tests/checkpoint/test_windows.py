"""Outputs where directories cannot be opened, with the refusals of Windows: written, replaced, resumed, cleaned up."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pretending needs Linux")

BEGIN = """
import os, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from windows import pretend
pretend()
import freemerge as fm
from freemerge.checkpoint import Checkpoint, CheckpointWriter, TensorSpec, verify
from freemerge.checkpoint.journal import JOURNAL
from freemerge.checkpoint.leftovers import clean

folder = Path(sys.argv[1])
specs = [TensorSpec(name, (64,), torch.float32) for name in "abcd"]

def write(out, value, **options):
    with CheckpointWriter(folder / out, specs, max_shard_bytes=512, **options) as writer:
        if not writer.single_file:
            (writer.directory / "config.json").write_text(str(value))
        for name in sorted(set("abcd") - writer.whole):
            writer.write(name, torch.full((64,), float(value)))

def values(out):
    with Checkpoint.open(folder / out) as checkpoint:
        return {float(value) for name in checkpoint.specs for value in checkpoint.read(name)}

def refused(work, message):
    try:
        work()
    except fm.RefusedError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

def names():
    return sorted(path.name for path in folder.iterdir())
"""

PUBLISHED = """
(folder / "empty").mkdir()
for out in ("out", "empty", "one.safetensors", "deep/er/out"):
    write(out, 1)
    assert values(out) == {1.0}, out
    refused(lambda: write(out, 2), "--force")
    write(out, 3, force=True)
    assert values(out) == {3.0}, out
assert verify(folder / "out") == verify(folder / "empty") == []
assert names() == ["deep", "empty", "one.safetensors", "out"], names()
with CheckpointWriter(folder / "out", specs, force=True) as first:
    refused(lambda: write("out", 5, force=True), "another run is writing it")
    assert [left.alive for left in clean(folder)] == [True]
    refused(lambda: write("out", 5, force=True), "another run is writing it")
    for name in "abcd":
        first.write(name, torch.full((64,), 4.0))
assert values("out") == {4.0}
paths = [folder / "base.safetensors", folder / "tuned.safetensors"]
for i, path in enumerate(paths):
    save_file({"w": torch.full((8, 8), float(i))}, path)
fm.merge_checkpoints(paths[0], paths[1:], folder / "merged", fm.Recipe(weights=(1.0,), scale=1.0, cutoff=0.0))
assert verify(folder / "merged") == []
assert torch.equal(load_file(folder / "merged" / "model.safetensors")["w"], torch.ones(8, 8))
assert names() == ["base.safetensors", "deep", "empty", "merged", "one.safetensors", "out", "tuned.safetensors"]
"""

RESUMED = """
def killed(out):
    child = os.fork()
    if child == 0:
        with CheckpointWriter(folder / out, specs, max_shard_bytes=512, identity={"of": out}) as writer:
            for name in "abc":
                writer.write(name, torch.full((64,), 1.0))
            for file in writer._files.values():
                file.hand_over()
            while "00001" not in (writer.directory / JOURNAL).read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)

killed("out")
killed("other")
assert names() == [f".{out}.freemerge-tmp{end}" for out in ("other", "out") for end in ("", "-lock")], names()
write("out", 2, identity={"of": "out"}, resume=True)
assert values("out") == {1.0, 2.0}  # a and b are those of the killed writer
assert verify(folder / "out") == []
assert [left.alive for left in clean(folder, remove=False)] == [False]
assert ".other.freemerge-tmp" in names()
assert [left.path.name for left in clean(folder)] == [".other.freemerge-tmp"]
assert names() == ["out"], names()
(folder / ".out.freemerge-tmp-lock").touch()  # of a writer that was killed when all was in place
assert clean(folder) == []
assert names() == ["out"], names()
"""

KILLED_AT_EVERY_STEP = """
def die_at(step):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event.split(".")[0] in ("open", "os", "shutil") and event not in ("os.listdir", "os.scandir"):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

write("out", 0)
old, step, hidden, new = 0.0, 0, 0, 0
while True:
    step += 1
    child = os.fork()
    if child == 0:
        die_at(step)
        write("out", step, force=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not (folder / "out").exists():  # in the one instant without output, the old one has the hidden name
        assert [left.holds_output for left in clean(folder, remove=False) if left.path.name[-3:] == "old"] == [True]
        (folder / ".out.freemerge-tmp-old").rename(folder / "out")
        hidden += 1
    assert verify(folder / "out") == [], step
    found = values("out") | {float((folder / "out" / "config.json").read_text())}
    assert found in ({old}, {float(step)}), (step, old, found)
    new += found != {old}
    old = found.pop()
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
assert step > 30 and hidden > 0 and new > 1, (step, hidden, new)
assert names() == ["out"], names()
"""


@pytest.mark.parametrize("program", [PUBLISHED, RESUMED, KILLED_AT_EVERY_STEP], ids=["published", "resumed", "killed"])
def test_where_directories_cannot_be_opened(program: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    script = tmp_path / "script.py"
    script.write_text(BEGIN + textwrap.dedent(program))
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path / "work"],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
