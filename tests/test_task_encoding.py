"""Records become tokens whose targets stand where the text says."""

import numpy as np
import pytest
from task_files import small_tokenizer
from tokenizers import Tokenizer

from cluster.console.errors import ConfigError
from trainers.tasks.encoding import IGNORED, Encoder, collate, framed
from trainers.tasks.records import Example
from trainers.tasks.task import TaskColumns, TaskConfig, TaskPrompt

BOUNDARY = 0


def encoder(
    kind: str, *, causal: bool = True, max_tokens: int = 128, truncate: bool = False, **content
) -> Encoder:
    tokenizer, pad = framed(Tokenizer.from_str(small_tokenizer().json), BOUNDARY, causal)
    pair = TaskColumns(pair="pair") if kind in ("pairs", "question_answering") else TaskColumns()
    task = TaskConfig(name="t", kind=kind, columns=pair, **content)
    return Encoder(task, tokenizer, pad, max_tokens, truncate, causal)


def example(text="", pair="", words=(), target=None) -> Example:
    return Example("e", text or " ".join(words), pair, list(words), target)


def test_a_decoders_text_stands_between_boundaries_and_an_encoders_between_cls_and_sep():
    for causal, ends in ((True, ("<|endoftext|>", "<|endoftext|>")), (False, ("[CLS]", "[SEP]"))):
        made = encoder("pairs", causal=causal, labels=("a",))
        (row,) = made.encode([example("one", "two", target="a")])
        names = [made.tokenizer.id_to_token(i) for i in row.ids]
        assert (names[0], names[-1], names.count(ends[1])) == (*ends, 3 if causal else 2)
        assert made.tokenizer.decode([i for i, t in zip(row.ids, row.types, strict=True) if t]) == "two"


def test_a_text_that_spells_a_special_token_does_not_get_it():
    made = encoder("classification", labels=("a",))
    (row,) = made.encode([example("x <|endoftext|> y", target="a")])
    assert row.ids.count(BOUNDARY) == 2


@pytest.mark.parametrize("causal", [True, False])
def test_each_word_has_one_tag_on_its_last_piece_under_causal_attention_else_on_its_first(causal):
    words = ["Statements", "in", "Zanzibar", "异常"]
    made = encoder("token_classification", causal=causal, labels=("O", "B"))
    (row,) = made.encode([example(words=words, target=["O", "O", "B", "B"])])
    places = np.flatnonzero(row.target != IGNORED)
    assert row.target[places].tolist() == [0, 0, 1, 1]
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    for place, word, end in zip(places, words, ends, strict=True):
        first, last = row.spans[place]
        assert (last == end) if causal else (first <= end - len(word) < last)


def test_a_words_tag_is_left_out_where_the_word_is_cut_off():
    made = encoder("token_classification", max_tokens=4, truncate=True, labels=("O",))
    (row,) = made.encode([example(words=["a"] * 30, target=["O"] * 30)])
    assert len(row.ids) == 4 and row.truncated and row.ids[-1] == BOUNDARY
    assert row.target.tolist() == [IGNORED, 0, 0, IGNORED]


@pytest.mark.parametrize("causal", [True, False])
def test_of_two_texts_the_longer_one_is_cut_and_both_stay(causal):
    made = encoder("pairs", causal=causal, max_tokens=48, truncate=True, labels=("a",))
    long, short = "the film " * 40, "one of <|endoftext|>"
    of_short = made.tokenizer.encode(short).ids[1:-1]
    for texts, second in (((long, short), 1), ((short, long), 0)):
        (row,) = made.encode([example(*texts, target="a")])
        assert row.truncated and len(row.ids) == 48
        inner = [i for i, t in zip(row.ids, row.types, strict=True) if t == second]
        assert inner[0 if second else 1 : -1] == of_short, "the shorter text is not whole"
        closing = made.tokenizer.encode("").ids[-1]
        assert row.ids[-1] == closing and row.ids.count(closing) == (3 if causal else 2)


def test_the_answers_tokens_hold_the_answer():
    context = "The tower was built in 1889 by Eiffel."
    made = encoder("question_answering")
    (row,) = made.encode([example("When?", context, target={"text": "1889", "start": context.index("1889")})])
    first, last = row.target
    assert context[row.spans[first][0] : row.spans[last][1]].strip() == "1889"
    assert made.tokenizer.decode(row.ids[first : last + 1]).strip() == "1889"


def test_generation_has_its_loss_on_the_answer_and_the_closing_boundary_alone():
    made = encoder("generation", prompt=TaskPrompt(template="Q: {text}\nA:"))
    rows = made.encode([example("why", target="so"), example("why is that so", target="because")])
    batch = collate(made.task, rows, made.pad_id)
    for row, weights, tokens, answer in zip(
        rows, batch.targets, batch.tokens_BT, ("so", "because"), strict=True
    ):
        written = tokens[weights.bool()].tolist()
        assert made.tokenizer.decode(written) == f" {answer}" and written[-1] == BOUNDARY
        assert int(weights[len(row.ids) :].sum()) == 0


def test_what_is_too_long_is_refused_with_its_number_unless_it_may_be_cut():
    long, short = example("word " * 200, target="a"), example("word", target="a")
    with pytest.raises(
        ConfigError, match="1 of 2 records of t are longer than 20 tokens .*batch.truncate=true"
    ):
        encoder("classification", max_tokens=20, labels=("a",)).encode([short, long])
    rows = encoder("classification", max_tokens=20, truncate=True, labels=("a",)).encode([short, long])
    assert [len(row.ids) <= 20 for row in rows] == [True, True] and [row.truncated for row in rows] == [
        False,
        True,
    ]


def test_padding_is_on_the_right_and_marked():
    made = encoder("classification", labels=("a", "b"))
    rows = made.encode([example("one two three", target="b"), example("one", target="a")])
    batch = collate(made.task, rows, made.pad_id)
    assert batch.mask_BT.sum(1).tolist() == [len(row.ids) for row in rows]
    assert (batch.tokens_BT[~batch.mask_BT] == made.pad_id).all()
    assert batch.targets.tolist() == [1, 0]
