"""A run as one page: `python trainers/report.py --run URI` writes `report.html` into the run, also half-way.

Everything on it is recomputed from the run directory. A file that is not there (yet) leaves its section out,
or says so; nothing is estimated but energy, whose assumption is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # run as a file: the project's root is not on the path, this folder is
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from cluster.configuration.config import run_entry
from cluster.storage.uris import open_store
from trainers.reporting.page import write_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write report.html into a run, from what the run holds now.")
    parser.add_argument(
        "--run", required=True, metavar="URI", help="the run's folder: a path, s3:// or gs://"
    )
    print(write_report(open_store(parser.parse_args(argv).run)))


if __name__ == "__main__":
    run_entry(main, ValueError)  # no run is there
