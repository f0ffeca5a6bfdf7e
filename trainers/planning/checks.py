"""Before a run starts: everything that is wrong with it, and the plan of what it will take."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cluster.console.errors import ConfigError
from cluster.hardware.fleet import ASSUMED_GPU, Gpu, find_gpu
from cluster.hardware.machine import Peak, this_host
from cluster.limits.bounds import seconds_given
from cluster.storage.uris import StorageError, Store, open_store
from data.order.epochs import Rows
from data.order.order import Order
from data.order.permutation import permute
from data.preparing.assemble import existing_manifest, given_tokenizer
from data.reading.documents import corpus_problems
from data.reading.raw_shards import CorpusError
from data.rows.framing import NO_LABEL, Framing, framing_of
from data.shards.manifest import Manifest
from data.shards.shards import read_fragment
from data.tokens.tokenizer import TokenizerError, read_tokenizer
from trainers.model.shape import ModelConfig
from trainers.objectives.kinds import objective_of
from trainers.planning.plan import Job, Plan, make_plan
from trainers.planning.run_time import Evaluations
from trainers.pretraining import run_folder
from trainers.pretraining.config import PretrainConfig, model_of, run_store, watts_per_worker
from trainers.pretraining.peak import peak_of_run
from trainers.reporting.watching import SCRAPE_SECONDS_VARIABLE

FRAGMENTS_TRIED, ROWS_TRIED = 16, 256
"""Looked through for a first pair, before a run is refused for having none."""


def place_problems(config: PretrainConfig) -> Iterator[str]:
    """What is wrong with the URIs as they were given, before relative ones are made absolute on this machine."""
    places = {
        "run.storage": config.run.storage,
        "run.init_from": config.run.init_from,
        "corpus.prepared": config.corpus.prepared,
        "corpus.uri": config.corpus.uri,
        **{f"corpus.sources.{name}": uri for name, uri in config.corpus.sources.items()},
    }
    for key, uri in places.items():
        try:
            given = bool(uri) and bool(open_store(uri))
        except ValueError as unusable:
            yield f"{key}: {unusable}"
            continue
        if given and not config.cluster.is_local and "://" not in uri and not uri.startswith("/"):
            yield (
                f"{key}={uri} is a relative path, which each node of a cluster would take for another folder; give "
                f"a URI that all nodes reach, as s3://bucket/prefix"
            )


def problems_before_start(config: PretrainConfig) -> Iterator[str]:
    """What stands in the way of a run whose sections are right in themselves; speaks to the object store."""
    try:  # what the driver reads in the end, when a wrong value would be found too late
        seconds_given(SCRAPE_SECONDS_VARIABLE, 0)
    except ConfigError as error:
        yield from error.problems
    run = run_store(config)
    if problem := run.problem_writing():
        yield f"run.storage: {problem}"
    elif run_folder.pinned_manifest(run):
        return  # it goes on from what was prepared: the raw corpus may be gone
    yield from corpus_problems(config.corpus)
    try:
        tokenizer = given_tokenizer(config.corpus)
    except ValueError as unusable:
        yield str(unusable)
    else:
        if tokenizer:
            yield from tokenizer_problems(config, tokenizer.json.encode(), tokenizer.boundary_id)


def corpus_remark(config: PretrainConfig, digest: str) -> str | None:
    """Why the raw corpus is no longer the one behind the manifest that a finished run was trained on, if so."""
    trained = f"the run was trained on what it was then, manifest {digest}"
    try:
        manifest = existing_manifest(config.corpus)
    except (CorpusError, TokenizerError, StorageError) as unusable:
        return f"{unusable}; {trained}"
    if manifest and manifest.digest == digest:
        return None
    return f"{', '.join(config.corpus.named_sources().values())}: the raw corpus has changed since; {trained}"


def tokenizer_problems(config: PretrainConfig, tokenizer_json: bytes, boundary_id: int) -> Iterator[str]:
    """What the objective needs of the tokenizer and the tokenizer has not."""
    mask = config.model.document_mask
    try:
        if framing := config.objective.framing:
            Framing(framing, tokenizer_json, boundary_id=boundary_id, seq_len=config.batch.seq_len)
        objective_of(config.objective, tokenizer_json, boundary_id=boundary_id, document_mask=mask)
    except ValueError as unusable:
        yield str(unusable)


def objective_problems(config: PretrainConfig, manifest: Manifest) -> Iterator[str]:
    """Whether the objective can be trained on a prepared corpus; reads some fragments of it for pairs."""
    corpus = open_store(config.corpus.prepared)
    tokenizer_json = read_tokenizer(corpus, manifest.tokenizer)
    problems = list(tokenizer_problems(config, tokenizer_json, manifest.boundary_id))
    yield from problems
    framing = config.objective.framing
    if problems or framing is None or not config.objective.has_pairs:
        return
    maker = framing_of(framing, config.corpus.prepared, manifest, config.batch.seq_len)
    for split in ("train", "validation"):
        fragments = manifest.select(split)
        tried = fragments[permute(np.arange(len(fragments)), max(1, len(fragments)), key=0)][:FRAGMENTS_TRIED]
        if any(_has_pair(maker, corpus, manifest, int(fragment)) for fragment in tried):
            continue
        if split == "train" or len(tried):
            yield (
                f"objective.kind={config.objective.kind} finds no pair in the {len(tried):,} fragments of the {split} "
                "split that were tried: it needs documents of two sentences or more, and for next sentences several "
                "documents in a fragment; raise corpus.fragment_tokens, give longer documents, or set "
                "objective.kind=masked and model.pair_head=false"
            )


def _has_pair(maker: Framing, corpus: Store, manifest: Manifest, fragment: int) -> bool:
    """Whether a pair can be made of the first rows of a fragment."""
    whole = read_fragment(corpus, manifest, fragment)
    start = np.arange(0, max(1, len(whole) - 1), maker.seq_len)[:ROWS_TRIED]
    rows = Rows(start * 0, start * 0, start * 0 + fragment, np.arange(len(start)), start)
    return bool((maker.frame(whole, rows)[1] != NO_LABEL).any())


def manifest_problems(config: PretrainConfig, manifest: Manifest) -> Iterator[str]:
    """What a prepared corpus lacks for this run: found here, and not by the workers, days later."""
    for split in ("validation", "test"):
        if not len(manifest.select(split)):
            yield (
                f"corpus.splits: no document fell into the {split} split, which every run needs; raise "
                f"corpus.splits.{split}, or name shards or documents for it"
            )
    try:
        model_of(config, manifest)
        Order(manifest, config.order, seq_len=config.batch.seq_len, rows_per_step=config.batch.rows_per_step)
    except ValueError as unusable:
        yield str(unusable)


def resources_here() -> dict[str, float]:
    """What a local Ray would have."""
    host = this_host()
    return {"CPU": host.cores, "GPU": host.num_devices}


def plan_of(config: PretrainConfig, manifest: Manifest | None) -> Plan:
    """The plan on what this machine has; without a manifest the number of epochs is unknown."""
    host, cluster = this_host(), config.cluster
    device, gpu = "cpu", None
    if cluster.gpus_per_worker:
        device, gpu = "cuda", find_gpu(host.device_name) if host.num_devices else ASSUMED_GPU
    if manifest is None:
        tokenizer = given_tokenizer(config.corpus)
        entries = tokenizer.vocab_size if tokenizer else config.corpus.tokenizer.vocab_size
        model = replace(config.model, vocab_size=config.model.vocab_size or entries)
        train_tokens = left_out = None
    else:
        model = model_of(config, manifest)
        train_tokens = int(manifest.fragments.num_tokens[manifest.select("train")].sum())
        batch = config.batch
        order = Order(manifest, config.order, seq_len=batch.seq_len, rows_per_step=batch.rows_per_step)
        left_out = order.remainder()
    peak = peak_of_run(run_store(config), config, model, host.device_name)
    job = job_of(config, model, device, host.device_name, peak, gpu, manifest)
    return make_plan(replace(job, train_tokens=train_tokens, left_out=left_out))


def evaluations_of(config: PretrainConfig, manifest: Manifest | None) -> Evaluations:
    """How much a run evaluates, as far as that is known before the corpus is prepared."""
    limit = config.validation.max_rows * config.batch.seq_len or None
    tokens: dict[str, int] = {}
    if manifest is not None:
        for split in ("validation", "test"):
            tokens[split] = int(manifest.fragments.num_tokens[manifest.select(split)].sum())
    known = [number for number in (limit, tokens.get("validation")) if number is not None]
    return Evaluations(
        validations=-(-config.run.steps // config.validation.every_steps),
        validation_tokens=min(known, default=None),
        test_tokens=tokens.get("test"),
    )


def job_of(
    config: PretrainConfig,
    model: ModelConfig,
    device: str,
    device_name: str,
    peak: Peak,
    gpu: Gpu | None,
    manifest: Manifest | None = None,
) -> Job:
    """What the plan of a run follows from: the one way from a configuration to time, memory and energy."""
    cluster = config.cluster
    return Job(
        model=model,
        engine=config.engine,
        optimizer=config.optimizer,
        checkpoint=config.checkpoint,
        seq_len=config.batch.seq_len,
        target_share=config.objective.mask_rate if config.objective.is_encoder else 1.0,
        rows_per_step=config.batch.rows_per_step,
        steps=config.run.steps,
        num_workers=cluster.num_workers,
        lanes=config.order.lanes,
        peak=peak,
        gpu=gpu,
        watts=cluster.num_workers * watts_per_worker(config, device, device_name),
        energy=config.energy,
        evaluations=evaluations_of(config, manifest),
    )
