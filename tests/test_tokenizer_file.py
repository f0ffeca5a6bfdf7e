"""Whatever a tokenizer.json holds, reading it gives a tokenizer or one line that names the file."""

import base64
import json
import random
import re
from typing import Any

import pytest
from task_files import small_tokenizer
from tokenizers import Tokenizer, models

from cluster.sessions.session import PROJECT
from data.tokens import tokenizer_file
from data.tokens.tokenizer import fix_tokenizer, special_ids
from data.tokens.tokenizer_file import MAX_IDS, TokenizerError, parse_tokenizer
from data.tokens.vocabulary import Vocabulary

UNIGRAM = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ab", -1.5)], unk_id=0)).to_str()


def with_parts(**parts: Any) -> str:
    return json.dumps(json.loads(small_tokenizer().json) | parts)


def precompiled(charsmap: bytes) -> dict[str, str]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


def template(special: dict[str, Any]) -> dict[str, Any]:
    single = [{"SpecialToken": {"id": "Q", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


PANICS = {
    "on reading, a normalizer": with_parts(normalizer=precompiled(b"ab")),
    "on reading, merges": with_parts(
        model={
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
            "continuing_subword_prefix": "###",
        }
    ),
    "on use, a normalizer": with_parts(normalizer=precompiled(bytes(4))),
    "on use, a pre-tokenizer": with_parts(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "on use, a post-processor": with_parts(post_processor=template({})),
}


@pytest.mark.parametrize("serialised", PANICS.values(), ids=PANICS.keys())
def test_a_tokenizer_that_panics_is_refused_by_name(serialised: str) -> None:
    for content in (serialised, serialised.encode()):
        with pytest.raises(TokenizerError, match=r"s3://x/tokenizer\.json is not a readable"):
            parse_tokenizer(content, "s3://x/tokenizer.json")
    with pytest.raises(TokenizerError, match="tokenizer.json is not a readable"):
        special_ids(serialised.encode())
    with pytest.raises(TokenizerError, match="s3://x is not a readable"):
        fix_tokenizer(serialised, "s3://x", "<|endoftext|>")


@pytest.mark.parametrize("greatest", [MAX_IDS, 2**31, 2**32 - 1])
def test_an_id_out_of_all_proportion_is_refused_before_memory_is_laid_out_by_it(greatest: int) -> None:
    fields = json.loads(small_tokenizer().json)
    fields["model"]["vocab"]["the far one"] = greatest
    serialised = json.dumps(fields)
    for read in (
        lambda: parse_tokenizer(serialised, "here"),
        lambda: fix_tokenizer(serialised, "here", "<|endoftext|>"),
        lambda: special_ids(serialised.encode(), origin="here"),
        lambda: Vocabulary.from_tokenizer(serialised.encode()),
    ):
        with pytest.raises(TokenizerError, match=rf"greatest id is {greatest:,}; it must be"):
            read()


def test_the_greatest_id_that_is_allowed_is_read() -> None:
    fields = json.loads(small_tokenizer().json)
    fields["model"]["vocab"]["the far one"] = MAX_IDS - 2
    assert fix_tokenizer(json.dumps(fields), "here", "<|endoftext|>").vocab_size == MAX_IDS - 1


def test_a_file_without_tokens_or_beyond_all_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError, match="greatest id is -1"):
        parse_tokenizer(Tokenizer(models.BPE()).to_str(), "here")
    monkeypatch.setattr(tokenizer_file, "MAX_FILE_BYTES", 1_000)
    with pytest.raises(TokenizerError, match=r"here has [\d,]+ bytes"):
        parse_tokenizer(small_tokenizer().json, "here")


def test_a_tokenizer_neither_cuts_nor_pads_texts_by_itself() -> None:
    cutting = Tokenizer.from_str(small_tokenizer().json)
    cutting.enable_truncation(2)
    cutting.enable_padding(length=50)
    expected = Tokenizer.from_str(small_tokenizer().json).encode("one two three").ids
    assert parse_tokenizer(cutting.to_str(), "here").encode("one two three").ids == expected


def test_a_token_that_stands_for_no_byte_is_refused_by_name() -> None:
    fields = json.loads(small_tokenizer().json)
    fields["model"]["vocab"]["☃"] = len(fields["model"]["vocab"])
    with pytest.raises(TokenizerError, match="☃"):
        Vocabulary.from_tokenizer(json.dumps(fields).encode())


@pytest.mark.parametrize("serialised", [small_tokenizer().json, UNIGRAM], ids=["bpe", "unigram"])
def test_a_damaged_tokenizer_is_refused_by_name_or_read(serialised: str) -> None:
    refused = 0
    for seed in range(300):
        dice, content = random.Random(seed), bytearray(serialised.encode())
        if seed % 3 == 0:
            del content[dice.randrange(len(content)) :]
        elif seed % 3 == 1:
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        else:
            at = dice.randrange(len(content))
            del content[at : at + dice.randrange(1, 9)]
        try:
            Vocabulary.from_tokenizer(bytes(content))
        except TokenizerError as error:
            refused += 1
            assert "tokenizer.json" in str(error) and "\n" not in str(error)
    assert refused > 200


def test_no_module_reads_a_tokenizer_past_the_bounds() -> None:
    unbounded = re.compile(r"Tokenizer\.from_\w+\(")
    paths = [
        path for top in ("cluster", "data", "trainers", "tune") for path in (PROJECT / top).rglob("*.py")
    ]
    found = [path.name for path in paths if unbounded.search(path.read_text())]
    assert found == ["tokenizer_file.py"], "use data.tokens.tokenizer_file.parse_tokenizer"
