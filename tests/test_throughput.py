import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.hardware.fleet import GPUS
from trainers.model.shape import count_parameters
from trainers.planning.published_speeds import MODELS, ROWS, errors
from trainers.planning.throughput import (
    HOST_BANDWIDTH,
    LINK_SHARE,
    Strategy,
    micro_batch_seconds,
    ring_bandwidth,
    step_time,
    update_seconds,
)

H100 = GPUS["h100-80gb"]
MODEL = MODELS["MPT 7B"]
STAGE_1 = Strategy(zero_stage=1, micro_batch_rows=2)


def test_the_model_stays_within_its_stated_error_of_what_others_measured(capsys) -> None:
    for row, error in errors():
        print(f"{row.source:12} {row.model:12} {row.num_gpus:4} x {row.gpu} {row.seq_len:6,} {error:+6.1%}")
    sizes = [abs(error) for _, error in errors()]
    assert len(sizes) == len(ROWS) >= 25
    assert statistics.median(sizes) < 0.08
    assert max(sizes) < 0.30
    # The torchtitan rows are of another framework and another card's limits; on the others it is closer.
    assert max(abs(error) for row, error in errors() if row.source == "llm-foundry") < 0.25


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("MPT 7B", 6_658_859_008), ("MPT 70B", 64_862_437_376), ("MPT 1B", 1_315_950_592)],
)
def test_the_published_models_have_the_published_number_of_parameters(name, parameters) -> None:
    assert count_parameters(MODELS[name]).total == pytest.approx(parameters, rel=0.005)


def test_zero_moves_what_its_paper_says() -> None:
    """Rajbhandari et al. 2020, section 7: 2 P for stages 0 to 2, 3 P for stage 3, of elements in bf16."""
    slow = replace(H100, link=1e6)  # so that nothing hides
    data = 2 * count_parameters(MODEL).total * 7 / 8 / (LINK_SHARE * 1e6)
    computing = micro_batch_seconds(MODEL, 2048, STAGE_1, slow)
    for stage, moved in ((0, 2), (1, 3), (2, 2)):  # stage 1 reduces to all, as DeepSpeed does, and gathers
        found = step_time(MODEL, 2048, 1, replace(STAGE_1, zero_stage=stage), slow, 8)
        assert found.communicating == pytest.approx(moved * data)
    found = step_time(MODEL, 2048, 1, replace(STAGE_1, zero_stage=3), slow, 8)
    assert found.communicating == pytest.approx(3 * data - 0.9 * computing)


def test_one_gpu_communicates_nothing_and_recomputing_costs_a_third_more() -> None:
    assert step_time(MODEL, 2048, 4, STAGE_1, H100, 1).communicating == 0
    again = micro_batch_seconds(MODEL, 2048, replace(STAGE_1, activation_checkpointing=True), H100)
    assert again / micro_batch_seconds(MODEL, 2048, STAGE_1, H100) == pytest.approx(4 / 3, rel=0.01)


def test_offloading_is_slower_than_updating_on_the_gpu() -> None:
    assert update_seconds(1e9, replace(STAGE_1, offload="optimizer"), H100) > 10 * update_seconds(
        1e9, STAGE_1, H100
    )


def test_parameters_in_host_memory_come_twice_a_micro_batch() -> None:
    slow = replace(H100, link=1e6)  # so that nothing hides
    stage_3 = replace(STAGE_1, zero_stage=3, offload="optimizer")
    fetched = replace(stage_3, offload="optimizer+parameters")
    more = [step_time(MODEL, 128, 4, way, slow, 8).communicating for way in (stage_3, fetched)]
    share = 2 * count_parameters(MODEL).total / 8
    assert more[1] - more[0] == pytest.approx(4 * 2 * share / HOST_BANDWIDTH)


@given(st.integers(1, 4096), st.sampled_from(sorted(GPUS)))
def test_a_ring_is_never_faster_than_a_gpus_link(num_gpus, name) -> None:
    assert 0 < ring_bandwidth(GPUS[name], num_gpus) <= GPUS[name].link
