"""Laws of reading raw shards, whatever is in them: every record comes once, as a document or by name."""

import gzip
import json

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.uris import open_store
from data.reading.documents import Broken, Document, read_documents
from data.reading.raw_shards import CorpusConfig, RawShard

LIMIT = 1_024
CONFIG = CorpusConfig(max_record_bytes=LIMIT, normalization="none")
GOOD = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=200)
BAD = st.sampled_from(
    [b"[1]", b"{", b'{"body": "x"}', b'{"text": 7}', b'{"text": " "}', b"\xff", b"x" * 3 * LIMIT]
)
PACKED = {
    "a.jsonl": lambda content: content,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(GOOD, BAD, st.just(b""))), st.sampled_from(sorted(PACKED)), st.booleans())
def test_each_line_is_a_document_or_is_broken_and_is_told_by_its_number(tmp_path_factory, lines, name, ends):
    raw = [
        line if isinstance(line, bytes) else json.dumps({"text": line}, ensure_ascii=False).encode()
        for line in lines
    ]
    store = open_store(str(tmp_path_factory.mktemp("raw")))
    content = b"\n".join(raw) + (b"\n" if ends else b"")
    store.put(name, PACKED[name](content))
    found = list(read_documents(store, RawShard("web", name, len(content), "v1"), CONFIG))
    expected = [(number, line) for number, line in enumerate(lines, start=1) if line != b""]
    assert [record.line for record in found] == [number for number, _ in expected]
    for record, (_, line) in zip(found, expected, strict=True):
        assert isinstance(record, Broken if isinstance(line, bytes) else Document)
        if isinstance(record, Document):
            assert record.text == line and record.num_bytes == len(line.encode())
