"""Where a text becomes token ids: a tokenizer given or trained here, then fixed by its fingerprint."""

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cluster.storage.uris import Store
from data.tokens.tokenizer_file import TokenizerError, parse_tokenizer

# Beside the boundary, which is token 0 of a trained tokenizer: for padding and for masked objectives.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

# An Encoding holds some 100 bytes per token beside its id: longer texts are cut, so that 16 MiB of text need
# not 500 MB.
CUT_CHARACTERS = 262_144
# A blank between two visible characters: byte-level BPE and WordPiece both begin a new word there, so that a
# cut before it changes no token.
_WORD_BREAK = re.compile(r"(?<=\S) (?=\S)")

# WordPiece's alphabet: the characters that cover so much of the text (as SentencePiece, Kudo and Richardson
# 2018), at most so much of the vocabulary. The rest becomes [UNK], or a corpus with some emoji would leave no
# room for words. Chinese needs most of the room: a character is a token there.
ALPHABET_COVERAGE, ALPHABET_SHARE = 0.9995, 0.75
# The blank that decoding puts before a token, where Chinese has none: before its characters and punctuation.
_CHINESE_BLANK = r"^ (?=[\p{Han}\u3000-\u303f\uff00-\uffef“”‘’…—])"


# How BERT's family and RoBERTa's spell them.
_SPELLINGS = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer that is given, or how one is trained on the train split."""

    path: str = ""
    """URI or path of a tokenizer.json to use as it is; empty: train one."""
    kind: Literal["bpe", "wordpiece"] = "bpe"
    """bpe: byte-level, loses nothing. wordpiece: as BERT's, each Chinese character a token; replaces unknown
    characters and joins blanks."""
    vocab_size: int = 32_768
    """Entries of a trained tokenizer, special tokens included."""
    lowercase: bool = False
    """WordPiece only: lower case and no accents."""
    boundary: str = "<|endoftext|>"
    """Special token that begins each document; added to a given tokenizer that lacks it."""
    sample_bytes: int = 67_108_864
    """Text of the train split that a tokenizer is trained on, at most."""

    def problems(self, at: str) -> Iterator[str]:
        """Messages on values that cannot be met; `at` is the section's dotted name."""
        least = 256 + 1 + len(SPECIAL_TOKENS)
        if not self.path and not least <= self.vocab_size <= 2**20:
            yield f"{at}.vocab_size={self.vocab_size:,} is outside {least} (bytes and specials) to {2**20:,}"
        if self.sample_bytes < 1_024:
            yield f"{at}.sample_bytes={self.sample_bytes:,} is too little to train on; give 1,024 or more"
        if self.lowercase and self.kind != "wordpiece":
            yield f"{at}.lowercase needs {at}.kind=wordpiece: byte-level BPE keeps the text as it is"


@dataclass(frozen=True)
class FixedTokenizer:
    """A tokenizer that will not change any more, by its serialised form."""

    json: str
    """Content of tokenizer.json."""
    fingerprint: str
    """First 16 hex digits of the sha256 of `json`."""
    vocab_size: int
    """One more than the greatest id."""
    boundary_id: int

    @property
    def path(self) -> str:
        """Where it lies in a prepared corpus."""
        return tokenizer_path(self.fingerprint)

    @property
    def token_dtype(self) -> Literal["uint16", "uint32"]:
        """The narrowest type that holds every id."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that objectives put between texts; None for one that the tokenizer does not have."""

    boundary: int | None
    """Opens each document in the token shards."""
    pad: int | None
    cls: int | None
    sep: int | None
    mask: int | None


def special_ids(
    tokenizer_json: bytes, boundary: str = TokenizerConfig.boundary, origin: str = "tokenizer.json"
) -> SpecialIds:
    """Look the special tokens of a tokenizer.json up, by their spelling in BERT's family and RoBERTa's."""
    ids = parse_tokenizer(tokenizer_json, origin).get_vocab(with_added_tokens=True)
    found = {
        role: next((ids[spelled] for spelled in spellings if spelled in ids), None)
        for role, spellings in _SPELLINGS.items()
    }
    return SpecialIds(boundary=ids.get(boundary), **found)


def fingerprint_of(serialised: bytes) -> str:
    """What a tokenizer is known by: the first 16 hex digits of the sha256 of its tokenizer.json."""
    return hashlib.sha256(serialised).hexdigest()[:16]


def tokenizer_path(fingerprint: str) -> str:
    """Where the tokenizer of this fingerprint lies in a prepared corpus."""
    return f"tokenizers/{fingerprint}/tokenizer.json"


def fix_tokenizer(serialised: str | bytes, origin: str, boundary: str) -> FixedTokenizer:
    """Make a given tokenizer fit for pretraining: no truncation, padding or post-processor, and a boundary token.

    What frames a text is put in here as ids, and by an export in the way of its model: the post-processor is no part of
    what tells tokenizers apart.

    Args:
        serialised: Content of tokenizer.json.
        origin: Where it came from, for messages.
        boundary: Token that begins each document; added where it is missing.

    Returns:
        The same for its own `json` again.

    Raises:
        TokenizerError: it is not a tokenizer that the installed `tokenizers` reads.
    """
    tokenizer = parse_tokenizer(serialised, origin)
    tokenizer.post_processor = None
    tokenizer.add_special_tokens([boundary])
    fixed = tokenizer.to_str()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return FixedTokenizer(fixed, fingerprint_of(fixed.encode()), max(ids.values()) + 1, ids[boundary])


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> FixedTokenizer:
    """Train a tokenizer with the special tokens as ids 0 to 5; the same texts always give the same one.

    Raises:
        TokenizerError: too little text for the vocabulary.
    """
    parts = (part for text in texts for part in cut(text))
    train = _train_bpe if config.kind == "bpe" else _train_wordpiece
    tokenizer = train(parts, config.vocab_size, [config.boundary, *SPECIAL_TOKENS], config)
    # In a text with hidden words, whoever encodes it, a mask stands for a word with the blank before it.
    tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True)])
    reached = tokenizer.get_vocab_size()
    if reached < config.vocab_size:
        raise TokenizerError(
            f"corpus.tokenizer.vocab_size={config.vocab_size:,} is more than the sample gives; nearest: "
            f"{reached:,}. Lower it, or raise corpus.tokenizer.sample_bytes"
        )
    return fix_tokenizer(tokenizer.to_str(), "the trained tokenizer", config.boundary)


