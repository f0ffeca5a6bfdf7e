"""Pretrain a language model: raw text in object storage in, an evaluated and exported model out.

    python trainers/pretrain.py --config trainers/configs/sample.yaml
    ray job submit --working-dir . -- python trainers/pretrain.py --config … --corpus.uri s3://bucket/prefix

The same command goes on where an earlier one was interrupted, and says so if nothing is left to do.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from rich.console import Console
    from rich.text import Text

    from cluster.configuration.config import load_config, run_entry
    from cluster.console.errors import ConfigError
    from cluster.console.terminal import Terminal
    from cluster.hardware.machine import this_host
    from cluster.nodes.fitness import problems_of_nodes
    from cluster.sessions.session import ray_session
    from cluster.sessions.workers import Resources, piece_shortages, shortages
    from cluster.storage.uris import open_store
    from data.preparing.assemble import existing_manifest
    from data.preparing.corpus import EXPECTED, corpus_table, prepare
    from data.preparing.progress import progress_line
    from data.rows.window import READ_CPUS
    from data.shards.manifest import Manifest, read_manifest
    from trainers.planning.checks import (
        corpus_remark,
        manifest_problems,
        objective_problems,
        place_problems,
        plan_of,
        problems_before_start,
        resources_here,
    )
    from trainers.pretraining import closing, run_folder
    from trainers.pretraining.baselines import write_baselines
    from trainers.pretraining.config import PretrainConfig, absolute, run_store
    from trainers.pretraining.initial import with_initial
    from trainers.pretraining.peak import keep_peak
    from trainers.recovery.lease import lease
    from trainers.recovery.stopping import STOP, RunFailed
    from trainers.reporting.metrics import merge_metrics
    from trainers.reporting.page import write_report
    from trainers.reporting.progress import Progress
    from trainers.reporting.results import read_run, results_table
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: run `make setup`, then .venv/bin/python") from missing

FLAGS = {"dry-run": "check everything, print the plan, start nothing"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the main job from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    loaded = load_config(PretrainConfig, arguments, description=__doc__ or "", extra_flags=FLAGS)
    if misplaced := list(place_problems(loaded.config)):
        raise ConfigError(misplaced)
    config, console = with_initial(absolute(loaded.config)), Terminal(soft_wrap=True)
    run = run_store(config)
    problems = list(problems_before_start(config))
    if not problems:
        run_folder.check_unchanged(run, config)
    too_large = lacking_on(config, [resources_here()]) if config.cluster.is_local else []
    if "dry-run" in loaded.flags:
        if problems:
            raise ConfigError(problems)
        console.print(plan_of(config, manifest_now(config)).text, highlight=False)
        return console.print(
            *(f"not on this machine: {line}" for line in too_large), sep="\n", highlight=False
        )
    if problems or too_large:
        raise ConfigError([*problems, *too_large])
    with lease(run, console.print):
        # Once more: the driver that had the run until now may have begun it otherwise.
        run_folder.check_unchanged(run, config)
        conclusion = closing.Conclusion(run)
        if not run_folder.is_finished(run):
            train(config, console, conclusion)
        else:
            if remark := corpus_remark(config, run_folder.pinned_manifest(run) or ""):
                console.print(remark, highlight=False, markup=False)
            close(config, console, conclusion)
        if run_folder.is_finished(run):
            conclusion.note()


def manifest_now(config: PretrainConfig) -> Manifest | None:
    """The run's manifest, or the one of its corpus where that is prepared already."""
    if pinned := run_folder.pinned_manifest(run_store(config)):
        return read_manifest(open_store(config.corpus.prepared), pinned)
    try:
        return existing_manifest(config.corpus)
    except EXPECTED as unusable:
        raise ConfigError([str(unusable)]) from None


def train(config: PretrainConfig, console: Console, conclusion: closing.Conclusion) -> None:
    """Prepare the corpus and train, both from where they are, on Ray; close the run, if that was its end."""
    run = run_store(config)
    run.delete(STOP)  # an earlier driver was asked
    with ray_session(config.cluster) as resources:
        # Here, for the session sets what Ray reads when imported.
        from trainers.pretraining.driver import live_goodput, run_workers

        if problems := node_problems(config, resources):
            raise ConfigError(problems)
        manifest = pinned_or_prepared(config, console)
        if problems := [*manifest_problems(config, manifest), *objective_problems(config, manifest)]:
            raise ConfigError(problems)
        plan = plan_of(config, manifest)
        run_folder.write_start(run, config, manifest, plan.text)
        keep_peak(run, config, this_host().device_name, plan.job.peak)
        console.print(plan.text, highlight=False)
        with live_goodput(config):
            with Progress(run, config.run.steps, console=console, line_seconds=config.run.log_every_seconds):
                try:
                    run_workers(config, manifest.digest, run_folder.pinned_initial(run))
                except RunFailed as failed:
                    raise SystemExit(f"the run cannot go on: {failed}") from None
            if run_folder.is_finished(run):
                close(config, console, conclusion)


def node_problems(config: PretrainConfig, resources: Sequence[Resources]) -> list[str]:
    """What is wrong with the nodes of a cluster, or lacks, before a worker is started on them."""
    if config.cluster.is_local:
        return lacking_on(config, resources)
    places = [run_store(config).uri, config.corpus.prepared]
    return [*piece_problems(config, resources), *problems_of_nodes(config.cluster, places, READ_CPUS)]


def lacking_on(config: PretrainConfig, nodes: Sequence[Resources]) -> list[str]:
    """What the nodes lack for the workers, and for the work on the corpus."""
    return [*shortages(config.cluster, nodes, READ_CPUS), *piece_problems(config, nodes)]


def piece_problems(config: PretrainConfig, nodes: Sequence[Resources]) -> list[str]:
    """What the nodes lack for the work on the corpus; nothing once the run has its manifest."""
    if run_folder.pinned_manifest(run_store(config)):
        return []
    return list(piece_shortages(config.corpus.cpus_per_piece, nodes))


def pinned_or_prepared(config: PretrainConfig, console: Console) -> Manifest:
    """The manifest that the run was started on, or that of the corpus as it is now."""
    pinned = run_folder.pinned_manifest(run_store(config))
    if pinned:
        manifest = read_manifest(open_store(config.corpus.prepared), pinned)
    else:
        try:
            with progress_line(console) as on_progress:
                manifest = prepare(config.corpus, on_progress)
        except EXPECTED as unusable:
            raise ConfigError([str(unusable)]) from None
        console.print(corpus_table(manifest))
    if manifest.weakness:
        console.print(manifest.weakness, highlight=False)
    return manifest


def close(config: PretrainConfig, console: Console, conclusion: closing.Conclusion) -> None:
    """Make the report of a finished run, and print what it reached."""
    run = run_store(config)
    manifest = read_manifest(open_store(config.corpus.prepared), run_folder.pinned_manifest(run) or "latest")
    closing.write_floor(run, config, manifest)
    conclusion.note()
    write_baselines(run, config, manifest)
    conclusion.note()
    samples = closing.write_samples(run, config)
    merge_metrics(run)
    conclusion.note()
    write_report(run)
    console.print(results_table(read_run(run)))
    for sample in samples:
        console.print(Text.assemble((sample["prompt"], "bold"), sample["continuation"], "\n"))
    console.print(
        f"the run is finished; report: {run.uri.removeprefix('file://')}/report.html", highlight=False
    )


if __name__ == "__main__":
    run_entry(main)
