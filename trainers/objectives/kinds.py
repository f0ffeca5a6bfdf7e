"""What a model can be trained for: the kinds of objectives, and how one is configured.

Legend: B rows, P most targets of a masked row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.configuration.keys import nearest, shown
from data.rows.framing import FrameKind, FramingConfig
from data.rows.masking import Masking
from data.tokens.tokenizer import special_ids
from data.tokens.vocabulary import Vocabulary
from data.tokens.words import WordKind, Words
from trainers.objectives.causal import Causal
from trainers.objectives.masked import MaskedAndPairs, Mixed
from trainers.objectives.objective import Masks, Objective, Term


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model is trained for."""

    kind: str = "causal"
    """causal: each token from those before it. masked: hidden tokens from all others; with next_sentence also
    whether B follows A, with sentence_order which of two comes first. mixed: some rows masked, the others causal.
    """
    mask_rate: float = 0.15
    """Share of a masked row's tokens that are targets."""
    random_share: float = 0.1
    """Share of the targets that a random token replaces."""
    keep_share: float = 0.1
    """Share of the targets that stay; the rest becomes [MASK]."""
    words: WordKind = "word"
    """What is hidden as a whole. token: single tokens. word: words between blanks, and single Chinese characters.
    chinese: Chinese words, by jieba's dictionary.
    """
    masked_share: float = 0.5
    """Share of the rows that are masked under `mixed`, and of their loss in the sum."""
    short_share: float = 0.1
    """Share of the pairs of texts that are shortened to a random length, so that short ones are seen."""
    seed: int = 0
    """Of masks and pairs."""

    @property
    def hides_tokens(self) -> bool:
        """Whether some of what a row holds is hidden, and found again."""
        return self.kind in OBJECTIVES and OBJECTIVES[self.kind].objective.hides_tokens

    @property
    def frames(self) -> FrameKind | None:
        """How an encoder's rows are framed; None: each position sees those before it."""
        return OBJECTIVES[self.kind].frames if self.kind in OBJECTIVES else None

    @property
    def is_encoder(self) -> bool:
        """Whether each position sees all others."""
        return self.frames is not None

    @property
    def has_pairs(self) -> bool:
        return self.frames not in (None, "single")

    @property
    def framing(self) -> FramingConfig | None:
        """How rows are framed; None: not at all."""
        if self.frames is None:
            return None
        return FramingConfig(self.frames, self.seed, self.short_share if self.has_pairs else 0.0)

    def problems(self, at: str) -> Iterator[str]:
        """A line for each value that no run can have."""
        if self.kind not in OBJECTIVES:
            alike = nearest(self.kind, list(OBJECTIVES))
            remedy = f"nearest: {alike}" if alike else f"there are {', '.join(OBJECTIVES)}"
            yield f"{at}.kind={shown(self.kind)} is no objective; {remedy}"
        for key in ("mask_rate", "masked_share"):
            if not 0 < getattr(self, key) < 1:
                why = "nothing would be learnt" if getattr(self, key) <= 0 else "nothing would be left"
                yield f"{at}.{key}={getattr(self, key)} must be above 0 and below 1, or {why}; usual: 0.15 and 0.5"
        if not 0 <= self.short_share <= 1:
            yield f"{at}.short_share={self.short_share} must be 0 to 1; BERT's is 0.1"
        if min(self.random_share, self.keep_share) < 0 or self.random_share + self.keep_share > 1:
            yield (
                f"{at}.random_share={self.random_share} and {at}.keep_share={self.keep_share} must not be negative, "
                "and 1 at most together; BERT's are 0.1 and 0.1"
            )


@dataclass(frozen=True)
class Tokens:
    """What an objective needs to know of the tokens that it is trained on."""

    tokenizer_json: bytes
    boundary_id: int
    document_mask: bool
    """No token attends to another document."""


@dataclass(frozen=True)
class ObjectiveKind:
    """A kind of objective."""

    objective: type[Objective]
    make: Callable[[ObjectiveConfig, Tokens], Objective]
    frames: FrameKind | None = None
    """How an encoder's rows are framed; None: rows are plain, and each position sees those before it."""


def _causal(config: ObjectiveConfig, tokens: Tokens) -> Causal:
    return Causal(tokens.boundary_id, tokens.document_mask)


def _mixed(config: ObjectiveConfig, tokens: Tokens) -> Mixed:
    return Mixed(_causal(config, tokens), masking_of(config, tokens), config.masked_share, config.seed)


def _masked(config: ObjectiveConfig, tokens: Tokens) -> MaskedAndPairs:
    masking, sep_id = masking_of(config, tokens), special_ids(tokens.tokenizer_json).sep
    assert sep_id is not None, "framing has refused a tokenizer without [SEP]"
    pairs = Term(str(config.frames)) if config.has_pairs else None
    return MaskedAndPairs(masking, sep_id, tokens.document_mask, pairs, config.seed)


OBJECTIVES: dict[str, ObjectiveKind] = {
    "causal": ObjectiveKind(Causal, _causal),
    "masked": ObjectiveKind(MaskedAndPairs, _masked, "single"),
    "masked_next_sentence": ObjectiveKind(MaskedAndPairs, _masked, "next_sentence"),
    "masked_sentence_order": ObjectiveKind(MaskedAndPairs, _masked, "sentence_order"),
    "mixed": ObjectiveKind(Mixed, _mixed),
}
"""By `objective.kind`."""


def masking_of(config: ObjectiveConfig, tokens: Tokens) -> Masking:
    """Which tokens are hidden, and by what.

    Raises:
        ValueError: the tokenizer has no [MASK].
    """
    ids = special_ids(tokens.tokenizer_json)
    if ids.mask is None:
        raise ValueError(
            f"objective.kind={config.kind} needs a tokenizer with [MASK]; train one (corpus.tokenizer.path empty), "
            "or give one made for masking"
        )
    return Masking(
        words=Words.from_tokenizer(tokens.tokenizer_json, config.words),
        special=Vocabulary.from_tokenizer(tokens.tokenizer_json).special,
        boundary_id=tokens.boundary_id,
        mask_id=ids.mask,
        rate=config.mask_rate,
        random_share=config.random_share,
        keep_share=config.keep_share,
    )


def objective_of(
    config: ObjectiveConfig, tokenizer_json: bytes, *, boundary_id: int, document_mask: bool
) -> Objective:
    """Make the objective of a configuration.

    Raises:
        ValueError: it hides tokens, and the tokenizer has no [MASK].
        TypeError: it lacks what a run asks of an objective, now or in the end.
    """
    kind = OBJECTIVES[config.kind]
    made = kind.make(config, Tokens(tokenizer_json, boundary_id, document_mask))
    wanted = Masks if getattr(made, "hides_tokens", False) else Objective
    if not isinstance(made, wanted):
        raise TypeError(
            f"objective.kind={config.kind} is made as {type(made).__name__}, which is no {wanted.__name__}"
        )
    return made
