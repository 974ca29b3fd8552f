"""Two machines merge one model: two network namespaces with a cable between them, and a directory that both see."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import freemerge as fm

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch with distributed")

SHARDS = 20_000
ENDPOINT = "10.83.7.1:29500"  # within the namespaces only

KILLED = """
    import os, signal
    from freemerge.__main__ import main
    from freemerge.checkpoint.writer import CheckpointWriter

    write, written = CheckpointWriter.write, 0

    def writing(self, *arguments):
        global written
        written += 1
        if os.environ["RANK"] == os.environ["KILLED"] and written > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *arguments)

    CheckpointWriter.write = writing
    raise SystemExit(main())
"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, str]]:
    """Two network namespaces that reach each other, and nothing else; by name the interface of each."""
    if shutil.which("ip") is None:
        pytest.skip("needs the ip command")
    names = [f"freemerge-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"fm{os.getpid() % 100_000}{side}" for side in "ab"]  # at most 15 characters
    try:
        for name in names:
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"may not make a network namespace: {error.stderr.decode().strip()}")
        _ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            _ip("-n", name, "address", "add", f"10.83.7.{number}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield dict(zip(names, ends, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def _torchrun(
    machines: Mapping[str, str], what: Sequence[str | Path], killed: int | None = None
) -> list[tuple[int, str]]:
    """Run it with two workers on each machine: exit status and standard error of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILLED": str(killed)}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={ENDPOINT}", "--rdzv-id=merge",
    ]  # fmt: skip
    agents = []
    for number, (machine, interface) in enumerate(machines.items(), start=1):
        here = [f"--local-addr=10.83.7.{number}", f"--rdzv-conf=join_timeout=120,is_host={number == 1}"]
        inside = ["ip", "netns", "exec", machine, *command, *here, *what]
        own = {**environment, "GLOO_SOCKET_IFNAME": interface}
        agents.append(subprocess.Popen(inside, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        said = [agent.communicate(timeout=240)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, text) for agent, text in zip(agents, said, strict=True)]


def _contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_two_machines_give_the_bytes_of_one_also_after_one_lost_a_worker(
    machines: dict[str, str], tmp_path: Path
) -> None:
    inputs = [tmp_path / f"{index}.safetensors" for index in range(4)]
    for index, path in enumerate(inputs):
        generator = torch.Generator().manual_seed(index)
        state = {f"{i}.w": torch.randn(64, 48, generator=generator).bfloat16() for i in range(40)}
        save_file({**state, "norm": torch.randn(130, generator=generator)}, path)
    fm.merge_checkpoints(inputs[0], inputs[1:], tmp_path / "one", progress=False, max_shard_bytes=SHARDS)
    expected = _contents(tmp_path / "one")
    assert len(expected) > 8, "files for four workers"

    def merge(out: str, *options: str) -> list[str | Path]:
        return ["merge", *inputs, "-o", tmp_path / out, "--max-shard-size", "20KB", "--quiet", *options]

    both = _torchrun(machines, ["-m", "freemerge", *merge("two")])
    assert [status for status, _ in both] == [0, 0], both
    assert _contents(tmp_path / "two") == expected

    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    both = _torchrun(machines, [script, *merge("out")], killed=3)
    assert [status for status, _ in both] == [1, 1], both
    assert any("freemerge: what is finished stays in" in said for _, said in both), both
    assert not (tmp_path / "out").exists()

    both = _torchrun(machines, ["-m", "freemerge", *merge("out", "--resume")])
    assert [status for status, _ in both] == [0, 0], both
    assert _contents(tmp_path / "out") == expected
