"""What other systems lack is not needed to import freemerge, to merge in memory, to read files, or to write one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import hashlib, mmap, os, pathlib, signal, sys
import torch
from safetensors.torch import save_file
sys.modules["fcntl"] = sys.modules["resource"] = None
for name in ("pread", "preadv", "pwrite", "posix_fadvise", "statvfs", "register_at_fork", "O_DIRECTORY"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("MAP_PRIVATE", "MAP_NORESERVE", "PROT_READ", "PROT_WRITE"):
    if hasattr(mmap, name):
        delattr(mmap, name)
del signal.SIGHUP
import freemerge as fm
import freemerge.cli
folder = sys.argv[1]
tensors = {"small.weight": torch.randn(6, 5), "large.weight": torch.randn(700, 900), "bias": torch.randn(3)}
states = [{name: tensor + i * 0.1 * torch.sin(7 * tensor) for name, tensor in tensors.items()} for i in range(3)]
paths = [f"{folder}/{i}.safetensors" for i in range(3)]
for path, state in zip(paths, states):
    save_file(state, path)
expected = fm.merge(states[0], states[1:])
read = fm.merge(paths[0], paths[1:])
assert all(torch.equal(read[name], expected[name]) for name in tensors)

from freemerge.checkpoint.shard_file import Background, ShardFile
shard, whole, background = pathlib.Path(folder, "shard"), {}, Background(1 << 20)
content = bytes(range(256)) * 40
file = ShardFile(shard, content[:100], len(content), background, whole.__setitem__, {})
for begin, end in (5000, len(content)), (100, 700), (700, 5000):
    file.write(begin, memoryview(content)[begin:end])
file.hand_over()
assert background.result(file.sha256) == hashlib.sha256(content).hexdigest()
assert shard.read_bytes() == content
assert ShardFile(shard, b"", len(content), background, whole.__setitem__, whole).whole == len(content)
background.close()
"""


def test_without_what_windows_lacks(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
