"""What lm-eval is asked is what evaluate asks, and with a real lm-eval both find the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from task_files import put_backbone, put_lines, put_task, sentences
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from trainers import evaluate, harness
from trainers.exported.folder import Exported, load_exported
from trainers.harness import Asked, Scores, ask_of, differences, put_lm_eval_task
from trainers.tasks import few_shot
from trainers.tasks.few_shot import FewShotConfig, encoded
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task

PROMPT = {"template": "{text}\nThis is", "answers": {"good": "very fine", "bad": "bad"}, "separator": "\n\n"}
# Spaces at a prompt's end count to the answer, on both sides.
PROMPT_ENDING_IN_SPACES = PROMPT | {"template": "{text}\n\n", "before_answer": "It's "}
LM_EVAL = Path(f"{sys.prefix}-lm-eval/bin/python")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm-eval")
    uri = put_lines(folder / "records.jsonl", sentences(200))
    for name, prompt in {"plain": PROMPT, "spaces": PROMPT_ENDING_IN_SPACES}.items():
        put_task(folder / f"{name}.yaml", name=name, kind="classification", data={"uri": uri}, prompt=prompt)
    put_backbone(folder / "model")
    return folder


def arguments(place, task="plain"):
    return ["--model", str(place / "model"), "--task", str(place / f"{task}.yaml"), "--shots", "0", "2",
            "--prepared", str(place / "prepared")]  # fmt: skip


@pytest.mark.slow
def test_the_questions_for_lm_eval_are_those_that_evaluate_scores(place, monkeypatch, capsys):
    scored = []

    def remember(exported, prompts, answers, rows_per_batch):
        scored.append([{"prompt": prompt, "choices": answers} for prompt in prompts])
        sums = np.zeros((len(prompts), len(answers)))
        return sums, sums + 1

    monkeypatch.setattr(few_shot, "log_likelihoods", remember)
    evaluate.main(arguments(place))
    accuracies = [one["sum"]["metrics"]["accuracy"] for one in json.loads(capsys.readouterr().out)]
    exported = load_exported(open_store(str(place / "model")))
    prepared = prepare_task(load_task(str(place / "plain.yaml")), open_store(str(place / "prepared")))
    for shots, questions, accuracy in zip((0, 2), scored, accuracies, strict=True):
        asked = ask_of(exported, prepared, FewShotConfig(shots=shots, max_rows=0))
        put_lm_eval_task(place / "tasks", asked)
        described = yaml.safe_load((place / f"tasks/plain-{shots}-shots.yaml").read_text())
        (lines,) = described["dataset_kwargs"]["data_files"].values()
        rows = [json.loads(line) for line in Path(lines).read_text().splitlines()]
        golds = [row.pop("gold") for row in rows]
        assert rows == questions and len(rows) == prepared.counts["validation"]
        assert np.mean(np.array(golds) == 0) == pytest.approx(
            accuracy
        )  # of equal scores the first label is taken


def test_an_answer_has_the_tokens_that_it_has_after_its_prompt():
    # As Llama 2's: each text gets a space in front, which an answer that is encoded by itself would have twice.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(["this is bad", "this is good"] * 9, BpeTrainer(special_tokens=["<s>"]))
    exported = Exported(model=None, tokenizer=tokenizer, boundary_id=0)
    for prompt in ("this is", "this is "):
        rows, starts = encoded(exported, [prompt], [" bad".removeprefix(" " * prompt.endswith(" "))])
        whole = [0, *tokenizer.encode("this is bad").ids]
        assert rows == [[whole]] and starts == [1 + len(tokenizer.encode("this is").ids)]
    with pytest.raises(ConfigError, match="a token spans the end of the prompt 'this is b'"):
        encoded(exported, ["this is b"], ["ad"])


def test_numbers_that_differ_are_named():
    asked = Asked("t-0-shots", 0, ["a", "b"], [" x", " y"], [0, 1])
    scores = Scores(np.zeros((2, 2)), 0.5, 0.5)
    assert differences(asked, scores, scores) == []
    assert differences(asked, scores, Scores(scores.sums + 1e-5, 1.0, 0.5)) == [
        "t-0-shots: acc is 0.5000 here and 1.0000 by lm-eval"
    ]
    # Of a model that knows nothing the accuracy is the same, with the boundary before the prompt or without it.
    (line,) = differences(asked, scores, Scores(scores.sums - 0.1, 0.5, 0.5))
    assert "0.1 nats apart" in line


@pytest.mark.skipif(LM_EVAL.exists(), reason="lm-eval is installed")
def test_without_lm_eval_the_command_says_how_to_get_it(place):
    with pytest.raises(SystemExit, match="make lm-eval"):
        harness.main(arguments(place))


@pytest.mark.slow
@pytest.mark.skipif(not LM_EVAL.exists(), reason="lm-eval is not installed: make lm-eval")
@pytest.mark.parametrize("task", ["plain", "spaces"])
def test_lm_eval_finds_the_same_accuracy(place, task, tmp_path):
    command = [str(LM_EVAL), harness.__file__, *arguments(place, task), "--output", str(tmp_path)]
    # DeepSpeed, in other tests, leaves a rank in this process's environment, and lm-eval would look for its peers.
    alone = {name: value for name, value in os.environ.items() if not name.endswith("RANK")}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
