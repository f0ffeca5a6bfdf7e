"""Which way to train a model on a cluster that is not there yet: what fits, what is fastest, what it costs.

    python trainers/plan_cluster.py --config trainers/configs/llama-7b.yaml --gpus 256 --gpu h100-80gb

Time, memory and energy are those of trainers/planning/plan.py, which `pretrain.py --dry-run` prints, speed that of
trainers/planning/throughput.py; nothing is measured or started.
The speeds that the estimate was held against (trainers/planning/published_speeds.py) are of stage 3 alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from cluster.configuration.config import load_config, run_entry
from cluster.console.terminal import Terminal
from cluster.hardware.fleet import GPUS
from trainers.planning.cluster_plan import (
    TABLE_WIDTH,
    ClusterPlanConfig,
    basis,
    options,
    options_table,
    summary,
    why_nothing_fits,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and what follows from its first line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load_config(ClusterPlanConfig, arguments, description=__doc__ or "").config
    console, gpu = Terminal(soft_wrap=True), GPUS[config.gpu]
    console.width = max(console.width, TABLE_WIDTH)
    found = options(config)
    fitting = [option for option in found if option.fits]
    console.print(options_table(config, fitting[: config.rows] or found[-3:]))
    if fitting:
        console.print(*summary(config, gpu, fitting[0]), sep="\n", highlight=False)
    else:
        console.print(why_nothing_fits(found, gpu), highlight=False)
    console.print(*basis(gpu), sep="\n", highlight=False)
    if not fitting:
        raise SystemExit(1)


if __name__ == "__main__":
    run_entry(main)
