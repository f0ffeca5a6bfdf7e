"""Laws of what may change in a run that has begun: nothing that has a say in a number of it, whatever the key."""

import functools
import operator
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.configuration.config import from_dict, load_config, to_dict, to_yaml
from cluster.configuration.keys import keys_of
from cluster.console.errors import ConfigError
from cluster.storage.uris import StorageError, Store, open_store
from tests.test_finished import arguments  # noqa: F401  (a fixture)
from trainers import pretrain
from trainers.evaluation.verdict import CLAIM, EXPORT, VERDICT
from trainers.finetuning.config import FinetuneConfig
from trainers.pretraining.config import PretrainConfig, absolute, run_store
from trainers.pretraining.run_folder import CONFIG, MANIFEST, check_unchanged, write_start
from trainers.recovery.lease import lease
from trainers.stored.changes import changed_keys

OPTIMIZER = (
    "kind learning_rate muon_learning_rate muon_iterations embedding_learning_rate head_learning_rate "
    "norm_learning_rate weight_decay betas eps momentum smoothing"
)
GUARD = "window_steps warmup_steps max_norm_ratio max_loss_rise max_skipped_in_a_row max_skipped"
PINNED_IN_BOTH = {
    "engine": "precision gradient_clip deepspeed",
    "optimizer": OPTIMIZER,
    "schedule": "kind warmup_steps decay_fraction final_fraction",
    "guard": GUARD,
}
"""They have a say in weights, losses, what is judged or which checkpoint is chosen."""
FREE_IN_BOTH = {
    "cluster": "address num_workers min_workers cpus_per_worker gpus_per_worker join_seconds threads_per_worker "
    "object_store_bytes",
    "engine": "zero_stage offload micro_batch_rows activation_checkpointing compile",
    "checkpoint": "every_steps keep_last keep_every_steps file_bytes upload_threads commit_timeout_seconds",
    "heartbeat": "timeout_seconds phase_timeout_seconds linger_seconds",
}
"""Where and how a run runs, how often it saves: the steps are the same, to within float rounding."""
PINNED = {
    PretrainConfig: PINNED_IN_BOTH
    | {
        "run": "init_from seed",
        "corpus": "uri sources include text_column id_column normalization max_record_bytes set_aside_limit "
        "fragment_tokens",
        "corpus.splits": "validation test validation_shards test_shards validation_documents test_documents seed",
        "corpus.tokenizer": "path kind vocab_size lowercase boundary sample_bytes",
        "order": "seed lanes window_steps weights schedule",
        "batch": "seq_len rows_per_step",
        "objective": "kind mask_rate random_share keep_share words masked_share short_share seed",
        "model": "vocab_size hidden_size num_layers num_heads num_kv_heads intermediate_size max_positions attention "
        "positions rope_theta num_token_types norm norm_place norm_eps activation biases head pair_head "
        "tie_embeddings document_mask init_std",
        "validation": "every_steps max_rows min_improvement",
    },
    FinetuneConfig: PINNED_IN_BOTH
    | {
        "backbone": "uri from_scratch",
        "adapt": "train lora_rank lora_alpha lora_targets layer_decay dropout pooling",
        "batch": "rows_per_step epochs min_steps max_steps label_budget draw max_tokens truncate class_weights",
        "validation": "times max_rows max_new_tokens",
    },
}
FREE = {
    PretrainConfig: FREE_IN_BOTH
    | {
        "run": "name storage max_failures log_every_seconds log_events",
        "corpus": "prepared max_expansion cpus_per_piece",  # that has a digest; these refuse, or do nothing
    },
    # A task and its splits have digests, and each seed has a run of its own.
    FinetuneConfig: FREE_IN_BOTH | {"run": "name storage task prepared seeds max_failures"},
}
UNTIL_JUDGED = {
    PretrainConfig: {"run": "steps", "validation": "patience"},
    FinetuneConfig: {"validation": "patience"},
}
"""They say when a run ends."""
UNTIL_FINISHED = {
    # Read when the report is made, after training.
    PretrainConfig: {
        "run": "prompts floor_bytes",
        "energy": "watts_per_core watts_per_device overhead grams_per_kwh",
    },
    FinetuneConfig: {},
}
STATES = {"begun": (False, False), "judged": (True, False), "finished": (True, True)}
CONFIGS = [PretrainConfig, FinetuneConfig]


