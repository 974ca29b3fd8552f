"""Several processes that merge together: the bytes of one, and nothing lost when one of them dies."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import freemerge as fm
from freemerge.workers import Workers

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available()), reason="needs fork, and torch with distributed"
)

# One process imports torch, which takes seconds; from it each test's script is forked, and from that the workers. See
# the last test for torchrun itself.
FORKED = """
    import os, signal, sys, time, traceback
    from pathlib import Path
    import torch
    import torch.distributed as dist
    import freemerge as fm
    from freemerge.checkpoint.writer import CheckpointWriter
    from freemerge.workers import joined


    torch.set_num_threads(1)  # threads would be missing in a child
    folder = Path(sys.argv[1])
    paths = [folder / f"{i}.safetensors" for i in range(4)]
    SHARDS = 130_000

    def in_joined(work):
        with joined() as workers:
            work(workers)

    def child(rank, size, port, work, said, program):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True",
                       "TORCHELASTIC_RESTART_COUNT": "0"}

        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        signal.alarm(120)  # rather than hang
        try:
            program(work)
        except fm.FreemergeError as error:
            print(f"freemerge: {error}", file=sys.stderr, flush=True)
            return 1
        except SystemExit as end:
            return end.code
        except BaseException:
            traceback.print_exc()
            return 99
        return 0

    def run(size, work, program=in_joined, started=None):
        '''The exit codes of the workers, by rank, and what they said; those that were started, if not all.'''
        said = folder / "said"
        said.unlink(missing_ok=True)
        told, tell = os.pipe()
        pids = []
        for rank in range(started or size):
            pids.append(os.fork())
            if pids[-1] == 0:
                os._exit(child(rank, size, int(os.read(told, 5)), work, said, program))
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # after its thread no fork
        os.write(tell, f"{store.port:5}".encode() * size)
        os.close(tell)
        os.close(told)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], said.read_text()

    def merge(out, recipe=fm.Recipe(), **options):
        options = {"max_shard_bytes": SHARDS, "progress": False, **options}
        return lambda workers=None: fm.merge_checkpoints(
            paths[0], paths[1:], folder / out, recipe, **options, **({} if workers is None else {"workers": workers})
        )

    def contents(out):
        return {path.name: path.read_bytes() for path in sorted((folder / out).iterdir())}

    def dying(rank, count, work):
        '''The same work, but a worker (or any) is killed before it writes more than so many tensors.'''
        def killed(workers):
            write, written = CheckpointWriter.write, 0
            def writing(self, *arguments):
                nonlocal written
                written += 1
                if rank in (None, workers.rank) and written > count:
                    for file in self._files.values():
                        file.hand_over()
                    for stage in ("write", "hash"):  # these threads finish what they were given, one after the other
                        self._background._threads[stage].submit(lambda: None).result()
                    os.kill(os.getpid(), signal.SIGKILL)
                write(self, *arguments)
            CheckpointWriter.write = writing
            work(workers)
        return killed

    import freemerge.merging.run, freemerge.checkpoint.staging
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                exec(compile(Path(line.strip()).read_text(), line.strip(), "exec"), globals())
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models of .6 MB: matrices, of which three are stacked over two files, small ones, two dtypes."""
    folder = tmp_path_factory.mktemp("models")
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        state = {f"l.{i}.{k}": torch.randn(96, 128, generator=generator).bfloat16() for i in range(7) for k in "qkv"}
        state |= {f"l.{i}.norm": torch.randn(130, generator=generator) for i in range(7)}
        state |= {"head": torch.randn(257, 100, generator=generator), "step": torch.tensor(3)}
        state |= {
            "bn.running_var": torch.full((40,), 1.0 + index),
            "l.3.moving_mean": torch.randn(500, generator=generator),
        }
        save_file(state, folder / f"{index}.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[subprocess.Popen[str]]:
    script = models / "server.py"
    script.write_text(textwrap.dedent(FORKED))
    with (
        open(models / "errors", "w") as errors,
        subprocess.Popen(
            [sys.executable, script, models], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        yield process
        assert process.stdin is not None
        process.stdin.close()


def forked(models: Path, server: subprocess.Popen[str], body: str) -> None:
    """Run a script in the server's child; what it asserts holds."""
    script = models / "script.py"
    script.write_text(textwrap.dedent(body))
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{script}\n")
    server.stdin.flush()
    assert server.stdout.readline() == "0\n", (models / "errors").read_text()


