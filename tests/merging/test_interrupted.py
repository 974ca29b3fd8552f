"""Merges that are killed, stopped, resumed or disturbed: nothing is lost, nothing half made is seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import freemerge as fm
from freemerge.checkpoint import Checkpoint
from freemerge.checkpoint.adapter_config import AdapterConfig
from freemerge.checkpoint.journal import JOURNAL
from freemerge.checkpoint.staging import hidden

KILLS = int(os.environ.get("FREEMERGE_KILLS", "12"))


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """A process in the background of a script ignores some, and so do its children, and nohup's."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two models of 6 MB with matrices, small vectors and a wider dtype, in the files "0" to "2"."""
    paths = []
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        state = {f"l.{i}.w": torch.randn(512, 512, generator=generator).bfloat16() for i in range(11)}
        state |= {f"l.{i}.b": torch.randn(64, generator=generator) for i in range(11)}
        paths.append(tmp_path / f"{index}.safetensors")
        save_file(state, paths[-1])
    return paths


def merged(models: list[Path], out: Path, **options: object) -> dict[str, bytes]:
    fm.merge_checkpoints(models[0], models[1:], out, progress=False, max_shard_bytes=2_000_000, **options)  # type: ignore[arg-type]
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    import freemerge as fm

    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)  # processes are forked, and threads would be missing in the child
    paths = [folder / f"{i}.safetensors" for i in range(3)]
    fm.merge  # so that no child imports

    def merge():
        fm.merge_checkpoints(
            paths[0], paths[1:], folder / "out", progress=False, max_shard_bytes=2_000_000, memory=1, resume=True
        )

    def child(seconds=None):
        pid = os.fork()
        if pid == 0:
            merge()
            os._exit(0)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    import freemerge.merging.run, freemerge.checkpoint.writer
    start = time.perf_counter()
    assert child() == 0
    whole = time.perf_counter() - start
    expected = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    random.seed(0)
    died = 0
    for _ in range(kills):
        for path in (folder / "out").iterdir():
            path.unlink()
        (folder / "out").rmdir()
        for _ in range(3):  # killed again and again
            if child(random.uniform(0.2, 1.0) * whole) == 0:
                break
            died += 1
            assert not (folder / "out").exists() or sorted(os.listdir(folder / "out")) == sorted(expected)
            if (folder / "out").exists():
                break
        if not (folder / "out").exists():
            assert child() == 0
        assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == expected
    print(died)
"""


def test_killed_at_random_and_resumed_the_bytes_are_those_of_an_undisturbed_run(
    models: list[Path], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))
    run = subprocess.run(
        [sys.executable, script, tmp_path, str(KILLS)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0, "some died before they were done"
    assert fm.verify(tmp_path / "out") == []


class Killed(BaseException):
    """Ends a merge so that its hidden directory stays, as a kill does."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Path], Path, int], None]:
    """Merge, but stop after so many tensors were written and leave everything as it is."""

    def run(models: list[Path], out: Path, count: int) -> None:
        from freemerge.checkpoint.writer import CheckpointWriter

        write, abort = CheckpointWriter._write, CheckpointWriter._abort
        written = 0

        def stopping(self: CheckpointWriter, *arguments: object) -> None:
            nonlocal written
            if written == count:
                for file in self._files.values():
                    file.hand_over()
                for stage in ("write", "hash"):  # these threads finish what they were given, one after the other
                    self._background._threads[stage].submit(lambda: None).result()
                raise Killed
            written += 1
            write(self, *arguments)  # type: ignore[arg-type]

        def leaving(self: CheckpointWriter) -> None:
            self._background.close()
            assert self._journal is not None
            self._journal.close()
            self._staging.end(keep=True)

        monkeypatch.setattr(CheckpointWriter, "_write", stopping)
        monkeypatch.setattr(CheckpointWriter, "_abort", leaving)
        with pytest.raises(Killed):
            merged(models, out)
        monkeypatch.setattr(CheckpointWriter, "_write", write)
        monkeypatch.setattr(CheckpointWriter, "_abort", abort)

    return run