def listed(table: dict[str, str]) -> list[str]:
    return [f"{section}.{key}" for section, keys in table.items() for key in keys.split()]


def decided(config: type, state: str) -> dict[str, bool]:
    """Whether each key may change in that state of a run."""
    may = {key: True for key in listed(FREE[config])} | {key: False for key in listed(PINNED[config])}
    may |= {key: state == "begun" for key in listed(UNTIL_JUDGED[config])}
    return may | {key: state != "finished" for key in listed(UNTIL_FINISHED[config])}


def another(value: Any) -> Any:
    """Another value of the same form."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, dict):
        return {**value, "another": 7}
    if isinstance(value, list | tuple):
        return [*value, *(value[:1] or ["another"])]
    return f"{value} another" if isinstance(value, str) else value + 1


def with_value(config: Any, key: str, value: Any) -> Any:
    section, _, rest = key.partition(".")
    inner = with_value(getattr(config, section), rest, value) if rest else value
    return replace(config, **{section: inner})


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("config", CONFIGS)
def test_of_every_key_it_is_decided_whether_it_may_change_and_it_is_so(config: type, state: str) -> None:
    may, begun = decided(config, state), config()
    assert sorted(may) == sorted(keys_of(config)), "decide of each key whether it may change in a begun run"
    stored = yaml.safe_load(to_yaml(begun))
    judged, finished = STATES[state]
    for key in may:
        value = another(operator.attrgetter(key)(begun))
        lines = changed_keys(stored, with_value(begun, key, value), judged, finished)
        assert len(lines) == (0 if may[key] else 1), key
        assert all(line.startswith(f"{key}={value!r}, but the run was started with ") for line in lines)
    assert changed_keys(stored, begun, judged, finished) == []


def load(*given: str) -> PretrainConfig:
    places = [
        "--corpus.prepared",
        "prepared",
        *([] if "--corpus.sources" in given else ["--corpus.uri", "raw"]),
    ]
    return absolute(load_config(PretrainConfig, [*places, *given], description="").config)


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("engine.deepspeed", "{}", "{zero_optimization: {overlap_comm: false}}"),
        ("engine.deepspeed", "{zero_optimization: {overlap_comm: false}}", "{wall_clock_breakdown: true}"),
        ("corpus.sources", "{a: /a, b: /b}", "{a: /a, c: /c}"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_mapping_that_is_another_is_one_line_with_both_wholes(
    key: str, before: str, now: str, turned: bool
) -> None:
    one, other = (load(f"--{key}", value) for value in ((now, before) if turned else (before, now)))
    was, is_now = (functools.reduce(dict.__getitem__, key.split("."), to_dict(each)) for each in (one, other))
    [line] = changed_keys(to_dict(one), other)
    assert line.startswith(f"{key}={is_now!r}, but the run was started with {was!r};")


def test_of_mappings_with_the_same_entries_the_one_that_differs_is_named() -> None:
    one, other = (load("--corpus.sources", f"{{a: /a, b: {uri}}}") for uri in ("/b", "/c"))
    [line] = changed_keys(to_dict(one), other)
    assert line.startswith("corpus.sources.b='file:///c', but the run was started with 'file:///b'")


@pytest.mark.parametrize("spelled", ["raw", "./raw", "{}/raw", "file://{}/raw", "{}/raw/"])
def test_a_corpus_is_the_same_however_its_place_is_spelled(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert changed_keys(to_dict(load()), load("--corpus.uri", spelled.format(tmp_path))) == []


@pytest.fixture
def begun(arguments: list[str]) -> tuple[list[str], Store]:  # noqa: F811
    """The command of a run that has begun, and its folder."""
    store = open_store("runs/pretrain")
    for path in (CLAIM, VERDICT, f"{EXPORT}/config.json"):
        store.delete(path)
    return arguments, store


def test_a_begun_run_needs_no_raw_corpus_but_to_be_told_which_it_was(begun: tuple[list[str], Store]) -> None:
    given, _ = begun
    shutil.copytree("raw", "raw2")
    shutil.rmtree("raw")
    config = absolute(load_config(PretrainConfig, given, description="").config)
    assert list(pretrain.problems_before_start(config)) == []
    pretrain.main([*given, "--dry-run"])
    assert pretrain.pinned_or_prepared(config, pretrain.Console(quiet=True)).digest
    with pytest.raises(
        ConfigError, match=r"corpus\.uri='file.*raw2', but the run was started with 'file.*raw'"
    ):
        pretrain.main([*given, "--corpus.uri", "raw2"])


def test_what_is_stored_says_what_was_pinned_and_the_present_value_of_what_may_change(
    begun: tuple[list[str], Store],
) -> None:
    given, run = begun
    first = yaml.safe_load(run.read(CONFIG))
    others = ["--engine.zero_stage", "2", "--run.steps", "30", "--cluster.num_workers", "2"]
    config = absolute(load_config(PretrainConfig, [*given, *others], description="").config)
    check_unchanged(run, config)
    write_start(run, config, pretrain.pinned_or_prepared(config, pretrain.Console(quiet=True)), "plan")
    first["engine"]["zero_stage"], first["run"]["steps"], first["cluster"]["num_workers"] = 2, 30, 2
    assert yaml.safe_load(run.read(CONFIG)) == first


def test_a_start_that_is_cut_off_leaves_no_manifest_that_any_corpus_could_claim(
    arguments: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = absolute(load_config(PretrainConfig, arguments, description="").config)
    manifest = pretrain.pinned_or_prepared(old, pretrain.Console(quiet=True))
    config = replace(old, run=replace(old.run, name="cut-off"))
    run = run_store(config)
    for path in (CONFIG, MANIFEST):
        with monkeypatch.context() as patch, pytest.raises(StorageError):
            patch.setattr(type(run), "put" if path == CONFIG else "put_if_absent", gone)
            write_start(run, config, manifest, "plan")
        assert run.exists(CONFIG) >= run.exists(MANIFEST)
    with pytest.raises(ConfigError, match="corpus.uri"):
        check_unchanged(run, replace(config, corpus=replace(config.corpus, uri="file:///other")))


def gone(*_: object) -> None:
    raise StorageError("the store is gone")


def test_a_run_that_another_driver_begins_while_one_waits_for_it_is_not_gone_on_with_under_other_keys(
    begun: tuple[list[str], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, run = begun
    stored = run.read(CONFIG)
    run.delete(CONFIG)

    @contextmanager
    def after_another(*of: Any) -> Iterator[None]:
        run.put(CONFIG, stored)
        with lease(*of):
            yield

    monkeypatch.setattr(pretrain, "lease", after_another)
    with pytest.raises(ConfigError, match="order.seed=7, but the run was started with 0"):
        pretrain.main([*given, "--order.seed", "7"])
    assert run.read(CONFIG) == stored


def test_a_fine_tuning_whose_stored_configuration_lacks_a_section_had_its_defaults_there() -> None:
    given = {"run": {"task": "t.yaml"}, "backbone": {"uri": "model"}}
    config = from_dict(FinetuneConfig, given)
    stored = to_dict(config)
    del stored["guard"]
    assert changed_keys(stored, config) == []
    [line] = changed_keys(stored, from_dict(FinetuneConfig, given | {"guard": {"max_skipped": 7}}))
    assert line.startswith("guard.max_skipped=7, but the run was started with 100")
