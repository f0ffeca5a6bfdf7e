"""The simulation of scale prints what issue 7 asks for, on a small corpus."""

import re

from benchmarks.bench_scale import main


def test_the_table_names_balance_reads_requests_memory_and_time_and_workers_are_balanced(capsys) -> None:
    main(["--petabytes", "0.01", "--workers", "64"])
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", capsys.readouterr().out, re.MULTILINE))
    assert rows["what"] == "result"
    wanted = {"manifest in memory", "order planned", "fragments in a read", "requests", "reads of one object"}
    assert wanted <= rows.keys()
    assert float(rows["balance of the workers' rows"]) == 1.0