def test_finished_tensors_are_not_merged_again(
    models: list[Path],
    tmp_path: Path,
    killed: Callable[[list[Path], Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = merged(models, tmp_path / "whole")
    killed(models, tmp_path / "out", 17)
    from freemerge.merging.engine import Merger

    done: list[str] = []
    merge = Merger.merged
    monkeypatch.setattr(Merger, "merged", lambda self, unit, *rest: done.extend(unit.names) or merge(self, unit, *rest))
    monkeypatch.setattr(Merger, "measure", None)  # the weights were noted down
    assert merged(models, tmp_path / "out", resume=True) == expected
    assert 0 < len(done) < 22
    assert not hidden(tmp_path / "out").exists()


def test_progress_counts_what_is_left(
    models: list[Path],
    tmp_path: Path,
    killed: Callable[[list[Path], Path, int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed(models, tmp_path / "out", 17)
    for name in ("out", "whole"):
        fm.merge_checkpoints(
            models[0], models[1:], tmp_path / name, progress="json", max_shard_bytes=2_000_000, resume=True
        )
    starts = [event for event in map(json.loads, capsys.readouterr().err.splitlines()) if event["event"] == "start"]
    size = sum(path.stat().st_size for path in models)
    left, everything = (event["read_bytes"] for event in starts)
    assert 0 < left < 0.7 * size, "nothing is measured again, and not everything merged"
    assert 1.9 * size < everything < 2 * size


def test_damage_is_found_and_written_again(
    models: list[Path], tmp_path: Path, killed: Callable[[list[Path], Path, int], None]
) -> None:
    expected = merged(models, tmp_path / "whole")
    killed(models, tmp_path / "out", 17)
    first = sorted(hidden(tmp_path / "out").glob("*.safetensors"))[0]
    damaged = bytearray(first.read_bytes())
    damaged[-5] ^= 1
    first.write_bytes(damaged)
    with open(hidden(tmp_path / "out") / JOURNAL, "a") as stream:
        stream.write('{"file": "cut sho')
    assert merged(models, tmp_path / "out", resume=True) == expected


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"[]", b"5", b"null", b"[" * 100_000])
@pytest.mark.parametrize("line", [0, 2, -2])
def test_a_damaged_journal_is_believed_up_to_there(
    damage: bytes, line: int, models: list[Path], tmp_path: Path, killed: Callable[[list[Path], Path, int], None]
) -> None:
    expected = merged(models, tmp_path / "whole")
    killed(models, tmp_path / "out", 17)
    journal = hidden(tmp_path / "out") / JOURNAL
    lines = journal.read_bytes().split(b"\n")
    lines[line] = damage
    journal.write_bytes(b"\n".join(lines))
    assert merged(models, tmp_path / "out", resume=True) == expected


@pytest.mark.parametrize("step", ["write_json", "flush_directory", "remove_journals"])
def test_a_run_that_is_killed_while_it_publishes_is_resumed(
    step: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that was merged is kept until nothing but the renaming is left."""
    from freemerge.checkpoint import staging, writer
    from freemerge.merging.engine import Merger

    for number, path in enumerate(models):
        (tmp_path / f"m{number}" / "sub").mkdir(parents=True)
        path.rename(tmp_path / f"m{number}" / "model.safetensors")
        (tmp_path / f"m{number}" / "sub" / "notes.json").write_text("{}")
    folders = [tmp_path / f"m{number}" for number in range(3)]
    expected = {path: path.read_bytes() for path in hidden_free(merged_directory(folders, tmp_path / "whole"))}

    def kill(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(staging if step == "flush_directory" else writer, step, kill)
        patch.setattr(
            writer.CheckpointWriter, "_abort", lambda self: self._journal.close() or self._staging.end(keep=True)
        )
        with pytest.raises(Killed):
            merged_directory(folders, tmp_path / "out")
    assert hidden(tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Merger, "merged", None)
        out = merged_directory(folders, tmp_path / "out", resume=True)
    assert {tmp_path / "whole" / path.relative_to(out): path.read_bytes() for path in hidden_free(out)} == expected


def merged_directory(models: list[Path], out: Path, **options: bool) -> Path:
    fm.merge_checkpoints(models[0], models[1:], out, progress=False, max_shard_bytes=2_000_000, **options)  # type: ignore[arg-type]
    return out


def hidden_free(folder: Path) -> list[Path]:
    """The files of an output, none of which is hidden."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith(".")]
    return files


def test_what_no_merge_left_is_neither_deleted_nor_continued(models: list[Path], tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    left = hidden(tmp_path / "out")
    for make in (left.symlink_to, left.write_text):  # a link to a directory, a file
        make(str(precious))
        for resume in (True, False):
            with pytest.raises(
                fm.RefusedError, match=r"\.out\.freemerge-tmp is in the way, which is no directory; remove"
            ):
                merged(models, tmp_path / "out", resume=resume)
        left.unlink()
    assert contents(precious) == {"thesis.txt": b"years of work"}
    precious.rename(left)
    with pytest.raises(fm.RefusedError, match="has no journal to go on with; run without resume"):
        merged(models, tmp_path / "out", resume=True)
    assert contents(left) == {"thesis.txt": b"years of work"}


def test_another_merge_is_not_continued(
    models: list[Path], tmp_path: Path, killed: Callable[[list[Path], Path, int], None]
) -> None:
    killed(models, tmp_path / "out", 5)
    with pytest.raises(fm.RefusedError, match="cannot be continued, as other recipe made it"):
        fm.merge_checkpoints(
            models[0], models[1:], tmp_path / "out", fm.Recipe(scale=0.1), progress=False, max_shard_bytes=2_000_000,
            resume=True,
        )  # fmt: skip


def test_changed_inputs_are_not_continued(
    models: list[Path], tmp_path: Path, killed: Callable[[list[Path], Path, int], None]
) -> None:
    killed(models, tmp_path / "out", 5)
    os.utime(models[1])
    with pytest.raises(fm.RefusedError, match="as other inputs made it"):
        merged(models, tmp_path / "out", resume=True)
    assert hidden(tmp_path / "out").exists(), "what was left is there for the right merge"


def test_another_state_dict_of_the_same_file_is_not_continued(
    models: list[Path], tmp_path: Path, killed: Callable[[list[Path], Path, int], None]
) -> None:
    torch.save({"model": load_file(models[1]), "ema": load_file(models[2])}, tmp_path / "m.pt")
    both = [Path(f"{tmp_path / 'm.pt'}::{key}") for key in ("model", "ema")]
    killed([models[0], both[0]], tmp_path / "out", 5)
    with pytest.raises(fm.RefusedError, match="as other inputs made it"):
        merged([models[0], both[1]], tmp_path / "out", resume=True)
    expected = merged([models[0], both[0]], tmp_path / "whole")
    assert merged([models[0], both[0]], tmp_path / "out", resume=True) == expected


def test_what_another_backend_began_is_not_continued(
    models: list[Path], tmp_path: Path, killed: Callable[[list[Path], Path, int], None]
) -> None:
    killed(models, tmp_path / "out", 5)
    with pytest.raises(fm.RefusedError, match="as other backend made it"):
        merged(models, tmp_path / "out", resume=True, backend="torch")


def test_what_another_transformers_began_is_not_continued(
    models: list[Path],
    tmp_path: Path,
    killed: Callable[[list[Path], Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its classes say which way layers are stored, what is tied, and how files hold it."""
    killed(models, tmp_path / "out", 5)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    with pytest.raises(fm.RefusedError, match="as other versions made it"):
        merged(models, tmp_path / "out", resume=True)


@pytest.fixture
def changing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of the first layer whose config says something else as soon as it has been read."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config, options = folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    config.write_text(json.dumps(options))
    factors = {"A": torch.ones(2, 512), "B": torch.ones(512, 2)}
    save_file(
        {f"base_model.model.l.0.lora_{half}.weight": tensor for half, tensor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    read = AdapterConfig.read

    def once(path: Path) -> AdapterConfig:
        found = read(path)
        monkeypatch.setattr(AdapterConfig, "read", staticmethod(read))
        config.write_text(json.dumps(options | {"lora_alpha": 10}))
        return found

    monkeypatch.setattr(AdapterConfig, "read", staticmethod(once))
    return folder


@pytest.fixture
def base_of_the_adapter(models: list[Path], tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file({name.replace(".w", ".weight"): tensor for name, tensor in load_file(models[0]).items()}, path)
    return path


def test_a_manifest_names_no_config_that_was_not_read(
    base_of_the_adapter: Path, changing: Path, tmp_path: Path
) -> None:
    with pytest.raises(fm.CheckpointError, match=r"adapter_config\.json changed while it was being read"):
        merged([base_of_the_adapter, changing], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_configs_are_not_mixed(
    base_of_the_adapter: Path, changing: Path, tmp_path: Path, killed: Callable[[list[Path], Path, int], None]
) -> None:
    killed([base_of_the_adapter, changing], tmp_path / "out", 5)
    with pytest.raises(fm.RefusedError, match="as other inputs made it"):
        merged([base_of_the_adapter, changing], tmp_path / "out", resume=True)


def test_a_file_that_is_given_twice_and_changes_in_between(models: list[Path], tmp_path: Path) -> None:
    base = Checkpoint.open(models[0])
    os.utime(models[0])
    with pytest.raises(fm.CheckpointError, match=r"0\.safetensors changed while it was being read"):
        merged([base, models[1], models[0]], tmp_path / "out")  # type: ignore[list-item]


def test_no_file_of_a_model_is_taken_for_the_journal(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    models[0].rename(tmp_path / "base" / "model.safetensors")
    for name in ("journal.jsonl", "journal-1.jsonl"):
        (tmp_path / "base" / name).write_text("of the base")
    out = merged([tmp_path / "base", *models[1:]], tmp_path / "out")
    assert out["journal.jsonl"] == out["journal-1.jsonl"] == b"of the base"


def test_without_resume_it_begins_anew(
    models: list[Path], tmp_path: Path, killed: Callable[[list[Path], Path, int], None]
) -> None:
    expected = merged(models, tmp_path / "whole")
    killed(models, tmp_path / "out", 5)
    assert merged(models, tmp_path / "out") == expected
    assert merged(models, tmp_path / "new", resume=True) == expected, "nothing to resume: the whole is merged"


def test_what_is_in_memory_cannot_be_resumed(tmp_path: Path) -> None:
    state = {"a": torch.ones(3)}
    with pytest.raises(fm.ArgumentError, match="resume: only what is made from files"):
        fm.merge_checkpoints(state, [state], tmp_path / "out", resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the pages")
@pytest.mark.parametrize("index", [0, 2])
def test_an_input_that_is_cut_short_while_it_is_read(
    index: int, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freemerge.merging import pinned

    slow(models)
    fetched, count = pinned.fetched, 0

    def cut(tensor: torch.Tensor, source: Checkpoint, name: str) -> torch.Tensor:
        """The file shrinks between the mapping of its last tensors and their reading."""
        nonlocal count
        count += source.path == models[index]
        if count == 20:
            os.truncate(models[index], 100_000_000)
        return fetched(tensor, source, name)

    monkeypatch.setattr(pinned, "fetched", cut)
    message = rf"{index}\.safetensors (was cut short|changed) while it was being read"
    with pytest.raises(fm.CheckpointError, match=message):
        merged(models, tmp_path / "out")
    assert not hidden(tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["touched", "truncated", "replaced"])
def test_inputs_that_change_meanwhile(
    change: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freemerge.checkpoint.manifest import InputHashes

    records = InputHashes.records

    def late(self: InputHashes) -> list[dict[str, object]]:
        """Everything has been read."""
        if change == "touched":
            os.utime(models[2])
        elif change == "truncated":
            os.truncate(models[2], 1000)
        else:
            models[2].write_bytes(models[1].read_bytes())
        return records(self)

    monkeypatch.setattr(InputHashes, "records", late)
    with pytest.raises(fm.CheckpointError, match=r"2\.safetensors changed while it was being read"):
        merged(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not hidden(tmp_path / "out").exists()


# The command --------------------------------------------------------------------------------------------------------


def start(models: list[Path], out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "freemerge", "merge", *map(str, models), "-o", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def slow(models: list[Path]) -> None:
    """Replace the models by ones that take a second or more."""
    for index, path in enumerate(models):
        generator = torch.Generator().manual_seed(index)
        save_file({f"l.{i}.w": torch.randn(1500, 1500, generator=generator) for i in range(24)}, path)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")],
)
def test_signals_during_the_merge(number: int, code: int, word: str, models: list[Path], tmp_path: Path) -> None:
    slow(models)
    with start(models, tmp_path / "out", "--quiet") as process:
        while not hidden(tmp_path / "out").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out, err) == (code, "", f"freemerge: {word}; no output was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", "2.safetensors"]


@pytest.mark.parametrize("seconds", [0.3, 1.0])
def test_ctrl_c_while_importing(seconds: float, models: list[Path], tmp_path: Path) -> None:
    slow(models)
    with start(models, tmp_path / "out", "--quiet") as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
    assert process.returncode in (130, -signal.SIGINT), "before Python runs our first line it is not ours to handle"
    assert process.returncode < 0 or err == "freemerge: interrupted; no output was written\n"
    assert not (tmp_path / "out").exists()


def test_a_signal_after_the_renaming_says_that_the_output_was_written(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from freemerge.checkpoint.staging import Staging
    from freemerge.cli import main

    end = Staging.end

    def interrupted(self: Staging) -> None:
        monkeypatch.setattr(Staging, "end", end)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(Staging, "end", interrupted)
    assert main(["merge", *map(str, models), "-o", str(tmp_path / "out"), "--quiet"]) == 130
    assert f"interrupted; {tmp_path / 'out'} was written" in capsys.readouterr().err
    assert fm.verify(tmp_path / "out") == []


def test_leftovers_are_found_and_removed_but_not_those_of_living_runs(
    models: list[Path],
    tmp_path: Path,
    killed: Callable[[list[Path], Path, int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from freemerge.checkpoint.locks import DirectoryLock
    from freemerge.checkpoint.staging import Staging
    from freemerge.cli import main

    killed(models, tmp_path / "out", 5)
    living = Staging(tmp_path / "other")
    (tmp_path / ".kept.freemerge-tmp-old").mkdir()
    assert main(["clean", str(tmp_path), "--dry-run"]) == 0
    assert hidden(tmp_path / "out").exists()
    assert "left by a killed run" in capsys.readouterr().out
    assert main(["clean", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"{hidden(tmp_path / 'out')}: removed" in told
    assert f"{hidden(tmp_path / 'other')}: kept, a run is writing it" in told
    assert "kept, a whole output" in told
    assert not hidden(tmp_path / "out").exists()
    assert hidden(tmp_path / "other").exists()
    monkeypatch.setattr(DirectoryLock, "take", lambda self: None)  # as on a file system without locks
    assert main(["clean", str(tmp_path)]) == 0
    assert "other.freemerge-tmp: kept, as its file system cannot tell whether" in capsys.readouterr().out
    monkeypatch.undo()
    living.end()
    assert main(["clean", str(tmp_path / "nowhere")]) == 1


def test_outputs_that_cannot_be_meant(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from freemerge.cli import main

    (tmp_path / "here" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deeper")
    for out, message in ((".", "is the current directory"), ("..", "above the current")):
        assert main(["merge", *map(str, models), "-o", out, "--force"]) == 3
        assert message in capsys.readouterr().err
    merged(models, tmp_path / "model")
    inside = tmp_path / "model" / "out"
    assert main(["merge", str(tmp_path / "model"), str(tmp_path / "model"), "-o", str(inside)]) == 3
    assert "is inside of an input" in capsys.readouterr().err