def test_the_bytes_are_those_of_one_process(models: Path, server: subprocess.Popen[str]) -> None:
    forked(
        models,
        server,
        """
        from freemerge.merging.selection import Stack
        stacked = fm.Recipe(views=(Stack(("*.q", "*.k", "*.v")),))
        recipes = {
            "fr": stacked, "own": fm.Recipe(scope="tensor", stats="filtered"), "ties": fm.Recipe(method="ties"),
            "pcb": fm.Recipe(method="pcb"), "scaled": fm.Recipe(method="wudi"),
            "before": fm.Recipe(method="ties", filter="before"), "apart": fm.Recipe(scale="interference"),
        }
        for name, recipe in recipes.items():
            merge(name, recipe)()
            expected = contents(name)
            assert len(expected) > 4
            for size in (2, 4) if name == "fr" else (3,):
                codes, said = run(size, merge(f"{name}{size}", recipe))
                assert codes == [0] * size, said
                assert contents(f"{name}{size}") == expected, (name, size)
        merge("one.safetensors")()
        assert run(2, merge("two.safetensors"))[0] == [0, 0], "a worker without a file"
        assert (folder / "two.safetensors").read_bytes() == (folder / "one.safetensors").read_bytes()
        """,
    )


def test_a_killed_worker_ends_all_and_any_number_of_workers_goes_on(
    models: Path, server: subprocess.Popen[str]
) -> None:
    forked(
        models,
        server,
        """
        from freemerge.merging.engine import Merger
        merge("whole")()
        for rank in (0, 1):
            codes, said = run(2, dying(rank, 4, merge("out")))
            assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, (codes, said)
            assert "another worker has ended" in said and "--resume goes on" in said and "Traceback" not in said, said
            assert not (folder / "out").exists()
            if rank == 0:  # once more, killed again
                codes, said = run(3, dying(None, 0, merge("out", resume=True)))
                assert -signal.SIGKILL in codes and set(codes) <= {1, -signal.SIGKILL}, (codes, said)
            def resuming(workers):
                done, merged = [], Merger.merged
                Merger.merged = lambda self, unit, *rest: done.append(unit) or merged(self, unit, *rest)
                merge("out", resume=True)(workers)
                (folder / f"done{workers.rank}").write_text(str(len(done)))
            size = 4 if rank == 0 else 1
            codes, said = run(size, resuming) if size > 1 else (resuming(fm.workers.ALONE), "")
            assert codes in ([0] * 4, None), said
            done = sum(int((folder / f"done{i}").read_text()) for i in range(size))
            assert 0 < done < 22, done
            assert contents("out") == contents("whole")
            for path in (folder / "out").iterdir():
                path.unlink()
            (folder / "out").rmdir()
        """,
    )


