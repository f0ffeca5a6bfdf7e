"""Prepared corpora of random tokens or of given texts, by the real writer, without the work of preparing text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from cluster.storage.uris import Store
from data.shards.manifest import Fragments, Manifest, write_manifest
from data.shards.shards import ShardWriter
from data.tokens.tokenizer import Encoder, FixedTokenizer

BOUNDARY = 0
Document = tuple[str, np.ndarray, int]
"""Id, tokens, bytes."""


def put_token_corpus(
    store: Store,
    fragments: Mapping[tuple[str, str], int],
    *,
    fragment_tokens: int,
    token_dtype: str = "uint16",
    seed: int = 0,
    tokenizer: str = "0" * 16,
    vocab_size: int = 60_000,
) -> Manifest:
    """Put a corpus with so many fragments, a document each, for each (split, source).

    `tokenizer` is the fingerprint that its manifest names.
    """
    random = np.random.default_rng(seed)

    def documents(split: str, source: str) -> Iterator[Document]:
        for number in range(fragments[split, source]):
            # Fragments of unequal sizes, as documents make them.
            tokens = random.integers(1, vocab_size, fragment_tokens - number % 7, np.uint32)
            tokens[0] = BOUNDARY
            yield f"{source}-{split}-{number}", tokens, 3 * len(tokens)

    whole = {key: documents(*key) for key in fragments}
    return _put(store, whole, tokenizer, vocab_size, BOUNDARY, token_dtype, fragment_tokens)


def put_text_corpus(
    store: Store, texts: Mapping[str, Sequence[str]], tokenizer: FixedTokenizer, *, fragment_tokens: int
) -> Manifest:
    """Put a corpus of one source, and its tokenizer, with these texts in each split."""

    def documents(split: str) -> Iterator[Document]:
        encoded = Encoder(tokenizer).encode(texts[split])
        for number, (text, tokens) in enumerate(zip(texts[split], encoded, strict=True)):
            yield f"{split}-{number}", tokens, len(text.encode())

    store.put(tokenizer.path, tokenizer.json.encode())
    ids = (tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.boundary_id, tokenizer.token_dtype)
    return _put(store, {(split, "text"): documents(split) for split in texts}, *ids, fragment_tokens)


def _put(
    store: Store,
    documents: Mapping[tuple[str, str], Iterable[Document]],
    tokenizer: str,
    vocab_size: int,
    boundary_id: int,
    token_dtype: str,
    fragment_tokens: int,
) -> Manifest:
    shards, columns = [], {"shard": []}
    for (split, source), each in documents.items():
        with ShardWriter(
            store, split=split, source=source, token_dtype=token_dtype, fragment_tokens=fragment_tokens
        ) as writer:
            for document in each:
                writer.add(*document)
            for written in writer.finish():
                columns["shard"] += [len(shards)] * len(written.fragments["row_group"])
                shards.append(written.shard)
                for name, values in written.fragments.items():
                    columns.setdefault(name, []).extend(values)
    manifest = Manifest(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        boundary_id=boundary_id,
        token_dtype=token_dtype,
        sources=tuple(dict.fromkeys(source for _, source in documents)),
        shards=tuple(shards),
        fragments=Fragments.from_columns(columns),
        duplicates={},
        set_aside={},
    )
    write_manifest(store, manifest)
    return manifest
