"""A job of prediction: what it answers, what of it is done, and the Ray Data pipeline for the rest."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, NotRequired

from typing_extensions import TypedDict

from cluster.configuration.stored_file import read_json
from cluster.console.errors import ConfigError
from cluster.hardware.machine import CPU_ALLOCATOR, CPU_ONLY
from cluster.sessions.session import ray_session
from cluster.sessions.workers import LEAST_CPUS, ClusterConfig, shortages
from cluster.storage.store import former_version
from cluster.storage.uris import Store, lies_in, open_store
from trainers.exported.local_copy import local_copy
from trainers.exported.model_digest import FORMER_LENGTH, content_digest, listing_digest
from trainers.prediction.pieces import Counts, Predictor, answered_pieces, finished_pieces
from trainers.prediction.rows import Piece, column_problems, pieces_of
from trainers.recovery.lease import RunTakenError, lease
from trainers.tasks.export import read_stored_task
from trainers.tasks.record_files import find_files

JOB = "predict.json"


class Job(TypedDict):
    """`predict.json`: what the answers are of."""

    model: str
    max_new_tokens: int
    input: dict[str, str]
    named_by: NotRequired[str]
    """As that of a piece; without it the place of the input stood in the names of the answers."""


class PieceAnswers:
    """What an actor of Ray Data runs."""

    def __init__(self, *settings: Any) -> None:
        self._predictor = Predictor(*settings)

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name = row.pop("name")
        for counts in self._predictor.answer(Piece(**row)):
            yield {"piece": name, "ended": False, **asdict(counts)}
        yield {"piece": name, "ended": True, **asdict(Counts())}


def predict(options: argparse.Namespace) -> Counts:
    """Answer every piece that has no answers yet; how the records of all starts ended.

    Raises:
        ConfigError: options or inputs that cannot be right, or answers that are another job's.
    """
    if problems := [*option_problems(options), *overlap_problems(options)]:
        raise ConfigError(problems)
    # Workers have another working directory.
    model, output = open_store(options.model), open_store(options.output)
    pieces = pieces_of(options.input)
    try:
        task = read_stored_task(model).task
    except FileNotFoundError as error:
        raise ConfigError(
            [f"--model {model.uri} holds no fine-tuned model, as export/ of a run: {error}"]
        ) from None
    if problems := column_problems(task, pieces):
        raise ConfigError(problems)
    digest = content_digest(local_copy(model), of_task=True)
    with alone_in(output):
        pieces = list(pin(output, model, digest, options, pieces))
        answer_missing(pieces, model, digest, output, options)
    return sum(finished_pieces(output).values(), Counts())


def option_problems(options: argparse.Namespace) -> Iterator[str]:
    """A line for each number that no job can have."""
    for key in ("workers", "rows_per_batch", "max_new_tokens"):
        if (value := getattr(options, key)) < 1:
            yield f"--{key.replace('_', '-')}={value} must be at least 1"
    if not options.cpus_per_worker >= LEAST_CPUS:
        yield f"--cpus-per-worker={options.cpus_per_worker:g} must be {LEAST_CPUS:g} or more; on shared cores, try 0.5"
    if not options.gpus_per_worker >= 0:
        yield f"--gpus-per-worker={options.gpus_per_worker:g} must be 0 or more"


def overlap_problems(options: argparse.Namespace) -> Iterator[str]:
    """A line where answers would be input of the next start, or lie among what is none of theirs."""
    if lies_in(options.output, options.input) or lies_in(options.input, options.output):
        yield (
            f"--output={options.output} and --input={options.input} lie in one another: answers would be read as "
            "records; choose a folder beside the input"
        )


@contextmanager
def alone_in(output: Store) -> Iterator[None]:
    """Hold the folder of the answers for the length of a with-block; `ConfigError` while another command does."""
    try:
        with lease(output):
            yield
    except RunTakenError as taken:
        raise ConfigError(
            [
                f"--output {output.uri} is being answered into by {taken.holder}; wait for it, end it, or choose "
                "another folder"
            ]
        ) from None


def answer_missing(
    pieces: Sequence[Piece], model: Store, digest: str, output: Store, options: argparse.Namespace
) -> None:
    """Answer the pieces that are not finished, if any, in a session of Ray's, by the model of that digest.

    Raises:
        ConfigError: the cluster lacks what the models need, or the model was replaced meanwhile.
    """
    finished = finished_pieces(output)
    left = [piece for piece in pieces if piece.name not in finished]
    print(f"{len(pieces):,} pieces, {len(pieces) - len(left):,} of them answered before")
    if left:
        cluster = ClusterConfig(
            address=options.address,
            num_workers=min(options.workers, len(left)),
            cpus_per_worker=options.cpus_per_worker,
            gpus_per_worker=options.gpus_per_worker,
        )
        with ray_session(cluster) as resources:
            if problems := list(shortages(cluster, resources)):
                raise ConfigError([as_flags(line) for line in problems])
            try:
                answer(left, model.uri, digest, output.uri, options)
            except Exception:
                if content_digest(local_copy(model), of_task=True) == digest:
                    raise
                remedy = "put that one back, or choose another folder for the answers"
                raise ConfigError([f"--model {model.uri} was replaced while it answers; {remedy}"]) from None


def as_flags(line: str) -> str:
    """A line about keys of a cluster in this command's words."""
    for key in ("num_workers", "cpus_per_worker", "gpus_per_worker"):
        line = line.replace(f"cluster.{key}", "--" + key.removeprefix("num_").replace("_", "-"))
    return line