def test_what_is_wrong_is_told_once(models: Path, server: subprocess.Popen[str]) -> None:
    """In the arguments, in a tensor of one worker, on a worker with another view of the files."""
    forked(
        models,
        server,
        """
        from safetensors.torch import load_file, save_file
        (folder / "old").mkdir()
        (folder / "old" / "file").touch()
        codes, said = run(3, merge("old"))
        assert sorted(codes) == [1, 1, 1] and said.count("freemerge:") == 1 and "is not empty" in said, (codes, said)

        state = load_file(paths[1])
        state["l.6.v"][3, 5] = float("nan")
        save_file(state, folder / "nan.safetensors")
        paths[1] = folder / "nan.safetensors"
        codes, said = run(2, merge("out", force=True))
        assert codes == [1, 1] and said.count("l.6.v") == 1 and "Traceback" not in said, (codes, said)
        assert not (folder / "out").exists()
        paths[1] = folder / "1.safetensors"

        def elsewhere(workers):
            merge("out" if workers.rank == 0 else "other/out")(workers)
        freemerge.checkpoint.staging.SEEN_WITHIN = 0.5
        codes, said = run(2, elsewhere)
        assert codes == [1, 1] and "file system that all workers share" in said, (codes, said)

        def otherwise(workers):
            merge("out", fm.Recipe(scale=0.5 + workers.rank))(workers)
        codes, said = run(2, otherwise)
        assert codes == [1, 1] and "worker 1 has other recipe than the first one" in said, (codes, said)
        """,
    )


def test_a_living_worker_keeps_others_away(models: Path, server: subprocess.Popen[str]) -> None:
    """Also if the first one is dead: what it would go on writing must not get into the files of another run."""
    forked(
        models,
        server,
        """
        from freemerge.checkpoint.leftovers import clean
        def lingering(workers):
            if workers.rank == 1:
                finish = CheckpointWriter.finish
                def slow(self):
                    (folder / "lingers").touch()
                    while (folder / "lingers").exists():
                        time.sleep(0.01)
                    finish(self)
                CheckpointWriter.finish = slow
            dying(0, 1, merge("shared", resume=True))(workers)
        watcher = os.fork()
        if watcher == 0:
            while not (folder / "lingers").exists():
                time.sleep(0.01)
            time.sleep(0.2)
            try:
                for resume in (False, True):
                    try:
                        merge("shared", resume=resume)()
                        os._exit(1)
                    except fm.RefusedError as error:
                        assert "another run is writing it" in str(error)
                assert [left.alive for left in clean(folder) if left.path.name.startswith('.shared')] == [True]
                (folder / "lingers").unlink()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        codes, said = run(2, lingering)
        assert os.waitpid(watcher, 0)[1] == 0
        assert codes == [-signal.SIGKILL, 1], (codes, said)
        merge("shared", resume=True)()
        merge("new")()
        assert contents("shared") == contents("new")
        """,
    )


def test_experts_are_those_of_one_process(models: Path, server: subprocess.Popen[str]) -> None:
    forked(
        models,
        server,
        """
        def extract(out):
            def work(workers=fm.workers.ALONE):
                experts = fm.iter_experts(paths[0], paths[1:], rescale="paper", workers=workers)
                saved = fm.save_experts(experts, folder / out, workers=workers)
                assert [expert.task for expert in saved] == ["1", "2", "3"]
            return work
        extract("experts")()
        codes, said = run(2, extract("experts2"))
        assert codes == [0, 0], said
        assert contents("experts2") == contents("experts") and len(contents("experts")) == 3
        codes, said = run(2, extract("experts"))
        assert codes == [1, 1] and said.count("freemerge:") == 1 and "is not empty" in said, said
        """,
    )


def test_a_program_that_goes_on_after_an_error_of_one_worker_merges_no_more_with_the_others(
    models: Path, server: subprocess.Popen[str]
) -> None:
    """What one does next would be taken for what the others wait for."""
    forked(
        models,
        server,
        """
        from safetensors.torch import load_file, save_file
        state = load_file(paths[1])
        state["l.6.v"][3, 5] = float("nan")
        save_file(state, folder / "bad.safetensors")
        def going_on(workers):
            good = paths[1]
            for out in ("wrong", "right"):
                paths[1] = folder / "bad.safetensors" if out == "wrong" else good
                try:
                    merge(out)(workers)
                except fm.FreemergeError as error:
                    print(f"{out} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            (folder / f"went on {workers.rank}").touch()
            while not (folder / f"went on {1 - workers.rank}").exists():  # no worker waits for the end of another
                time.sleep(0.01)
        codes, said = run(2, going_on)
        assert codes == [0, 0], (codes, said)
        told = sorted(line.partition(": ") for line in said.splitlines())
        assert [(what, "l.6.v" in why) for what, _, why in told] == [
            ("right WorkerError", False), ("right WorkerError", False),
            ("wrong CheckpointError", True), ("wrong WorkerError", False),
        ], said
        assert said.count("parted") == 2 and said.count("another worker has ended") == 1, said
        assert not (folder / "right").exists() and not (folder / "wrong").exists()
        """,
    )


