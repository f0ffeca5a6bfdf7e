"""Prepared corpora of random tokens, written with the real writer, without the work of preparing text."""

from collections.abc import Mapping

import numpy as np

from cluster.storage import Store
from data.manifest import Fragments, Manifest, write_manifest
from data.shards import ShardWriter

BOUNDARY = 0


def put_token_corpus(
    store: Store,
    fragments: Mapping[tuple[str, str], int],
    *,
    fragment_tokens: int,
    token_dtype: str = "uint16",
    seed: int = 0,
) -> Manifest:
    """Put a corpus with so many fragments, a document each, for each (split, source)."""
    random = np.random.default_rng(seed)
    shards, columns = [], {"shard": []}
    for (split, source), count in fragments.items():
        with ShardWriter(
            store, split=split, source=source, token_dtype=token_dtype, fragment_tokens=fragment_tokens
        ) as writer:
            for number in range(count):
                # Fragments of unequal sizes, as documents make them.
                tokens = random.integers(1, 60_000, fragment_tokens - number % 7, np.uint32)
                tokens[0] = BOUNDARY
                writer.add(f"{source}-{split}-{number}", tokens, 3 * len(tokens))
            for written in writer.finish():
                columns["shard"] += [len(shards)] * len(written.fragments["row_group"])
                shards.append(written.shard)
                for name, values in written.fragments.items():
                    columns.setdefault(name, []).extend(values)
    manifest = Manifest(
        tokenizer="0" * 16,
        vocab_size=60_000,
        boundary_id=BOUNDARY,
        token_dtype=token_dtype,
        sources=tuple(dict.fromkeys(source for _, source in fragments)),
        shards=tuple(shards),
        fragments=Fragments.from_columns(columns),
        duplicates={},
        set_aside={},
    )
    write_manifest(store, manifest)
    return manifest
