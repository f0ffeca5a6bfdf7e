"""Numbers of a command line that cannot be are one line, before anything is read."""

import re
from dataclasses import replace

import pytest
from task_files import BACKBONES, SHAPE, put_backbone, small_tokenizer
from token_corpus import put_text_corpus

from cluster.storage.uris import open_store
from trainers import compare, evaluate, harness

TASK = ["--model", "m", "--task", "t.yaml"]
CORPUS = ["--model", "m", "--corpus", "c"]
WRONG = [
    (TASK, "--shots -1", "--shots -1 must be 0 or more"),
    (TASK, "--shots 0 -2 4", "--shots -2 must be 0 or more"),
    (TASK, "--max-rows -1", "--max-rows -1 must be 0 or more"),
    (TASK, "--rows-per-batch 0", "--rows-per-batch 0 must be 1 or more"),
    (CORPUS, "--max-rows -5", "--max-rows -5 must be 0 or more"),
    (CORPUS, "--rows-per-batch -8", "--rows-per-batch -8 must be 1 or more"),
    (CORPUS, "--seq-len 0", "--seq-len 0 must be 1 or more"),
    (CORPUS, "--seq-len -3", "--seq-len -3 must be 1 or more"),
    (TASK, "--shots -1 --max-rows -2", "--shots -1 must be 0 or more; --max-rows -2 must be 0 or more"),
    (TASK, "--shots many", "argument --shots: invalid int value: 'many'"),
]


@pytest.mark.parametrize(("what", "given", "line"), WRONG, ids=[given for _, given, _ in WRONG])
def test_a_number_that_cannot_be_ends_the_command_with_its_line_and_status_2(capsys, what, given, line):
    with pytest.raises(SystemExit) as ended:
        evaluate.main([*what, *given.split()])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith(f"error: {line}") and not said.out


@pytest.mark.parametrize(
    "main", [evaluate.main, compare.main, harness.main], ids=lambda main: main.__module__
)
def test_the_commands_that_score_check_the_same_numbers(capsys, main):
    what = ["--model", "a=m", "--corpus", "c"] if main is compare.main else TASK
    with pytest.raises(SystemExit) as ended:
        main([*what, "--rows-per-batch", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--rows-per-batch 0 must be 1 or more")


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_rows_may_be_longer_than_the_models_own_where_its_positions_go_on(tmp_path, capsys, positions):
    shape = BACKBONES["bert"] if positions == "learned" else SHAPE
    shape = replace(shape, vocab_size=small_tokenizer().vocab_size)
    put_backbone(tmp_path / "model", shape)
    texts = {split: ["A film of some kind. " * 60] * 2 for split in ("train", "validation")}
    put_text_corpus(open_store(str(tmp_path / "corpus")), texts, small_tokenizer(), fragment_tokens=2_000)
    arguments = ["--model", str(tmp_path / "model"), "--corpus", str(tmp_path / "corpus"), "--seq-len"]
    evaluate.main([*arguments, "128"])
    if positions == "rotary":
        return evaluate.main([*arguments, "129"])
    with pytest.raises(ValueError, match=re.escape("--seq-len 129 is more than the 128 positions")):
        evaluate.main([*arguments, "129"])
