"""Files made to harm or to confuse are refused with an error that names them."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

import freemerge as fm
from freemerge.checkpoint import Checkpoint
from freemerge.checkpoint.architecture import require_config
from freemerge.checkpoint.json_file import read_json
from freemerge.checkpoint.safetensors_file import MAX_HEADER_BYTES
from freemerge.errors import CheckpointError


def refused(path: Path, message: str, *, named: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert (named or path.name) in str(caught.value)


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int, shape: Any = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


BAD_FILES = {
    "zero bytes": (b"", "not a safetensors file"),
    "seven bytes": (b"\0" * 7, "not a safetensors file"),
    "huge header": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "the limit is"),
    "2^63 header": ((1 << 63).to_bytes(8, "little") + b"{}", "the limit is"),
    "header beyond the file": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "empty header": (safetensors_bytes(b""), "not a JSON object"),
    "header is a list": (safetensors_bytes(b"[]"), "not a JSON object"),
    "header starts with a space": (safetensors_bytes(b" {}"), "not a JSON object"),
    "bad json": (safetensors_bytes(b"{,}"), "bad safetensors header"),
    "not utf-8": (safetensors_bytes(b'{"\xff": 1}'), "bad safetensors header"),
    "lone surrogate": (safetensors_bytes(b'{"\\ud800": 1}'), "bad safetensors header"),
    "deep json": (safetensors_bytes(b'{"a":' + b"[" * 200_000), "bad safetensors header"),
    "duplicate tensor": (safetensors_bytes(b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata is a list": (safetensors_bytes({"__metadata__": []}), "__metadata__"),
    "entry is a number": (safetensors_bytes({"a": 1}), "'a'"),
    "extra field": (safetensors_bytes({"a": {**tensor(0, 1), "x": 1}}, b"\0"), "'a'"),
    "unknown dtype": (safetensors_bytes({"a": tensor(0, 1, dtype="F3")}, b"\0"), "dtype 'F3'"),
    "dtype is a list": (safetensors_bytes({"a": {**tensor(0, 1), "dtype": []}}, b"\0"), "dtype"),
    "negative shape": (safetensors_bytes({"a": tensor(0, 1, [-1, -1])}, b"\0"), "bad shape"),
    "fractional shape": (safetensors_bytes({"a": tensor(0, 1, [1.0])}, b"\0"), "bad shape"),
    "boolean shape": (safetensors_bytes({"a": tensor(0, 1, [True])}, b"\0"), "bad shape"),
    "huge empty shape": (safetensors_bytes({"a": tensor(0, 0, [1 << 40, 1 << 40, 0])}), "bad shape"),
    "too many dimensions": (safetensors_bytes({"a": tensor(0, 1, [1] * 65)}, b"\0"), "bad shape"),
    "negative offset": (safetensors_bytes({"a": tensor(-1, 0, [1])}, b"\0"), "bad data_offsets"),
    "three offsets": (safetensors_bytes({"a": {**tensor(0, 1), "data_offsets": [0, 1, 1]}}, b"\0"), "data_offsets"),
    "reversed offsets": (safetensors_bytes({"a": tensor(1, 0, [1])}, b"\0"), "'a'"),
    "size contradicts shape": (safetensors_bytes({"a": tensor(0, 2, [3])}, b"\0\0"), "'a'"),
    "overlap": (safetensors_bytes({"a": tensor(0, 2), "b": tensor(1, 3)}, b"\0" * 3), "'b' overlaps"),
    "same bytes twice": (safetensors_bytes({"a": tensor(0, 2), "b": tensor(0, 2)}, b"\0" * 2), "overlaps"),
    "hole": (safetensors_bytes({"a": tensor(0, 2), "b": tensor(3, 4)}, b"\0" * 4), "hole"),
    "hole at the start": (safetensors_bytes({"a": tensor(1, 2)}, b"\0" * 2), "hole"),
    "truncated data": (safetensors_bytes({"a": tensor(0, 4)}, b"\0" * 3), "truncated"),
    "trailing bytes": (safetensors_bytes({"a": tensor(0, 4)}, b"\0" * 5), "belong to no tensor"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_safetensors_files(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(path, message)


_VALID = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4), "c": torch.zeros(())}, {"format": "pt"})


@settings(deadline=None, max_examples=400)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(_VALID) - 1), st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789,"[]'))),
        min_size=1,
        max_size=3,
    ),
    cut=st.one_of(st.none(), st.integers(0, len(_VALID))),
)
def test_damaged_files_are_read_as_the_library_reads_them_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(_VALID)
    for position, value in edits:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(content[:cut]))
    try:
        with Checkpoint.open(path) as checkpoint:
            ours = {name: checkpoint.read(name) for name in checkpoint.specs}
    except CheckpointError:
        return
    try:
        with safe_open(path, "pt") as library:
            theirs = {name: library.get_tensor(name) for name in library.keys()}  # noqa: SIM118
    except SafetensorError as error:
        pytest.fail(f"accepted what the safetensors library refuses: {error}")
    assert ours.keys() == theirs.keys()
    for name, ours_tensor in ours.items():
        assert ours_tensor.dtype == theirs[name].dtype
        assert torch.equal(ours_tensor.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))


def write_index(directory: Path, content: object) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        ".",
        "",
        3,
        "a.bin",
        "a\0.safetensors",
    ],
)
def test_index_entries_must_be_weight_files_beside_it(tmp_path: Path, name: object) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "sub" / "x.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path.parent / "secret.safetensors")
    index = write_index(tmp_path, {"weight_map": {"w": name}})
    refused(tmp_path, "not a weight file beside the index", named=index.name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
    ],
)
def test_bad_index_files(tmp_path: Path, content: str, message: str) -> None:
    refused(tmp_path, message, named=write_index(tmp_path, content).name)


def test_json_files_of_any_kind_have_a_largest_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    assert read_json(path, 8) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 7 bytes"):
        read_json(path, 7)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_files_may_begin_with_a_byte_order_mark_unless_they_are_copied(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}', encoding=encoding)
    assert read_json(path) == {"a": 1}
    with pytest.raises(CheckpointError, match=r"config\.json: not a JSON object; the merged model would get it"):
        require_config(tmp_path)
    for plain in ("{}", 200 * " " + '{"a": 1}'):
        path.write_text(plain)
        require_config(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2), "a": torch.zeros(2)}, tmp_path / "two.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "three.safetensors")
    write_index(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    refused(tmp_path, "'a' is in both one.safetensors and two.safetensors")
    write_index(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
    refused(tmp_path, "'b' is not in one.safetensors", named="index.json")
    write_index(tmp_path, {"weight_map": {"a": "one.safetensors", "b": "gone.safetensors"}})
    refused(tmp_path, "no such file", named="gone.safetensors")
    write_index(tmp_path, {"weight_map": {"b": "two.safetensors"}})
    refused(tmp_path, "'a' of two.safetensors is not listed", named="index.json")
    write_index(tmp_path, {"weight_map": {"a": "three.safetensors", "b": "one.safetensors"}})
    refused(tmp_path, "is not in", named="index.json")


def test_stale_half_of_a_resharded_model_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    write_index(tmp_path, {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    refused(tmp_path, "holds both")
    assert Checkpoint.open(tmp_path / "model.safetensors.index.json").read("a").tolist() == [1, 1]


def test_links_may_not_leave_the_directory(tmp_path: Path) -> None:
    secret = tmp_path / "secret" / "model.safetensors"
    model = tmp_path / "model"
    secret.parent.mkdir()
    model.mkdir()
    save_file({"a": torch.zeros(2)}, secret)
    (model / "model.safetensors").symlink_to(secret)
    refused(model, "symbolic link out of its directory")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "nowhere")
    refused(model, "no such file")
    (model / "nowhere").symlink_to(model / "model.safetensors")
    refused(model, "no such file")  # a loop


@pytest.mark.parametrize("name", ["config.json", "modules.json", "tokenizer.json"])
def test_nor_links_of_what_lies_beside_the_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("{}")
    for model in ("base", "model"):
        (tmp_path / model).mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / model / "model.safetensors")
    (tmp_path / "model" / name).symlink_to(tmp_path / "secret")
    pairs = [("model", "base"), ("base", "model")] if name != "modules.json" else [("model", "base")]
    for base, model in pairs:
        with pytest.raises(CheckpointError, match=f"{name} is a symbolic link out of its directory"):
            fm.merge_checkpoints(tmp_path / base, [tmp_path / model], tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_model_card_that_is_a_link_out_of_the_directory_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("---\nlicense: secret\n---\n")
    for model in ("base", "model"):
        (tmp_path / model).mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / model / "model.safetensors")
        (tmp_path / model / "README.md").symlink_to(tmp_path / "secret")
    fm.merge_checkpoints(tmp_path / "base", [tmp_path / "model"], tmp_path / "out", progress=False)
    assert "secret" not in (tmp_path / "out" / "README.md").read_text()


def test_links_inside_the_directory_and_to_the_directory_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.zeros(2)}, model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(model)
    assert list(Checkpoint.open(tmp_path / "link").specs) == ["a"]


def test_hub_cache_layout_is_read(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.zeros(2)}, blobs / "0123")
    save_file({"b": torch.zeros(2)}, blobs / "4567")
    (blobs / "89ab").write_text(json.dumps({"weight_map": {"a": "m1.safetensors", "b": "m2.safetensors"}}))
    links = {"m1.safetensors": "0123", "m2.safetensors": "4567", "model.safetensors.index.json": "89ab"}
    for name, blob in links.items():
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    assert list(Checkpoint.open(snapshot).specs) == ["a", "b"]
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, other / "0123")
    (snapshot / "m1.safetensors").unlink()
    (snapshot / "m1.safetensors").symlink_to(other / "0123")
    refused(snapshot, "symbolic link out of its directory", named="m1.safetensors")


def test_pipes_and_directories_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "not a regular file", named="model.safetensors")
    refused(tmp_path / "model.safetensors", "not a regular file")
    os.mkfifo(tmp_path / "m.bin")
    refused(tmp_path / "m.bin", "not a regular file")
    write_index(tmp_path, "{}").unlink()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "not a regular file", named="model.safetensors")


class _Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_code_are_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "evil.bin"
    torch.save({"a": torch.zeros(2), "b": _Exploit(tmp_path / "owned")}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "not plain tensors")
    path.write_bytes(pickle.dumps(_Exploit(tmp_path / "owned")))
    refused(path, "evil.bin")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("number", [2**31, 2**62, 2**70])
def test_old_torch_files_may_not_promise_more_than_they_hold(tmp_path: Path, number: int) -> None:
    """Torch would fill so much memory with zeros before it finds out."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(77.0), "b": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with Checkpoint.open(path) as whole:
        assert whole.read("a").tolist() == list(range(77))
    content = path.read_bytes()
    entries = pickle.dumps(77, 2)[2:-1]
    assert content.count(b"cpuq") == 1
    place = content.index(entries, content.index(b"cpuq"))
    path.write_bytes(content[:place] + pickle.dumps(number, 2)[2:-1] + content[place + len(entries) :])
    refused(tmp_path, f"its tensors have {number + 3} entries, the whole file has")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04" + b"\0" * 500, b"garbage", b"\x80\x02]q\x00."])
def test_damaged_torch_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    refused(path, "m.pt")


def test_truncated_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"a": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "not a readable torch file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({"state_dict": {"a": 2}}, "'state_dict' is a dict"),
        ({"a": torch.zeros(2), "step": 3}, "'step' is a int"),
        ({3: torch.zeros(2)}, "the key 3"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(2, device="meta")}, "meta"),
    ],
)
def test_torch_files_must_hold_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", message)


def test_paths_that_are_no_models(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such file or directory")
    refused(tmp_path, "no model.safetensors or pytorch_model.bin")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "notes.txt", "not a model directory")
    for name in ("b", "a"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, r"several files and no index: a.safetensors, b.safetensors")
    (tmp_path / "adapter_config.json").touch()
    refused(tmp_path, "PEFT adapter")


def test_a_single_safetensors_file_of_any_name_is_found(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert Checkpoint.open(tmp_path).read("w").item() == 1
