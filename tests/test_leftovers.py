"""What kill -9 leaves behind is gone once the same command has ended: the folder is that of an unbroken run."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_finetune import SHORT, command, put_place

from cluster.sessions.session import PROJECT

KILLED_AT = """
import os, signal, sys
from pathlib import Path
moment, replace = sys.argv[1], os.replace

def killed_before(temporary, target):
    if moment in str(target):
        Path(temporary).with_name("kept").touch()  # a file of somebody else's
        os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, target)

os.replace = killed_before
from trainers.finetune import main
main(sys.argv[2:])
"""
MOMENTS = ("checkpoints/step-00000003", "best/", "export/model.safetensors")
OF_EACH_START = re.compile(r"(attempts/\d+|drivers/\d+\.\w+|metrics/[\d-]+\.jsonl|tensorboard/events.*)")
"""Records that every start leaves on purpose."""


def files_of(run: Path) -> set[str]:
    found = (path.relative_to(run).as_posix() for path in run.rglob("*") if not path.is_dir())
    return {path for path in found if not OF_EACH_START.fullmatch(path)}


@pytest.mark.slow
def test_fine_tuning_that_was_killed_while_it_wrote_ends_with_the_files_of_an_unbroken_run(tmp_path):
    place = put_place(tmp_path)
    changes = {"batch": SHORT, "checkpoint": {"every_steps": 3}}

    def run(name, moment):
        arguments = command(place, name, changes)[2:]
        return subprocess.run(
            [sys.executable, "-c", KILLED_AT, moment, *arguments], cwd=PROJECT, capture_output=True, text=True
        )

    broken, whole = (place / "runs" / name / "seed-0" for name in ("broken", "whole"))
    for moment in MOMENTS:
        assert run("broken", moment).returncode == -signal.SIGKILL
        assert len(list(broken.rglob(".unfinished-*"))) == 1, "that of the start before is there still"
    for name in ("broken", "whole"):
        ended = run(name, "never")
        assert ended.returncode == 0, ended.stderr
    kept = {path for path in files_of(broken) if os.path.basename(path) == "kept"}
    assert kept and files_of(broken) - kept == files_of(whole)
