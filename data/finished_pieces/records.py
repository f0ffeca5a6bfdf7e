"""Records of finished pieces of work: each carries a hash of itself, and one that is damaged is no record."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired

import pydantic
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from cluster.configuration.stored_file import (
    WITH_OTHER_KEYS,
    DamagedFileError,
    matches,
    parse_json,
    place_of,
    read_json,
)
from cluster.storage.uris import Store
from data.reading.raw_shards import CorpusError

SEAL = "sha256"
"""Key of the hash of all others; records of before have none."""
ANEW = "that piece of work is done again"

NO_OTHER_KEYS = pydantic.ConfigDict(extra="forbid")
Count = Annotated[int, Field(ge=0, lt=2**63)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{16}|[0-9a-f]{32})$")]
"""Of a manifest without hashes and with them."""


@pydantic.with_config(WITH_OTHER_KEYS)
class _Counted(TypedDict):
    shards: list[str]
    documents: Count
    bytes: dict[str, Count]
    set_aside: Count
    reasons: dict[str, Count]
    torn: NotRequired[dict[str, str]]
    named: dict[str, Count]


class Survey(_Counted):
    content: Sha256
    pinned: Sha256


class FormerSurvey(_Counted):
    """Of before a survey pinned ids and splits."""

    content: NotRequired[Sha256]


def _equally_long(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    if len({len(values) for values in columns.values()}) > 1:
        raise ValueError("its columns are not equally long")
    return columns


@pydantic.with_config(NO_OTHER_KEYS)
class DuplicateCounts(TypedDict):
    piece: list[Count]
    split: list[Annotated[int, Field(ge=0, lt=3)]]
    count: list[Count]
    fingerprint: list[Annotated[int, Field(ge=0, lt=2**64)]]


@pydantic.with_config(NO_OTHER_KEYS)
class FragmentColumns(TypedDict):
    row_group: list[Index]
    num_tokens: list[Count]
    num_bytes: list[Count]
    num_documents: list[Count]
    checksum: list[Annotated[int, Field(ge=0, lt=2**32)]]
    blake2b: NotRequired[list[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]]]


@pydantic.with_config(NO_OTHER_KEYS)
class ShardFields(TypedDict):
    path: str
    split: str
    source: str
    num_bytes: Count
    sha256: Sha256
    footer_bytes: NotRequired[Count]
    footer_blake2b: NotRequired[str]


class WrittenShard(TypedDict):
    shard: ShardFields
    fragments: Annotated[FragmentColumns, AfterValidator(_equally_long)]


class Tokens(TypedDict):
    shards: list[WrittenShard]
    set_aside: Count


class Inputs(TypedDict):
    manifest: Digest


class Trained(TypedDict):
    tokenizer: Fingerprint


SHAPES: Mapping[str, Any] = {
    "survey": Survey,
    "former survey": FormerSurvey,
    "merged": dict[str, str],
    "duplicates": Annotated[DuplicateCounts, AfterValidator(_equally_long)],
    "tokens": Tokens,
    "inputs": Inputs,
    "tokenizer": Trained,
}
"""By the kind of the piece of work."""


def record_path(kind: str, digest: str) -> str:
    """Where the record of a finished piece of work lies."""
    return f"pieces/{kind}-{digest}.json"


def put_record(store: Store, path: str, content: Mapping[str, Any]) -> None:
    """Put a record, with its hash."""
    store.put(path, json.dumps({**content, SEAL: _hash(content)}, allow_nan=False).encode())


def read_record(
    store: Store, path: str, remedy: str = ANEW, *, is_bounded: bool = False, kind: str = ""
) -> dict[str, Any]:
    """The content of the record at a path of `record_path`; `is_bounded` where a listing has told its size; `kind` is
    given where it is another one than the path names.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it does not have its hash, or is none of its kind.
    """
    kind = kind or path.removeprefix("pieces/").partition("-")[0]
    where = place_of(store, path)
    content: dict[str, Any] = (
        parse_json(store.read(path), dict[str, Any], where, remedy)
        if is_bounded
        else read_json(store, path, dict[str, Any], remedy)
    )
    sealed = content.pop(SEAL, None)
    if sealed is not None and sealed != _hash(content):
        raise DamagedFileError(where, f"it does not have the hash {sealed!r:.80}", remedy)
    if wrong := matches(content, SHAPES[kind]):
        raise DamagedFileError(where, wrong, remedy)
    return content


def forget_damaged(store: Store, path: str, why: str) -> CorpusError:
    """The error of a Parquet file of a piece of work that cannot be read; its record is deleted, so it is made anew."""
    store.delete(path.replace("/hashes-", "/survey-").replace(".parquet", ".json"))
    remedy = "run the same command again, which makes it anew"
    return CorpusError(str(DamagedFileError(place_of(store, path), " ".join(why.split()), remedy)))


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
