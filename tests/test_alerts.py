"""The alerts, evaluated by Prometheus' own tool on recorded series, and the dashboard's names of metrics."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.check import K8S
from trainers.reporting.live_metrics import COUNTERS, DRIVER_GAUGES, GAUGES, ZERO

MONITORING = K8S / "components" / "monitoring"
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
# `make promtool` puts it beside this Python.
PROMTOOL = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
RUN = '{run="a", pid="1"}'
FAILED = 'kuberay_job_deployment_status{name="pretrain", namespace="pretraining", deployment_status="Failed"}'
WAITED = 'ray_pretrain_spent_seconds{run="a", pid="2", part="waiting_for_nodes"}'
HEALTHY = {
    # `start+stepxcount`: one sample a minute, for ten hours
    f"ray_pretrain_last_step_timestamp_seconds{RUN}": "0+60x600",
    f"ray_pretrain_last_checkpoint_timestamp_seconds{RUN}": "0+60x600",
    f"ray_pretrain_nonfinite_losses_total{RUN}": f"{ZERO}+0x600",
    f"ray_pretrain_tokens_per_second{RUN}": "1000+0x600",
    f"ray_pretrain_attempt{RUN}": "1+0x600",
    f"ray_pretrain_skipped_steps_total{RUN}": f"{ZERO}+0x600",
    f"ray_pretrain_data_wait_seconds_total{RUN}": "0+1x600",
    WAITED: "0+0x600",
    'ray_node_mem_total{ray_io_cluster="c", ip="1"}': "1+0x600",
    'ray_node_mem_total{ray_io_cluster="c", ip="2"}': "1+0x600",
    'ray_node_disk_utilization_percentage{ray_io_cluster="c", ip="1"}': "50+0x600",
}
SICK = {  # what differs -> the alert that fires at minute 540
    "PretrainingStandsStill": {f"ray_pretrain_last_step_timestamp_seconds{RUN}": "0+60x500 30000+0x100"},
    # One, in a worker that was started anew and has counted nothing before.
    "PretrainingLossNotFinite": {
        f"ray_pretrain_nonfinite_losses_total{RUN}": "0+0x500 stale",
        f"ray_pretrain_nonfinite_losses_total{RUN.replace('1', '3')}": f"_x510 {ZERO}+0x25 1+0x60",
    },
    "PretrainingSkipsSteps": {f"ray_pretrain_skipped_steps_total{RUN}": "0+0x500 0+1x100"},
    "PretrainingCheckpointIsOld": {f"ray_pretrain_last_checkpoint_timestamp_seconds{RUN}": "0+0x600"},
    "PretrainingWaitsForData": {f"ray_pretrain_data_wait_seconds_total{RUN}": "0+30x600"},
    "PretrainingWaitsForNodes": {WAITED: "0+0x500 0+30x100"},
    "PretrainingSlowedDown": {f"ray_pretrain_tokens_per_second{RUN}": "1000+0x500 500+0x100"},
    "PretrainingRestartsOften": {f"ray_pretrain_attempt{RUN}": "1+0x500 1x9 2x9 3x9 4x60"},
    "RayJobFailed": {FAILED: "_x500 1+0x100", FAILED.replace("Failed", "Running"): "1+0x499 stale"},
    "RayNodeLost": {'ray_node_mem_total{ray_io_cluster="c", ip="2"}': "1+0x520 stale"},
    "RayNodeDiskNearlyFull": {
        'ray_node_disk_utilization_percentage{ray_io_cluster="c", ip="1"}': "50+0x500 90+0x100"
    },
}
STEP, FINISHED = (f"ray_pretrain_{name}_timestamp_seconds{RUN}" for name in ("last_step", "finished"))
WITHOUT_WORKER_0 = {  # its pod is gone, and its series with it: name -> what differs, and the alert, if any
    "lost": ({STEP: "0+60x500 stale"}, "PretrainingStandsStill"),
    "lost-hours-ago": ({STEP: "0+60x60 stale"}, "PretrainingStandsStill"),
    "lost-and-replaced": ({STEP: "0+60x500 stale", STEP.replace("1", "2"): "_x510 30600+60x80"}, None),
    "finished": ({STEP: "0+60x500 stale", FINISHED: "_x500 30010 30010 stale"}, None),
    "finished-then-continued-then-lost": (
        {
            STEP: "0+60x480 stale",
            FINISHED: "_x480 28810 28810 stale",
            STEP.replace("1", "2"): "_x490 29400+60x20 stale",
        },
        "PretrainingStandsStill",
    ),
}
AT = "540m"


def test_every_alert_has_a_series_that_fires_it_and_says_what_to_do() -> None:
    alerts = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert {rule["alert"] for rule in alerts} == SICK.keys()
    for rule in alerts:
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


def test_alerts_and_dashboard_name_only_metrics_that_are_exported() -> None:
    known = {f"ray_pretrain_{name}" for name in GAUGES | DRIVER_GAUGES} | {
        f"ray_pretrain_{name}_total" for name in COUNTERS
    }
    text = (MONITORING / "rules.yaml").read_text() + (MONITORING / "pretraining.json").read_text()
    used = set(re.findall(r"ray_pretrain_\w+", text))
    assert used <= known
    dashboard = json.loads((MONITORING / "pretraining.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 12


def firing(series: dict[str, str], folder: Path) -> dict[str, Any]:
    """promtool's verdict on each alert: whether exactly the alerts that are expected fire."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    return {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": AT,
                        "exp_samples": [],
                    }
                ],
            }
        ],
    }


def verdict(series: dict[str, str], alert: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    """promtool's, on whether exactly this alert fires."""
    test = firing(series, folder)
    if alert:
        sample = {"labels": f'{{alertname="{alert}"}}', "value": 1}
        test["tests"][0]["promql_expr_test"][0]["exp_samples"] = [sample]
    (folder / "test.yaml").write_text(yaml.safe_dump(test))
    command = [str(PROMTOOL), "test", "rules", "test.yaml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="needs promtool: make promtool")


@needs_promtool
@pytest.mark.parametrize("alert", ["none", *SICK])
def test_an_alert_fires_on_its_series_and_no_other_does(alert: str, tmp_path: Path) -> None:
    result = verdict(HEALTHY | SICK.get(alert, {}), alert if alert in SICK else None, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
@pytest.mark.parametrize("what", WITHOUT_WORKER_0)
def test_a_run_whose_worker_0_is_gone_is_missed_unless_it_ended(what: str, tmp_path: Path) -> None:
    changes, alert = WITHOUT_WORKER_0[what]
    gone = {name: values for name, values in HEALTHY.items() if RUN not in name}
    result = verdict(gone | changes, alert, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