def pin(
    output: Store, model: Store, digest: str, options: argparse.Namespace, pieces: Sequence[Piece]
) -> Sequence[Piece]:
    """Write down what the answers are of, or hold it against what is there; the pieces as their answers are named.
    Files may be added to the input, and all of it may be moved.

    Raises:
        ConfigError: the folder holds answers of another model, of files that have changed, or otherwise asked for.
    """
    store, paths = find_files(options.input)
    wanted = set(paths)
    versions = {info.path: info.version for info in store.list() if info.path in wanted}
    job = {"model": digest, "max_new_tokens": options.max_new_tokens, "input": versions}
    job["named_by"] = ""
    if output.put_if_absent(JOB, json.dumps(job, indent=2, allow_nan=False).encode()):
        return pieces
    before = read_json(output, JOB, Job, "put it back from a copy, or choose another folder")
    former = len(before["model"]) == FORMER_LENGTH
    asked = job | ({"model": listing_digest(model.list())} if former else {})
    problems = [
        f"{key} is {asked[key]} now, the answers there were made with {before[key]}"
        for key in ("model", "max_new_tokens")
        if asked[key] != before[key]
    ]
    changed = [
        path
        for path, version in before["input"].items()
        # As noted now, or by a job that was begun when a file's version did not have the time of its last change.
        if version not in (now := versions.get(path, ""), former_version(now))
    ]
    if changed:
        problems.append(
            f"{len(changed):,} input files have changed or gone since, the first: {sorted(changed)[0]}"
        )
    if problems:
        raise ConfigError([f"--output {output.uri}: {line}; choose another folder" for line in problems])
    job["named_by"] = before.get("named_by", store.uri)
    pieces = [replace(piece, named_by=job["named_by"]) for piece in pieces]
    if others := answered_pieces(output) - {piece.name for piece in pieces}:
        raise ConfigError(
            [
                f"--output {output.uri} holds answers to {min(others)}, which is no piece of --input={options.input} "
                "as it is spelled and placed now; give it as it was at the first start, or choose another folder"
            ]
        )
    output.put(JOB, json.dumps(job, indent=2, allow_nan=False).encode())
    return pieces


def answer(
    left: Sequence[Piece], model_uri: str, digest: str, output_uri: str, options: argparse.Namespace
) -> None:
    """Run the job on Ray Data, and print how it stands with each part that is answered."""
    import ray.data

    # Each row that says a part is answered is a block of its own, and so comes here at once.
    ray.data.DataContext.get_current().target_max_block_size = 1
    threads = max(1, round(options.cpus_per_worker))
    settings = (model_uri, output_uri, options.rows_per_batch, threads, options.max_new_tokens, digest)
    variables = {} if options.gpus_per_worker else CPU_ONLY | CPU_ALLOCATOR
    items = [asdict(piece) | {"name": piece.name} for piece in left]
    parts = ray.data.from_items(items, override_num_blocks=len(items)).flat_map(
        PieceAnswers,  # type: ignore[arg-type]
        fn_constructor_args=settings,
        compute=ray.data.ActorPoolStrategy(size=min(options.workers, len(left))),
        num_cpus=options.cpus_per_worker,
        num_gpus=options.gpus_per_worker or None,
        runtime_env={"env_vars": variables},
    )
    started, ended, counts = time.monotonic(), 0, Counts()
    for row in parts.iter_rows():
        ended += row["ended"]
        counts += Counts(row["answered"], row["refused"], row["truncated"])
        seconds = time.monotonic() - started
        rest = f", about {seconds / ended * (len(left) - ended):,.0f} s left" if ended else ""
        print(
            f"{ended:,} of {len(left):,} pieces, {told(counts)}, {counts.answered / seconds:,.0f} records/s{rest}",
            flush=True,
        )


def told(counts: Counts) -> str:
    """Counts in words."""
    cut = f", {counts.truncated:,} of them cut to the model's length" if counts.truncated else ""
    return f"{counts.answered:,} records answered{cut}, {counts.refused:,} refused"
