"""What a model can be trained for: the kinds of objectives, and how one is configured.

Legend: B rows, P most targets of a masked row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from data.framing import FrameKind, FramingConfig
from data.masking import Masking
from data.tokens import special_ids
from data.vocabulary import Vocabulary
from data.words import WordKind, Words
from trainers.causal import Causal
from trainers.masked import MaskedAndPairs, Mixed
from trainers.objective import Inputs, Objective, RowBatch, Term

FRAMES: dict[str, FrameKind] = {
    "masked": "single",
    "masked_next_sentence": "next_sentence",
    "masked_sentence_order": "sentence_order",
}
"""How rows are framed, by kind; those of other kinds are plain."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the model is trained for."""

    kind: Literal["causal", "masked", "masked_next_sentence", "masked_sentence_order", "mixed"] = "causal"
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
    def is_encoder(self) -> bool:
        """Whether each position sees all others."""
        return self.kind in FRAMES

    @property
    def has_pairs(self) -> bool:
        return FRAMES.get(self.kind, "single") != "single"

    @property
    def framing(self) -> FramingConfig | None:
        """How rows are framed; None: not at all."""
        if not self.is_encoder:
            return None
        return FramingConfig(FRAMES[self.kind], self.seed, self.short_share if self.has_pairs else 0.0)

    def problems(self, at: str) -> Iterator[str]:
        """A line for each value that no run can have."""
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


@runtime_checkable
class Masks(Objective, Protocol):
    """An objective that hides tokens."""

    @property
    def masking(self) -> Masking:
        """How."""

    def evaluation_inputs(self, batch: RowBatch) -> Inputs:
        """Masked rows that are not trained on, with `targets` and `weights` [B, P], and `labels` and `label_weights`
        [B] where there are pairs; the same ones for every seed."""


def objective_of(
    config: ObjectiveConfig, tokenizer_json: bytes, *, boundary_id: int, document_mask: bool
) -> Objective:
    """Make the objective of a configuration.

    Raises:
        ValueError: it hides tokens, and the tokenizer has no [MASK].
    """
    causal = Causal(boundary_id, document_mask)
    if config.kind == "causal":
        return causal
    ids = special_ids(tokenizer_json)
    if ids.mask is None:
        raise ValueError(
            f"objective.kind={config.kind} needs a tokenizer with [MASK]; train one (corpus.tokenizer.path empty), "
            "or give one made for masking"
        )
    masking = Masking(
        words=Words.from_tokenizer(tokenizer_json, config.words),
        special=Vocabulary.from_tokenizer(tokenizer_json).special,
        boundary_id=boundary_id,
        mask_id=ids.mask,
        rate=config.mask_rate,
        random_share=config.random_share,
        keep_share=config.keep_share,
    )
    if config.kind == "mixed":
        return Mixed(causal, masking, config.masked_share, config.seed)
    assert ids.sep is not None, "framing has refused a tokenizer without [SEP]"
    pairs = Term(FRAMES[config.kind]) if config.has_pairs else None
    return MaskedAndPairs(masking, ids.sep, document_mask, pairs, config.seed)
