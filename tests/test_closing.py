"""What is made of a finished run: it ends in a report, whatever the configuration's prompts are."""

import json

from cluster.configuration.config import load_config
from tests.test_generate import BOUNDARY, CONFIG, MODEL, byte_tokenizer
from trainers.evaluation.verdict import EXPORT
from trainers.exported.folder import export
from trainers.pretraining.closing import TOO_LONG, write_samples
from trainers.pretraining.config import PretrainConfig, run_store


def test_a_prompt_that_fills_the_models_positions_does_not_keep_a_run_from_its_end(tmp_path):
    prompts = ["Enter ", "x" * (CONFIG.max_positions - 2), "x" * (CONFIG.max_positions - 1)]
    arguments = ["--corpus.uri", "raw", "--corpus.prepared", "prepared", "--run.storage", str(tmp_path)]
    arguments += ["--run.name", "long", "--run.prompts", json.dumps(prompts)]
    run = run_store(config := load_config(PretrainConfig, arguments, description="").config)
    tokenizer = byte_tokenizer().to_str().encode()
    export(iter(MODEL.state_dict().items()), CONFIG, tokenizer, BOUNDARY, run.child(EXPORT))
    samples = write_samples(run, config)
    assert [sample["prompt"] for sample in samples] == prompts
    assert [sample["continuation"] == TOO_LONG for sample in samples] == [False, False, True]
    assert samples[1]["settings"]["max_new_tokens"] == 1
    assert len(json.loads(run.read("samples.json"))) == len(prompts)
