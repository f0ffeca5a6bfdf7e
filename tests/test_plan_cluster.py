import re
from pathlib import Path

import pytest

from cluster.configuration.config import load_config, to_dict
from cluster.console.errors import ConfigError
from cluster.hardware.fleet import ASSUMED_GPU, GPUS, find_gpu
from cluster.hardware.machine import EnergyConfig, Hardware
from cluster.sessions.session import PROJECT
from trainers.plan_cluster import main
from trainers.planning import checks as planning
from trainers.planning.checks import plan_of
from trainers.planning.cluster_plan import ClusterPlanConfig, job_of, option_of, options, room
from trainers.planning.plan import rows_per_worker
from trainers.planning.throughput import Strategy
from trainers.pretraining import run_folder
from trainers.pretraining.config import PretrainConfig
from trainers.reporting.results import RunFiles, energy_of
from trainers.reporting.units import duration, energy

CONFIGS = PROJECT / "trainers" / "configs"
ON_GPUS = [path for path in sorted(CONFIGS.glob("*.yaml")) if "gpus_per_worker: 1" in path.read_text()]
LLAMA_7B = ["--config", "trainers/configs/llama-7b.yaml"]


def config(*arguments: str) -> ClusterPlanConfig:
    return load_config(ClusterPlanConfig, [*LLAMA_7B, *arguments], description="").config


def test_the_fastest_that_fits_comes_first_and_what_does_not_fit_last() -> None:
    found = options(config("--gpus", "256", "--gpu", "h100-80gb"))
    fitting = [option for option in found if option.fits]
    assert found[: len(fitting)] == fitting
    speeds = [option.tokens_per_second for option in fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert 0.2 < fitting[0].mfu < 0.6


def test_more_gpus_let_lower_stages_fit() -> None:
    def stages(gpus: int) -> set[int]:
        return {o.strategy.zero_stage for o in options(config("--gpus", str(gpus))) if o.fits}

    assert 0 not in stages(256)  # 16 bytes a parameter of 6.7 G do not fit anywhere
    assert min(stages(64)) >= 1
    assert stages(8) <= stages(256)


def test_a_model_that_fits_nowhere_is_said_so_with_exit_1(capsys) -> None:
    with pytest.raises(SystemExit, match="1"):
        main([*LLAMA_7B, "--model.num_layers", "320", "--gpus", "1", "--gpu", "a100-40gb"])
    assert "nothing fits" in capsys.readouterr().out


def test_a_model_that_is_too_large_for_one_gpu_fits_with_parameters_in_host_memory(capsys) -> None:
    main([*LLAMA_7B, "--gpus", "1", "--gpu", "a100-40gb"])
    assert "engine.zero_stage=3 engine.offload=optimizer+parameters" in capsys.readouterr().out


def test_offload_fits_where_the_hosts_memory_takes_it_and_nowhere_else(capsys) -> None:
    # 49 G parameters: 590 GB of masters and moments, and as much in the buffers of a checkpoint.
    large = ["--model.num_layers", "240", "--gpu", "a100-80gb"]
    small, great = options(config(*large, "--gpus", "8")), options(config(*large, "--gpus", "64"))
    assert any(option.device_bytes <= room(GPUS["a100-80gb"]) for option in small)
    assert not any(option.fits for option in small)
    fitting = [option for option in great if option.fits]
    assert fitting and all(option.host_bytes < 0.7 * 1_152 * 2**30 for option in fitting)
    with pytest.raises(SystemExit, match="1"):
        main([*LLAMA_7B, *large, "--gpus", "8"])
    assert "of a node's memory" in capsys.readouterr().out


def test_the_plan_names_keys_time_cost_energy_and_its_own_error(capsys) -> None:
    main([*LLAMA_7B, "--gpus", "256", "--gpu", "h100-80gb"])
    text = capsys.readouterr().out
    for part in (
        "engine.zero_stage=",
        "1.00 T tokens",
        "GPU-hours",
        "$",
        "CO2",
        "median",
        "worst",
        "stage 3",
    ):
        assert part in text
    days = float(re.search(r"tokens in (\d+) d", text)[1])
    # 1 T tokens x 4.3e10 FLOP on 256 H100s at 30 to 45 % of their peak: 4.4 to 6.6 days.
    assert 4 <= days <= 8


def test_unknown_gpus_and_more_gpus_than_rows_are_named_together() -> None:
    with pytest.raises(ConfigError) as found:
        config("--gpu", "h100", "--gpus", "5000")
    assert "h100-80gb" in str(found.value)
    assert "batch.rows_per_step" in str(found.value)


def test_fewer_lanes_than_gpus_are_refused_as_the_run_refuses_them() -> None:
    with pytest.raises(ConfigError) as found:
        config("--order.lanes", "128", "--cluster.num_workers", "128", "--gpus", "256")
    (problem,) = found.value.problems
    assert "gpus=256 cannot share order.lanes=128" in problem
    assert "order.lanes=256" in problem


@pytest.mark.parametrize("gpus", [8, 48, 64, 96, 256, 1_000])
def test_a_run_takes_the_lanes_that_a_plan_names_and_has_its_rows_per_worker(gpus: int, capsys) -> None:
    own = ["--order.lanes", "0", "--cluster.num_workers", "1"]
    main([*LLAMA_7B, *own, "--gpus", str(gpus)])
    text = capsys.readouterr().out
    named = re.search(r"order\.lanes=(\d+)", text)
    assert bool(named) == (gpus > 64), "the run chooses as many as it needs up to there"
    lanes = named[1] if named else "0"
    run = [*LLAMA_7B, "--cluster.num_workers", str(gpus), "--order.lanes", lanes]
    run += ["--corpus.uri", "raw", "--corpus.prepared", "prepared"]
    assert load_config(PretrainConfig, run, description="").config.order.lanes == int(lanes)
    best = next(option for option in options(config(*own, "--gpus", str(gpus))) if option.fits)
    rows = rows_per_worker(job_of(config(*own, "--gpus", str(gpus)), best.plan.job.engine))
    assert best.micro_batches * best.strategy.micro_batch_rows == rows
    assert rows * gpus >= 1_024


def test_room_is_less_than_the_memory() -> None:
    assert all(0 < room(gpu) < gpu.memory_bytes for gpu in GPUS.values())
    assert Strategy(zero_stage=0, micro_batch_rows=1).offload == "none"


def test_at_least_more_workers_than_at_most_is_one_error_that_names_both_keys() -> None:
    with pytest.raises(ConfigError) as found:
        load_config(
            PretrainConfig, ["--cluster.min_workers", "9", "--cluster.num_workers", "4"], description=""
        )
    (problem,) = [line for line in found.value.problems if "min_workers" in line]
    assert "cluster.min_workers=9" in problem
    assert "cluster.num_workers=4" in problem


def report_of(run: PretrainConfig, seconds: float) -> RunFiles:
    """A run that trained so long on the machine that this process takes its own to be."""
    environment = run_folder.environment(run)
    start = {"step": 0, "event": "start", "attempt": 1, "time": 0.0, "world_size": run.cluster.num_workers}
    end = {"step": run.run.steps, "event": "end", "attempt": 1, "time": seconds}
    missing = dict.fromkeys(("manifest", "plan", "best", "test", "samples", "floor"))
    return RunFiles(config=to_dict(run), environment=environment, attempts=[start, end], **missing)


@pytest.mark.parametrize("gpu", ["h100-80gb", "a100-80gb"])
@pytest.mark.parametrize("preset", ON_GPUS, ids=lambda path: path.stem)
def test_a_dry_run_the_planner_of_clusters_and_a_report_say_the_same_days_and_energy(
    preset: Path, gpu: str, monkeypatch, capsys
) -> None:
    there = Hardware("node", 96, 2**40, "cuda", GPUS[gpu].device, 8, GPUS[gpu].memory_bytes)
    monkeypatch.setattr(planning, "this_host", lambda: there)
    monkeypatch.setattr(run_folder, "this_host", lambda: there)
    given = ["--config", str(preset), "--corpus.prepared", "prepared", "--corpus.uri", "raw"]
    run = load_config(PretrainConfig, given, description="").config
    plan = plan_of(run, None)
    own = ["--gpus", str(run.cluster.num_workers), "--gpu", gpu]
    planned = option_of(load_config(ClusterPlanConfig, [*given, *own], description="").config, run.engine)
    assert (planned.plan.seconds, planned.plan.energy) == (plan.seconds, plan.energy)
    assert planned.plan.memory == plan.memory
    computing = plan.seconds + plan.beside.computing
    assert energy_of(report_of(run, computing)).kwh == pytest.approx(plan.energy.kwh)
    watts = run.cluster.num_workers * (GPUS[gpu].accelerator.watts + 12 * run.cluster.threads)
    assert plan.energy.kwh == pytest.approx(watts * 1.58 * computing / 3.6e6)
    main([*given, *own])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("configured"))
    assert duration(plan.seconds) in line and energy(plan.energy.kwh) in line


