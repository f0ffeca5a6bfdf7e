"""What the JSON and YAML files of a run's folder hold, as their readers hold them against."""

from typing import Annotated, Any, NamedTuple, NotRequired

import pydantic
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from cluster.configuration.stored_file import WITH_OTHER_KEYS
from trainers.stored.metric_records import Count, FlopsPerSecond, UnixTime

Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{16}|[0-9a-f]{32})$")]
"""Of a manifest without hashes and with them."""
Share = Annotated[float, Field(ge=0, le=1)]

MADE_ANEW = "delete it, and run the same command again: it is made anew"
PUT_BACK = "put the file back from a copy, or choose a new run.name"
LEFT_OUT = "delete it: the report then goes without"


@pydantic.with_config(WITH_OTHER_KEYS)
class Pinned(TypedDict):
    """`manifest.json`."""

    digest: Digest
    summary: NotRequired["Summary"]
    init_from: NotRequired[str]
    """Digest of the model that the run was started from."""


class Summary(TypedDict):
    splits: dict[str, dict[str, "SplitCounts"]]
    set_aside: NotRequired[dict[str, Count]]


class SplitCounts(TypedDict):
    fragments: Count
    documents: Count
    bytes: Count
    tokens: Count
    bytes_per_token: Annotated[float, Field(ge=0, le=1e9)]
    duplicates: Count


@pydantic.with_config(WITH_OTHER_KEYS)
class Environment(TypedDict):
    """`environment.json`."""

    watts_per_worker: NotRequired[Annotated[float, Field(ge=0, le=1e9)] | None]
    measured: NotRequired[dict[str, "MeasuredPeak"]]
    """By kind of machine."""


class MeasuredPeak(TypedDict):
    """The best FLOP/s of one worker's device, and the matrix product that reached it."""

    peak_flops_per_second: FlopsPerSecond
    product: str


@pydantic.with_config(WITH_OTHER_KEYS)
class Best(TypedDict):
    """`best.json`."""

    step: Count
    checkpoint: str
    loss: float
    bits_per_byte: NotRequired[float]


def _measured(found: dict[str, Any]) -> dict[str, Any]:
    for name, value in found.items():
        if name.endswith(("_loss", "_accuracy")) and not isinstance(value, int | float | None):
            raise ValueError(f"{name} is no number")
    return found


@pydantic.with_config(WITH_OTHER_KEYS)
class _Verdict(TypedDict):
    step: Count
    bits_per_byte: NotRequired[float | None]
    perplexity: NotRequired[float | None]
    loss: NotRequired[float | None]


Verdict = Annotated[_Verdict, AfterValidator(_measured)]
"""`test.json`."""


class Claim(TypedDict):
    """`test.claim.json`."""

    checkpoint: str


@pydantic.with_config(WITH_OTHER_KEYS)
class Floor(TypedDict):
    """`floor.json`."""

    order: Count
    smoothing: str
    fitted_bytes: Count
    validation_by_order: NotRequired[list[Annotated[float, Field(gt=0)]]]
    """Bits per byte of orders 1, 2 and so on, of which `order` is the best; absent where order 6 was fixed."""
    validation: NotRequired[Annotated[float, Field(gt=0)]]
    test: NotRequired[Annotated[float, Field(gt=0)]]


class Baselines(TypedDict):
    """`baselines.json`."""

    fitted_tokens: Count
    validation: NotRequired[dict[str, float]]
    test: NotRequired[dict[str, float]]


class Interval(NamedTuple):
    """One of `concluded.json`: when a driver that concluded the run began, and when it was last there; unix time."""

    began: UnixTime
    ended: UnixTime


class Sample(TypedDict):
    """One of `samples.json`."""

    prompt: str
    continuation: str
    settings: dict[str, Any] | None


@pydantic.with_config(WITH_OTHER_KEYS)
class _RunSection(TypedDict):
    steps: NotRequired[Count]
    init_from: NotRequired[str | None]


@pydantic.with_config(WITH_OTHER_KEYS)
class _CorpusSection(TypedDict):
    prepared: NotRequired[str]
    uri: NotRequired[str | None]
    sources: NotRequired[dict[str, str] | None]


@pydantic.with_config(WITH_OTHER_KEYS)
class StoredConfig(TypedDict):
    """`config.yaml`, as far as other commands than the run's own read it."""

    run: NotRequired[_RunSection]
    corpus: NotRequired[_CorpusSection]
    energy: NotRequired[dict[str, Any]]
    model: NotRequired[dict[str, Any]]
    objective: NotRequired[dict[str, Any]]