def test_a_directory_that_is_seen_late(models: Path, server: subprocess.Popen[str]) -> None:
    """As on NFS: a name that was looked for before it was made stays missing until its directory is listed."""
    forked(
        models,
        server,
        """
        merge("one", force=True)()
        staging = freemerge.checkpoint.staging
        def late(workers):
            out, looks = staging.hidden(folder / "new" / "late"), []
            if workers.rank:
                lock_of, scandir, listed = staging.lock_of, os.scandir, []
                def unseen(path):
                    looks.append(path)
                    if len(listed) < 3:
                        raise FileNotFoundError(2, "No such file or directory", str(path))
                    return lock_of(path)
                def listing(path="."):
                    if Path(path) == out.parent:
                        listed.append(path)
                    return scandir(path)
                staging.lock_of, os.scandir = unseen, listing
                stat = os.stat
                def watched(path, *arguments, **options):
                    assert looks or out.name not in str(path), "a name that is looked for is missing from then on"
                    return stat(path, *arguments, **options)
                os.stat = watched
            merge("new/late")(workers)
            assert len(looks) == 3 * workers.rank
        codes, said = run(2, late)
        assert codes == [0, 0], said
        assert contents("new/late") == contents("one")
        """,
    )


def test_a_worker_that_ends_while_the_output_is_published(models: Path, server: subprocess.Popen[str]) -> None:
    forked(
        models,
        server,
        """
        from freemerge.checkpoint.staging import Staging
        merge("one", force=True)()
        for out in ("done", "done.safetensors"):
            for rank in (0, 1):
                def dying_late(workers):
                    publish, place = Staging._publish, Staging.publish
                    def published(self, *arguments, **options):
                        publish(self, *arguments, **options)
                        os.kill(os.getpid(), signal.SIGKILL)
                    def publishing(self, *arguments, **options):
                        if workers.rank == 1:
                            os.kill(os.getpid(), signal.SIGKILL)
                        place(self, *arguments, **options)
                    if rank == 0:
                        Staging._publish = published
                    else:
                        Staging.publish = publishing
                    merge(out)(workers)
                codes, said = run(2, dying_late)
                assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, (codes, said)
                assert f"{folder / out} was written, but another worker has ended" in said, said
                assert "resume" not in said, said
                if out == "done":
                    assert contents(out) == contents("one")
                    for path in (folder / out).iterdir():
                        path.unlink()
                    (folder / out).rmdir()
                else:
                    (folder / out).unlink()
        """,
    )


def test_an_error_while_the_output_is_published_leaves_all_that_was_merged(
    models: Path, server: subprocess.Popen[str]
) -> None:
    forked(
        models,
        server,
        """
        import errno
        from freemerge.checkpoint import writer
        from freemerge.merging.engine import Merger
        merge("one", force=True)()
        def full(workers):
            def fail(path, content):
                raise OSError(errno.ENOSPC, "No space left on device")
            writer.write_json = fail
            merge("full")(workers)
        codes, said = run(2, full)
        assert codes == [1, 1], (codes, said)
        assert said.count("the disk is full") == 1 and "--resume goes on" in said and "Traceback" not in said, said
        Merger.merged = None
        merge("full", resume=True)()
        assert contents("full") == contents("one")
        """,
    )