@pytest.mark.parametrize(
    ("cpus", "threads", "computing"), [(0.75, 0, 1), (0.75, 1, 1), (2.0, 0, 2), (4.0, 1, 1)]
)
def test_a_worker_on_cpus_draws_a_core_for_each_thread_that_it_computes_on(
    cpus: float, threads: int, computing: int
) -> None:
    given = ["--corpus.prepared", "prepared", "--corpus.uri", "raw", "--cluster.num_workers", "2"]
    given += ["--cluster.cpus_per_worker", str(cpus), "--cluster.threads_per_worker", str(threads)]
    run = load_config(PretrainConfig, given, description="").config
    watts = 2 * computing * EnergyConfig().watts_per_core
    plan = plan_of(run, None)
    assert plan.energy.kwh == pytest.approx(watts * 1.58 * (plan.seconds + plan.beside.computing) / 3.6e6)
    assert energy_of(report_of(run, 100.0)).kwh == pytest.approx(watts * 1.58 * 100 / 3.6e6)


def test_a_device_leads_to_its_own_row_of_the_fleet() -> None:
    assert all(find_gpu(gpu.device) == gpu for gpu in GPUS.values())
    assert find_gpu("NVIDIA H100 PCIe") is None, "another board, with another memory and other links"
    assert ASSUMED_GPU.device == "NVIDIA A100-SXM4-80GB"


def test_a_plan_in_float32_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.precision=fp32"):
        config("--engine.precision", "fp32")
