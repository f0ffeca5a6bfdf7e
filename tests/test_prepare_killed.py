"""A driver of data/prepare.py killed in the middle of its work: what is done stays done."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil
import pytest

from cluster.configuration.config import INTERRUPTED
from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from data.preparing.corpus import prepare
from data.reading.raw_shards import CorpusConfig
from data.shards.manifest import read_manifest
from data.tokens.tokenizer import TokenizerConfig, train_tokenizer
from tests.small_run import Terminal, start_command
from tests.test_prepare import one_by_one
from trainers.planning.checks import resources_here

NUM_SHARDS = 6


def put_shards(folder: Path) -> None:
    """English in shards of a megabyte, too large for two to be one piece of work."""
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        lines = [
            json.dumps({"id": f"{copy}/{name}", "text": f"{shard}.{copy}\n{text}"})
            for copy in range(2)
            for name, text in sorted(topics.items())
        ]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))


def prepare_command(folder: Path, **settings: Any) -> list[str]:
    """The command that prepares `raw` into `prepared`, double underscores standing for dots, one piece at a time: many
    cores would end all at once."""
    settings |= {"uri": f"{folder}/raw", "prepared": f"{folder}/prepared"}
    settings |= {"cpus_per_piece": resources_here()["CPU"]}
    command = [sys.executable, str(PROJECT / "data" / "prepare.py"), "--cluster.address", "local"]
    for key, value in settings.items():
        command += [f"--corpus.{key.replace('__', '.')}", str(value)]
    return command


@pytest.mark.cluster
@pytest.mark.slow
def test_ctrl_c_at_any_moment_ends_a_preparation_in_seconds_with_one_line_and_the_same_command_goes_on(
    tmp_path: Path,
) -> None:
    put_shards(tmp_path / "raw")
    command = prepare_command(tmp_path, tokenizer__vocab_size=512)
    store = open_store(f"{tmp_path}/prepared")

    def names(driver: subprocess.Popen[bytes]) -> set[str]:
        return {each.name() for each in psutil.Process(driver.pid).children()}

    def listed(kind: str) -> int:
        return len(list(store.list(f"pieces/{kind}-")))

    moments: list[Callable[[subprocess.Popen[bytes]], Any]] = [
        lambda driver: "gcs_server" in names(driver),  # Ray starts
        lambda driver: "raylet" in names(driver),
        lambda driver: listed("survey"),
        lambda driver: listed("tokens"),
    ]
    for number, moment in enumerate(moments):
        with Terminal(command) as terminal:
            ends = time.monotonic() + 300
            while not moment(terminal.driver):
                assert terminal.driver.poll() is None and time.monotonic() < ends, terminal.text()
            os.killpg(terminal.driver.pid, signal.SIGINT)
            # 3 s on an idle machine.
            assert terminal.driver.wait(45) == INTERRUPTED, f"moment {number}: {terminal.text()}"
        told = terminal.text()
        assert "prepare: interrupted" in told and "Traceback" not in told, f"moment {number}: {told}"
    done = listed("tokens")
    assert 1 <= done < NUM_SHARDS
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert listed("tokens") == NUM_SHARDS


@pytest.mark.cluster
@pytest.mark.slow
def test_after_kill_9_of_the_driver_the_same_command_finishes_and_does_no_finished_piece_again(
    tmp_path: Path,
) -> None:
    put_shards(tmp_path / "raw")
    fixed = train_tokenizer([topics["class"], topics["import"]], TokenizerConfig(vocab_size=300))
    (tmp_path / "tokenizer.json").write_text(fixed.json)
    command = prepare_command(tmp_path, tokenizer__path=f"{tmp_path}/tokenizer.json")
    store = open_store(f"{tmp_path}/prepared")

    def records(kind: str) -> dict[str, str]:
        return {info.path: info.version for info in store.list(f"pieces/{kind}")}

    driver = start_command(command, tmp_path / "log")
    ends = time.monotonic() + 300
    while len(records("tokens-")) < 2:
        assert driver.poll() is None and time.monotonic() < ends, (tmp_path / "log").read_text()[-4_000:]
        time.sleep(0.05)
    under_it = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    # Ray's own processes notice, and end a task that is under way; or that finishes its piece.
    for process in psutil.wait_procs(under_it, timeout=60)[1]:
        process.kill()
    done = records("")
    assert 2 <= sum("tokens-" in path for path in done) < NUM_SHARDS
    assert sum("survey-" in path for path in done) == NUM_SHARDS

    assert start_command(command, tmp_path / "log").wait(300) == 0, (tmp_path / "log").read_text()[-4_000:]
    assert done.items() <= records("").items()
    assert len(records("tokens-")) == NUM_SHARDS
    afresh = CorpusConfig(
        uri=f"{tmp_path}/raw",
        prepared=f"{tmp_path}/afresh",
        tokenizer=TokenizerConfig(path=f"{tmp_path}/tokenizer.json"),
    )
    assert read_manifest(store).digest == prepare(afresh, fan_out=one_by_one).digest
