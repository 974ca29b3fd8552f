"""The Python packages that ship the model and the texts: fetched by pip once, then read as plain archives."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = Path(__file__).with_name("packages.txt")


def pinned(names: set[str] | None = None) -> list[str]:
    """The requirement lines of packages.txt, or those of the named packages only."""
    lines = [line.strip() for line in PACKAGES.read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    return [pin for pin in pins if names is None or pin.split("==")[0].lower() in names]


def fetch(folder: Path, names: set[str] | None = None) -> None:
    """Download the pinned archives that ``folder`` lacks; the only step that touches the network."""
    folder.mkdir(parents=True, exist_ok=True)
    for pin in pinned(names):
        if _find(folder, pin) is None:
            print(f"fetching {pin}", flush=True)
            # The examples of pygments are in its source archive only, as are the snippets of vaderSentiment.
            source = ["--no-binary", "pygments,vaderSentiment"]
            command = ["pip", "download", "--quiet", "--no-deps", "--ignore-requires-python", "--dest", str(folder)]
            subprocess.run([sys.executable, "-m", *command, *source, pin], check=True)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _find(folder: Path, pin: str) -> Path | None:
    name, version = pin.split("==")
    for path in sorted(folder.iterdir()):
        stem = path.name.removesuffix(".tar.gz").removesuffix(".zip").removesuffix(".whl")
        found = re.match(rf"(.+?)-{re.escape(version)}(-|$)", stem)
        if found and _normalised(found.group(1)) == _normalised(name):
            return path
    return None


def archive(folder: Path, name: str) -> Path:
    """The fetched archive of one pinned package."""
    (pin,) = pinned({name.lower()})
    path = _find(folder, pin)
    if path is None:
        raise FileNotFoundError(f"{pin} is not in {folder}: run `python -m benchmarks.quality fetch` first")
    return path


def members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file in a zip or tar archive whose name matches ``pattern``, in name order."""
    wanted = re.compile(pattern)
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if wanted.search(name):
                    yield name, archive.read(name)
        return
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            content = archive.extractfile(member) if member.isfile() and wanted.search(member.name) else None
            if content is not None:
                yield member.name, content.read()


def member(path: Path, pattern: str) -> bytes:
    """The content of the one file whose name matches."""
    ((_, content),) = members(path, pattern)
    return content