def test_workers_that_do_not_do_the_same_are_told(models: Path, server: subprocess.Popen[str]) -> None:
    forked(
        models,
        server,
        """
        def apart(workers):
            if workers.rank:
                merge("out")(workers)
            else:
                workers.total(torch.zeros(3, dtype=torch.int64))
        codes, said = run(2, apart)
        assert codes == [1, 1], (codes, said)
        assert "worker 1 does something else (merge 1, step 1, first) than the first one (no merge" in said, said
        """,
    )


def test_a_program_with_a_process_group_of_its_own(models: Path, server: subprocess.Popen[str]) -> None:
    forked(
        models,
        server,
        """
        merge("one", force=True)()
        def program(work):
            dist.init_process_group("gloo")
            for out in ("two", "again"):
                with joined() as workers:
                    merge(out)(workers)
            counted = torch.ones(())
            dist.all_reduce(counted)
            assert counted == 2, "the program's group is as it was"
            dist.destroy_process_group()
            for out in ("three", "fourth"):
                with joined() as workers:
                    merge(out)(workers)
        codes, said = run(2, None, program)
        assert codes == [0, 0], said
        assert contents("two") == contents("again") == contents("three") == contents("fourth") == contents("one")
        """,
    )


def test_workers_that_do_not_come_are_missed_and_may_come_later(models: Path, server: subprocess.Popen[str]) -> None:
    """As where one worker of another program runs the command, which gets its environment."""
    forked(
        models,
        server,
        """
        from datetime import timedelta
        fm.workers.ARRIVAL = timedelta(seconds=0.5)
        codes, said = run(4, merge("lonely"), started=2)
        assert codes == [1, 1] and said.count("2 workers of the 4 that torchrun started did not come") == 2, said
        assert "TORCHELASTIC_RUN_ID" in said and not (folder / "lonely").exists(), said

        def later(work):
            if os.environ["RANK"] == "0":
                try:
                    in_joined(work)
                except fm.WorkerError as error:
                    assert "1 worker of the 2" in str(error), error
                pid = os.fork()
                if pid == 0:  # one that is killed while it waits
                    in_joined(work)
                time.sleep(0.2)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                (folder / "missed").touch()
            fm.workers.ARRIVAL = timedelta(minutes=1)
            while not (folder / "missed").exists():
                time.sleep(0.01)
            in_joined(work)
        codes, said = run(2, merge("later"), later)
        assert codes == [0, 0], said
        """,
    )


def test_shares() -> None:
    """By bytes, the largest first, the same in every process."""
    sizes = {"a": 5, "b": 9, "c": 5, "d": 1, "e": 4, "f": 0}
    assert Workers(1, 2).shares(sizes) == {"b": 0, "a": 1, "c": 1, "e": 0, "d": 1, "f": 1}
    assert set(Workers().shares(sizes).values()) == {0}
    assert Workers().gather("own") == ["own"]


KILLED = """
    import os, signal
    from freemerge.__main__ import main
    from freemerge.checkpoint.writer import CheckpointWriter

    if os.environ["RANK"] == "1":
        CheckpointWriter.write = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(main())
"""


def test_a_transformers_model_says_the_same_after_torchrun_a_kill_and_resume(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    inputs = [tmp_path / str(index) for index in range(3)]
    for index, folder in enumerate(inputs):
        torch.manual_seed(index)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, script, "merge", *inputs, "-o", tmp_path / "out", "--max-shard-size", "20KB", "--quiet"]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert killed.returncode != 0
    assert killed.stderr.count("freemerge: what is finished stays in") == 1, killed.stderr
    assert not (tmp_path / "out").exists()

    said = []
    for name, resume in (("out", True), ("undisturbed", False)):
        fm.merge_checkpoints(
            inputs[0], inputs[1:], tmp_path / name, progress=False, max_shard_bytes=20_000, resume=resume
        )
        assert fm.verify(tmp_path / name) == []
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        said.append(model.generate(torch.tensor([[1, 5, 9]]), do_sample=False, max_new_tokens=12, pad_token_id=0))
    assert torch.equal(*said)
    for path in (tmp_path / "undisturbed").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
