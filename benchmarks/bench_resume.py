"""Going on: from the command to the first new step of a run that was killed, and what its checkpoints cost it.

    python benchmarks/bench_resume.py [--steps 40]

A small run on one worker, through the entry that users call, is ended by kill -9 and started again. The goals: less
than 30 s in all, less than 5 s of them ours, and a stall by checkpoints under 5 % of the default interval.

The time is cut at what the run's records say: when worker 0 began to work, when it had restored the checkpoint, and
when it finished its first step. `libraries` is what fresh interpreters take to import torch, DeepSpeed and Ray, once
for the driver and once for a worker; `ours` the driver's checks (a dry run without its imports), restoring, and the
first step itself; `Ray` all else: its processes, the worker group, and its pipeline up to the first block.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.sessions.session import PROJECT
from cluster.storage.uris import Store, open_store
from tests.small_run import SmallRun, kill_tree, put_corpus, wait_for_step
from trainers.checkpoints.keeping import CheckpointConfig
from trainers.reporting.metrics import Record, events_of, read_attempts, steps_of

LAST_STEP = 1_000_000  # never reached: both starts are killed
POLL_SECONDS = 0.5


def seconds(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    return time.perf_counter() - started


def importing(module: str) -> float:
    return seconds([sys.executable, "-c", f"import {module}"])


def train_until(run: SmallRun, store: Store, step: int) -> None:
    """Train up to a step at least, and end it as a power cut would."""
    process = run.start(run__steps=LAST_STEP)
    try:
        wait_for_step(store, step, process)
    finally:
        kill_tree(process.pid)
        process.wait()


def first_records(run: SmallRun, store: Store) -> tuple[float, Record, Record]:
    """Start the run again: when the command began, unix time, and the records of the start and of its first step."""
    before = max(record["attempt"] for record in read_attempts(store))
    began = time.time()
    process = run.start(run__steps=LAST_STEP)
    try:
        while process.poll() is None:
            records = [record for record in read_attempts(store) if record["attempt"] > before]
            if steps := steps_of(records):
                return began, events_of(records, "start")[0], steps[0]
            time.sleep(POLL_SECONDS)
    finally:
        kill_tree(process.pid)
        process.wait()
    raise SystemExit(f"the run did not go on:\n{run.output()[-2_000:]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40, help="steps before the run is killed")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        run = SmallRun(folder, Path(folder) / "log.txt")
        store = open_store(f"{folder}/runs/pretrain")
        put_corpus(open_store(f"{folder}/raw"))
        train_until(run, store, arguments.steps)
        entry = importing("trainers.pretrain")
        checks = max(0.0, seconds([*run.command(run__steps=LAST_STEP), "--dry-run"]) - entry)
        libraries = importing("trainers.pretrain, ray") + importing("trainers.pretraining.worker, deepspeed")
        print_resume(*first_records(run, store), checks, libraries)
        print_stall(read_attempts(store))


def print_resume(
    began: float, start: Record, first: Record, checks_seconds: float, library_seconds: float
) -> None:
    restoring, step = start["time"] - start["began"], first["step_seconds"]
    total, ours = first["time"] - began, checks_seconds + restoring + step
    print(f"from the command to step {first['step']:,}   {total:6.1f} s   goal: less than 30 s")
    print(f"  ours                           {ours:6.1f} s   goal: less than 5 s")
    print(f"    checks before Ray            {checks_seconds:6.1f} s")
    print(f"    restoring {start['checkpoint']}  {restoring:6.1f} s")
    print(f"    the first step               {step:6.1f} s")
    print(f"  importing libraries, twice     {library_seconds:6.1f} s")
    print(f"  Ray                            {max(0.0, total - ours - library_seconds):6.1f} s")


def print_stall(records: list[Record]) -> None:
    """The stall by a checkpoint as a share of the default interval, at this run's speed."""
    steps = steps_of(records)
    stalls = [record["checkpoint_stall_seconds"] for record in steps if record["checkpoint_stall_seconds"]]
    interval = CheckpointConfig().every_steps * median(record["step_seconds"] for record in steps)
    stall = median(stalls)
    print(f"stall by a checkpoint            {stall * 1e3:6.1f} ms, median of {len(stalls)}")
    every = CheckpointConfig().every_steps
    print(f"  of {every:,} steps ({interval:.1f} s)        {stall / interval:6.2%}   goal: under 5 %")


if __name__ == "__main__":
    main()
