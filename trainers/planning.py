"""Before a run starts: everything that is wrong with it, and the plan of what it will take."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from cluster.hardware import peak_of, this_host, worker_watts
from cluster.session import cpu_problem
from data.assemble import given_tokenizer
from data.documents import corpus_problems
from data.manifest import Manifest
from data.window import READ_CPUS
from trainers.config import PretrainConfig, model_of, run_store
from trainers.plan import Job, make_plan


def problems_before_start(config: PretrainConfig) -> Iterator[str]:
    """What stands in the way of a run whose sections are right in themselves; speaks to the object store."""
    yield from corpus_problems(config.corpus)
    if problem := run_store(config).problem_writing():
        yield f"run.storage: {problem}"


def resource_problems(config: PretrainConfig, resources: Mapping[str, float]) -> Iterator[str]:
    """Whether the workers fit into the cluster's resources and leave room for Ray Data's reads."""
    if problem := cpu_problem(config.cluster, READ_CPUS, resources.get("CPU", 0)):
        yield problem
    wanted = config.cluster.num_workers * config.cluster.gpus_per_worker
    if wanted > (found := resources.get("GPU", 0)):
        yield (
            f"cluster.num_workers={config.cluster.num_workers} x cluster.gpus_per_worker="
            f"{config.cluster.gpus_per_worker:g} = {wanted:g} GPUs, but the cluster has {found:g}; "
            f"at most {found:g} workers fit"
        )


def resources_here() -> dict[str, float]:
    """What a local Ray would have."""
    host = this_host()
    return {"CPU": host.cores, "GPU": host.num_devices}


def plan_of(config: PretrainConfig, manifest: Manifest | None) -> str:
    """The plan as text; without a manifest the number of epochs is unknown."""
    host, cluster = this_host(), config.cluster
    device = "cuda" if cluster.gpus_per_worker else "cpu"
    if manifest is None:
        tokenizer = given_tokenizer(config.corpus)
        entries = tokenizer.vocab_size if tokenizer else config.corpus.tokenizer.vocab_size
        model = replace(config.model, vocab_size=config.model.vocab_size or entries)
        train_tokens = None
    else:
        model = model_of(config, manifest)
        train_tokens = int(manifest.fragments.num_tokens[manifest.select("train")].sum())
    job = Job(
        model=model,
        engine=config.engine,
        optimizer=config.optimizer,
        checkpoint=config.checkpoint,
        seq_len=config.batch.seq_len,
        rows_per_step=config.batch.rows_per_step,
        steps=config.run.steps,
        num_workers=cluster.num_workers,
        train_tokens=train_tokens,
        peak=peak_of(device, host.device_name, config.engine.precision, cluster.threads),
        watts=cluster.num_workers
        * worker_watts(config.energy, device, host.device_name, cluster.cpus_per_worker),
        energy=config.energy,
    )
    return make_plan(job).text
