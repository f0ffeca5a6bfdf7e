"""What the tests of tasks share: a small backbone with a real tokenizer, and records with something to learn."""

import functools
import json
import random
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

from cluster.storage.uris import open_store
from data.tokens.tokenizer import FixedTokenizer, TokenizerConfig, train_tokenizer
from trainers.exported.folder import export
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig

SHAPE = ModelConfig(
    vocab_size=512, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, max_positions=128
)
BERT = replace(
    SHAPE,
    num_token_types=2,
    norm_eps=1e-12,
    pair_head=True,
    tie_embeddings=True,
    attention="bidirectional",
    positions="learned",
    norm="layernorm",
    norm_place="post",
    activation="gelu",
    biases=True,
    head="transform",
)
BACKBONES = {"causal": SHAPE, "bert": BERT, "rotary": replace(SHAPE, attention="bidirectional")}
"""Decoder, encoder as transformers has it, and encoder that transformers lacks."""
GOOD = ["fine", "bright", "warm", "clever", "lovely", "tender", "funny", "rich", "vivid", "graceful"]
BAD = ["dull", "flat", "cold", "stupid", "ugly", "harsh", "boring", "poor", "pale", "clumsy"]
REST = [
    "the",
    "a",
    "film",
    "story",
    "actor",
    "scene",
    "with",
    "and",
    "its",
    "very",
    "plot",
    "music",
    "hero",
    "end",
]


def put_backbone(folder: Path | str, shape: ModelConfig = SHAPE) -> str:
    """Export a small model with initial weights and a tokenizer trained on Python's documentation; its URI."""
    tokenizer, model, target = small_tokenizer(), build(shape, seed=1), open_store(str(folder))
    state = dict(model.named_parameters())
    export(state, shape, tokenizer.json.encode(), tokenizer.boundary_id, target)
    return target.uri


@functools.cache
def small_tokenizer() -> FixedTokenizer:
    return train_tokenizer(topics.values(), TokenizerConfig(vocab_size=SHAPE.vocab_size))


def sentences(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records whose label is that of the one telling word in them."""
    generator = random.Random(seed)
    records = []
    for index in range(number):
        label = generator.choice(["good", "bad"])
        words = generator.choices(REST, k=8)
        words[generator.randrange(8)] = generator.choice(GOOD if label == "good" else BAD)
        records.append({"id": f"s{index}", "text": " ".join(words), "label": label})
    return records


def skewed(number: int) -> list[dict[str, Any]]:
    """Sentences of which about 7 % have the label that comes first by the alphabet, and most the last."""
    records = sentences(number, seed=3)
    return [
        record | {"label": "a rare one" if index % 15 == 0 else "most" if index % 3 else "many"}
        for index, record in enumerate(records)
    ]


def put_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def put_task(path: Path, **content: Any) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)
