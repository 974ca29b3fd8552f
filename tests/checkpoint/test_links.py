"""Links into a Hub cache and models by their Hub id; every advice is followed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import freemerge as fm
from freemerge.checkpoint import Checkpoint
from in_memory import same

BASE = {"layer.weight": torch.arange(32.0).reshape(4, 8), "norm.weight": torch.ones(8)}
TUNED = {name: tensor + 1 for name, tensor in BASE.items()}
EXACT = fm.Recipe(weights=(1.0,), scale=1.0, select=[fm.Rule("*", "merge")])


class Cache:
    """A Hub cache as huggingface_hub lays it out."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def blob(self, repository: str, name: str, tensors: dict[str, Tensor] | str) -> Path:
        path = self.root / f"models--{repository.replace('/', '--')}" / "blobs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(tensors, str):
            path.write_text(tensors)
        else:
            save_file(tensors, path, metadata={"format": "pt"})
        return path

    def snapshot(self, repository: str, files: dict[str, dict[str, Tensor] | str], commit: str = "c0ffee") -> Path:
        folder = self.root / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for number, (name, content) in enumerate(files.items()):
            blob = self.blob(repository, f"{commit}{number}", content)
            (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return Cache(tmp_path / "hub")


def test_a_directory_of_links_into_one_cache(cache: Cache, tmp_path: Path) -> None:
    local = tmp_path / "local"
    (local / "sub").mkdir(parents=True)
    (local / "model.safetensors").symlink_to(cache.blob("o/m", "1", TUNED))
    (local / "config.json").symlink_to(cache.blob("o/m", "2", '{"model_type": "x"}'))
    (local / "tokenizer.json").symlink_to(cache.blob("o/other", "3", "{}"))
    (local / "sub" / "notes.json").symlink_to(cache.blob("o/m", "4", "[]"))
    assert same(fm.merge(BASE, [local], EXACT), TUNED)
    fm.merge_checkpoints(local, [TUNED], tmp_path / "out", progress=False)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), TUNED)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_links_into_two_caches_or_elsewhere_are_refused_and_the_copy_works(cache: Cache, tmp_path: Path) -> None:
    second = Cache(tmp_path / "second")
    secret = tmp_path / "elsewhere" / "key.json"
    secret.parent.mkdir()
    secret.write_text("1")
    for number, other in enumerate([second.blob("o/m", "2", "{}"), secret]):
        local = tmp_path / f"local{number}"
        local.mkdir()
        (local / "model.safetensors").symlink_to(cache.blob("o/m", "1", TUNED))
        (local / "tokenizer.json").symlink_to(other)
        with pytest.raises(fm.CheckpointError, match="symbolic link out of its directory") as refusal:
            fm.merge(BASE, [local])
        advice = re.search(r"`(cp -rL \S+) COPY`", str(refusal.value))
        assert advice is not None
        copy = tmp_path / f"copy{number}"
        subprocess.run([*advice.group(1).split(), str(copy)], check=True)
        assert same(fm.merge(BASE, [copy], EXACT), TUNED)


def test_a_snapshot_links_into_its_own_model_only(cache: Cache) -> None:
    snapshot = cache.snapshot("o/m", {"model.safetensors": TUNED})
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(cache.blob("o/other", "1", TUNED))
    with pytest.raises(fm.CheckpointError, match="symbolic link out of its directory"):
        fm.merge(BASE, [snapshot])


def test_a_blob_by_its_own_name(cache: Cache) -> None:
    assert same(fm.merge(BASE, [cache.blob("o/m", "abc", TUNED)], EXACT), TUNED)
    path = cache.root / "models--o--m" / "blobs" / "def"
    torch.save(TUNED, path)
    assert same(fm.merge(BASE, [path], EXACT), TUNED)


