import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.console.printable import printable
from cluster.storage.uris import open_store
from trainers.exported.folder import Exported, export
from trainers.exported.sampling import SamplingConfig, candidates, choose, complete, generate
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig

CONFIG = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    max_positions=64,
    init_std=0.3,
)
BOUNDARY = 256


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


MODEL = build(CONFIG, seed=1).eval()
EXPORTED = Exported(MODEL, byte_tokenizer(), BOUNDARY)
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)
prompts = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(prompts)
def test_a_batch_of_any_lengths_gives_what_each_prompt_gives_alone(batch):
    assert generate(MODEL, batch, GREEDY) == [generate(MODEL, [prompt], GREEDY)[0] for prompt in batch]


@settings(max_examples=15, deadline=None)
@given(prompts)
def test_greedy_tokens_are_those_of_whole_rows_without_a_cache(batch):
    for prompt, new in zip(batch, generate(MODEL, batch, GREEDY), strict=True):
        row = torch.tensor([prompt + new])
        with torch.no_grad():
            likeliest = MODEL.logits(MODEL(row)).argmax(-1)
        assert new == likeliest[0, len(prompt) - 1 : -1].tolist()


def test_a_seed_fixes_the_choices_and_another_changes_them():
    sampled = [
        generate(MODEL, [[1, 2], [3]], SamplingConfig(max_new_tokens=20, temperature=1, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_equal_prompts_of_a_batch_get_different_choices():
    first, second = generate(MODEL, [[1, 2], [1, 2]], SamplingConfig(max_new_tokens=20, temperature=1))
    assert first != second


logit_rows = st.lists(st.floats(-6, 6), min_size=2, max_size=12, unique=True)


@given(logit_rows, st.integers(1, 12))
def test_top_k_keeps_the_k_likeliest(logits, k):
    kept = candidates(torch.tensor([logits], dtype=torch.float64), k, 1.0)[0] > 0
    assert kept.sum() == min(k, len(logits))
    assert kept.tolist() == [x in sorted(logits, reverse=True)[:k] for x in logits]


@given(logit_rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    probabilities = torch.tensor([logits], dtype=torch.float64).softmax(-1)[0]
    kept = candidates(torch.tensor([logits], dtype=torch.float64), 0, p)[0] > 0
    assert probabilities[kept].sum() >= p - 1e-9
    assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-9
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_the_softmax_at_that_temperature(temperature):
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    stream = torch.Generator().manual_seed(0)
    sampling = SamplingConfig(temperature=temperature)
    drawn = [choose(logits, sampling, [stream]).item() for _ in range(4_000)]
    frequencies = torch.tensor(drawn).bincount(minlength=4) / 4_000
    assert (frequencies - (logits[0] / temperature).softmax(-1)).abs().max() < 0.03  # 4 sigma


def test_a_stop_text_ends_the_row_and_is_cut_off():
    whole = complete(EXPORTED, ["abc"], SamplingConfig(max_new_tokens=40, temperature=0))[0]
    assert whole.ended_by == "length" and len(whole.tokens) == 40
    stop = whole.text[5:7]
    stopped = complete(EXPORTED, ["abc"], SamplingConfig(max_new_tokens=40, temperature=0, stop=(stop,)))[0]
    assert stopped.ended_by == "stop" and len(stopped.tokens) < 40
    assert stopped.text == whole.text[: whole.text.index(stop)]


def test_a_stopped_row_leaves_the_others_as_they_are():
    alone = complete(EXPORTED, ["xyz"], SamplingConfig(max_new_tokens=30, temperature=0))[0]
    short = complete(EXPORTED, ["a"], SamplingConfig(max_new_tokens=30, temperature=0))[0]
    stop = short.text[2:4]
    assert stop not in alone.text
    both = complete(EXPORTED, ["a", "xyz"], SamplingConfig(max_new_tokens=30, temperature=0, stop=(stop,)))
    assert both[0].ended_by == "stop" and both[1] == alone


def test_the_model_can_close_the_document():
    model = build(CONFIG, seed=1)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()
        model.embed_tokens.weight.fill_(1)
        model.lm_head.weight.zero_()[BOUNDARY] = 1
    completion = complete(Exported(model, byte_tokenizer(), BOUNDARY), ["abc"], GREEDY)[0]
    assert completion.ended_by == "stop" and completion.tokens == [BOUNDARY] and completion.text == ""


def test_a_prompt_is_the_beginning_of_a_document():
    encoded = [BOUNDARY, *byte_tokenizer().encode("abc").ids]
    assert complete(EXPORTED, ["abc"], GREEDY)[0].tokens == generate(MODEL, [encoded], GREEDY)[0]


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="64 positions; use at most 54"):
        generate(MODEL, [[1] * 10], SamplingConfig(max_new_tokens=55))
    assert len(generate(MODEL, [[1] * 10], SamplingConfig(max_new_tokens=54))[0]) == 54


def run_entry(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainers.generate", *arguments], capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_entry_continues_the_prompts_of_an_export(tmp_path):
    export(
        MODEL.named_parameters(),
        CONFIG,
        byte_tokenizer().to_str().encode(),
        BOUNDARY,
        open_store(str(tmp_path)),
    )
    prompts_given = ("--prompt", "abc", "--prompt", "xy")
    done = run_entry("--model", str(tmp_path), *prompts_given, "--temperature", "0", "--max-new-tokens", "9")
    assert done.returncode == 0, done.stderr
    for prompt in ("abc", "xy"):
        text = complete(EXPORTED, [prompt], SamplingConfig(max_new_tokens=9, temperature=0))[0].text
        assert printable(prompt + text, lines=True) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/nowhere/export", "--prompt", "a"], "/nowhere/export"),
        (["--model", "x", "--prompt", "a", "--top-p", "2", "--temperature", "-1"], "top_p=2.0 must"),
    ],
)
@pytest.mark.slow
def test_the_entry_says_in_a_line_what_is_wrong(arguments, named):
    failed = run_entry(*arguments)
    assert failed.returncode != 0
    assert named in failed.stderr and "Traceback" not in failed.stderr