def _train_bpe(
    texts: Iterable[str], vocab_size: int, special_tokens: list[str], config: TokenizerConfig
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # all 256 bytes, so that no text is unknown
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(
    texts: Iterable[str], vocab_size: int, special_tokens: list[str], config: TokenizerConfig
) -> Tokenizer:
    """Train twice: the library numbers `##x` in an order that differs each time, and breaks ties by number.

    The first training only finds which there are. The second gets them in alphabetical order, as special
    tokens; the finished vocabulary then goes into a tokenizer in which they are none.
    """
    sample = list(texts)  # bounded by config.sample_bytes
    normalizer = normalizers.BertNormalizer(lowercase=config.lowercase)
    counts = Counter(character for text in sample for character in normalizer.normalize_str(text))
    common = alphabet(counts, int(vocab_size * ALPHABET_SHARE))

    def trained(size: int, first: list[str]) -> dict[str, int]:
        tokenizer = _wordpiece(models.WordPiece(unk_token="[UNK]"), normalizer)
        trainer = trainers.WordPieceTrainer(
            vocab_size=size,
            special_tokens=special_tokens + first,
            initial_alphabet=common,
            limit_alphabet=len(common),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sample, trainer)
        return tokenizer.get_vocab()

    inner = sorted(token for token in trained(0, []) if token.startswith("##"))
    vocabulary = trained(vocab_size, inner)
    tokenizer = _wordpiece(models.WordPiece(vocabulary, unk_token="[UNK]"), normalizer)
    tokenizer.add_special_tokens(special_tokens)
    return tokenizer


def alphabet(counts: Counter[str], most: int) -> list[str]:
    """The commonest characters that together cover ALPHABET_COVERAGE of the text, and no more than `most`."""
    visible = sorted(
        (character for character in counts if not character.isspace()),
        key=lambda character: (-counts[character], character),
    )
    covered = np.cumsum([counts[character] for character in visible])
    needed = int(np.searchsorted(covered, ALPHABET_COVERAGE * covered[-1])) + 1 if visible else 0
    return visible[: min(needed, most)]


def _wordpiece(model: models.WordPiece, normalizer: normalizers.Normalizer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(), decoders.Replace(Regex(_CHINESE_BLANK), "")])
    return tokenizer


def read_tokenizer(store: Store, fingerprint: str) -> bytes:
    """The tokenizer.json of a prepared corpus, as it was when it got its fingerprint.

    Raises:
        TokenizerError: the file was altered.
    """
    path = tokenizer_path(fingerprint)
    serialised = store.read(path)
    if (found := fingerprint_of(serialised)) != fingerprint:
        raise TokenizerError(
            f"{store.uri}/{path} was altered: its fingerprint is {found}; put the original back, "
            f"or prepare the corpus anew under another corpus.prepared"
        )
    return serialised


def load_tokenizer(store: Store, fingerprint: str, boundary: str) -> FixedTokenizer:
    """Read a prepared corpus's tokenizer.

    Raises:
        TokenizerError: the file does not have this fingerprint any more.
    """
    path = tokenizer_path(fingerprint)
    return fix_tokenizer(read_tokenizer(store, fingerprint), f"{store.uri}/{path}", boundary)


class Encoder:
    """Turns texts into tokens, each beginning with the boundary, that text itself never yields."""

    def __init__(self, fixed: FixedTokenizer) -> None:
        self._tokenizer = parse_tokenizer(fixed.json, "the corpus's tokenizer.json")
        self._tokenizer.encode_special_tokens = True
        self._boundary = np.array([fixed.boundary_id], np.uint32)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode texts; returns one uint32 array [1 + tokens] for each, boundary first."""
        parts = [cut(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(
            [part for parts_of_text in parts for part in parts_of_text], add_special_tokens=False
        )
        # A list of ints becomes an array by way of array.array in a quarter of the time that numpy takes for it.
        ids = iter(np.frombuffer(array("I", encoding.ids), np.uint32) for encoding in encodings)
        return [np.concatenate([self._boundary, *(next(ids) for _ in each)]) for each in parts]


def cut(text: str, characters: int = CUT_CHARACTERS) -> list[str]:
    """Cut a long text into parts of at most so many characters, before a blank between words where there is
    one.

    Texts without such a blank in the last half of a part (a megabyte of Chinese) are cut at a character.
    """
    parts = []
    start = 0
    while len(text) - start > characters:
        breaks = [
            match.start() for match in _WORD_BREAK.finditer(text, start + characters // 2, start + characters)
        ]
        stop = breaks[-1] if breaks else start + characters
        parts.append(text[start:stop])
        start = stop
    parts.append(text[start:])
    return parts