@pytest.mark.parametrize("repository", ["org/model", "org/model-1.5_b", "gpt2"])
def test_a_hub_id_in_the_cache(repository: str, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache.snapshot(repository, {"model.safetensors": BASE}, "01d")
    cache.snapshot(repository, {"model.safetensors": TUNED}, "4e3")
    for source in (repository, Path(repository), f"{repository}@main", f"{repository}@4e3"):
        with Checkpoint.open(source) as opened:
            assert opened.name == repository
            assert same({name: opened.read(name) for name in opened.specs}, TUNED)
    assert same(fm.merge(f"{repository}@01d", [repository], EXACT), TUNED)
    fm.merge_checkpoints(f"{repository}@01d", [repository], tmp_path / "out", EXACT, progress=False)


def test_an_adapter_by_its_hub_id(cache: Cache) -> None:
    tensors = {
        "base_model.model.layer.lora_A.weight": torch.ones(1, 8),
        "base_model.model.layer.lora_B.weight": torch.ones(4, 1),
    }
    config = '{"peft_type": "LORA", "r": 1, "lora_alpha": 2}'
    cache.snapshot("o/lora", {"adapter_model.safetensors": tensors, "adapter_config.json": config})
    assert torch.equal(fm.merge(BASE, ["o/lora"], EXACT)["layer.weight"], BASE["layer.weight"] + 2)


def test_a_model_that_is_not_in_the_cache_is_not_fetched_but_told_how(cache: Cache) -> None:
    cache.snapshot("org/other", {"model.safetensors": TUNED})
    with pytest.raises(
        fm.CheckpointError, match=r"downloads nothing: fetch it with `hf download org/model`"
    ) as refusal:
        fm.merge("org/model", [TUNED])
    assert str(cache.root) in str(refusal.value)
    with pytest.raises(fm.CheckpointError, match=r"`hf download org/other --revision v2`"):
        fm.merge("org/other@v2", [TUNED])
    # What `hf download` leaves behind is then found.
    cache.snapshot("org/model", {"model.safetensors": TUNED})
    assert same(fm.merge(BASE, ["org/model"], EXACT), TUNED)


@pytest.mark.parametrize("source", ["../x/y", "/absent/model", "a/b/c", "x.safetensors", "folder/x.bin", "nothing"])
def test_other_paths_that_do_not_exist_are_just_missing(source: str, cache: Cache) -> None:
    with pytest.raises(fm.CheckpointError, match="no such file or directory"):
        fm.merge(source, [TUNED])


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, str(Path("~/.cache/huggingface/hub").expanduser())),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from freemerge.checkpoint.hub_cache import cache_root

    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_root()) == expected


def test_other_ways_to_name_a_model_in_the_cache(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache.snapshot("org/model", {"model.safetensors": TUNED})
    (snapshot / "unet").mkdir()
    (snapshot / "unet" / "model.safetensors").symlink_to("../../../blobs/c0ffee0")
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(TUNED, tmp_path / "own.safetensors")
    for source in (
        cache.root / "models--org--model",
        "https://huggingface.co/org/model",
        "https://huggingface.co/org/model/tree/main",
        Path("https://huggingface.co/org/model"),  # as a command line makes it: with one slash
        "hf://org/model",
        "org/model/unet",
        "~/own.safetensors",
    ):
        assert same(fm.merge(BASE, [source], EXACT), TUNED), source
    with pytest.raises(fm.CheckpointError, match=r"fetch it with `hf download org/absent`"):
        fm.merge(BASE, ["https://huggingface.co/org/absent"])
    with pytest.raises(fm.CheckpointError, match="no such file or directory"):
        fm.merge(BASE, ["org/model/vae"])


def test_the_command_that_fetches_a_model_is_one(cache: Cache) -> None:
    """It takes these arguments and, offline, gives the directory of the cache that freemerge finds afterwards."""
    program = Path(sys.executable).with_name("hf")
    if not program.exists():
        pytest.skip("huggingface_hub has no command hf here")
    with pytest.raises(fm.CheckpointError, match="hf download") as refusal:
        fm.merge("org/model@v2", [TUNED])
    command = re.search(r"`hf (download [^`]+)`", str(refusal.value))
    assert command is not None
    snapshot = cache.snapshot("org/model", {"model.safetensors": TUNED})
    (snapshot.parent.parent / "refs" / "v2").write_text(snapshot.name)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache.root)}
    arguments = [str(program), *command.group(1).split()]
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert str(snapshot) in result.stdout
    assert same(fm.merge(BASE, ["org/model@v2"], EXACT), TUNED)
