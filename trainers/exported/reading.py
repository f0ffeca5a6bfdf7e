"""What an exported model makes of texts that it sees as a whole: hidden tokens, pairs of sentences, embeddings.

Legend: B texts, T positions, M hidden tokens, D model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from data.tokens.tokenizer import SpecialIds, special_ids
from data.tokens.vocabulary import Vocabulary
from trainers.exported.folder import Exported
from trainers.model.diverged import DivergedModelError
from trainers.objectives.kinds import OBJECTIVES

MASK = "[MASK]"
"""How a hidden token is written, whatever the tokenizer calls it."""
PADDING_SEGMENT, TEXT_SEGMENT = -1, 0
CPU = torch.device("cpu")

Pooling = Literal["mean", "cls"]


class Candidate(NamedTuple):
    token: str
    probability: float


class Place(NamedTuple):
    rank: int
    """1 for the likeliest token."""
    probability: float


@dataclass(frozen=True)
class Filled:
    """What may stand in one place."""

    candidates: list[Candidate]
    """The likeliest tokens, likeliest first."""
    words: dict[str, Place | None]
    """Where the words that were asked for stand among all tokens; None for one that is no token."""


class _Rows(NamedTuple):
    tokens_BT: Tensor
    types_BT: Tensor
    segments_BT: Tensor
    content_BT: Tensor
    """bool: neither special nor padding."""


class Reader:
    """Reads texts framed as in training: an encoder's between [CLS] and [SEP]; those of a model of the mixed objective
    after the boundary of documents.

    Raises:
        ValueError: the tokenizer lacks a special token that this takes, or the model never saw what follows a token.
    """

    def __init__(self, exported: Exported, device: torch.device = CPU) -> None:
        trained = OBJECTIVES.get(exported.objective or "")
        if trained and not trained.objective.hides_tokens:
            raise ValueError(
                f"the model was trained to continue texts alone (objective.kind={exported.objective}), and reads none "
                "as a whole; "
                "use generate.py, or a model of objective.kind=mixed or masked"
            )
        serialised = exported.tokenizer.to_str().encode()
        self._model, self._tokenizer = exported.model.to(device), exported.tokenizer
        self._ids, self._boundary_id = special_ids(serialised), exported.boundary_id
        self._vocabulary = Vocabulary.from_tokenizer(serialised)
        self._bidirectional = exported.model.config.attention == "bidirectional"
        wanted = ("cls", "sep") if self._bidirectional else ()
        if missing := [f"[{name.upper()}]" for name in wanted if getattr(self._ids, name) is None]:
            raise ValueError(
                f"the tokenizer has no {' and no '.join(missing)}, which this encoder's texts need"
            )

    @torch.inference_mode()
    def fill(self, text: str, *, top: int = 5, words: Sequence[str] = ()) -> list[Filled]:
        """Say what each [MASK] of a text may stand for.

        Raises:
            ValueError: there is no [MASK], in the text or the tokenizer; the text is too long.
        """
        if self._ids.mask is None:
            raise ValueError(f"the tokenizer has no {MASK}: the model was not trained to fill it")
        ids_of = {word: self._ids_of(word) for word in words}
        rows = self._framed([(text,)])
        places = (rows.tokens_BT[0] == self._ids.mask).nonzero().flatten()
        if not len(places):
            raise ValueError(f"there is no {MASK} in {text!r}; write one for each token to be found")
        # The mixed objective predicts a hidden token from the position before it, as causal rows do.
        at = places if self._bidirectional else places - 1
        logits_MV = self._model.logits(self._hidden(rows)[:, at])[0]
        _refuse_not_finite(logits_MV, repr(text[:40]))
        found = []
        for probabilities_V in logits_MV.double().softmax(dim=-1):
            best = probabilities_V.topk(min(top, len(probabilities_V)))
            candidates = [
                Candidate(self._spelled(token), probability)
                for token, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            found.append(
                Filled(candidates, {word: _place(probabilities_V, ids) for word, ids in ids_of.items()})
            )
        return found

    @torch.inference_mode()
    def goes_on(self, pairs: Sequence[tuple[str, str]], *, batch_size: int = 32) -> list[float]:
        """Return the probability of each pair that its second text follows the first.

        Raises:
            ValueError: the model has no pair head, or a text is too long or has no tokens.
        """
        if self._model.pair_head is None:
            raise ValueError("the model has no pair head: train it with objective.kind=masked_next_sentence")
        logits = [self._model.pair_logits(self._hidden(rows)) for rows in self._batches(pairs, batch_size)]
        if not logits:
            return []
        _refuse_not_finite(torch.cat(logits), "pairs")
        return torch.cat(logits).double().softmax(dim=-1)[:, 0].tolist()

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], pooling: Pooling = "mean", *, batch_size: int = 32) -> Tensor:
        """Return a vector for each text, float32 [B, D]: the mean over its tokens, or the state of the first position.

        Raises:
            ValueError: a text is too long, or has no tokens.
        """
        vectors = [self._model.embed_tokens.weight.new_empty(0, self._model.config.hidden_size)]
        for rows in self._batches([(text,) for text in texts], batch_size):
            hidden_BTD = self._hidden(rows)
            if pooling == "cls":
                vectors.append(hidden_BTD[:, 0])
                continue
            weights_BT1 = rows.content_BT[:, :, None].to(hidden_BTD)
            vectors.append((hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1))
        found = torch.cat(vectors).float().cpu()
        _refuse_not_finite(found, "texts")
        return found

    def _hidden(self, rows: _Rows) -> Tensor:
        """[B, T, D], every position having seen all others."""
        sees_all = None if self._bidirectional else torch.ones_like(rows.tokens_BT[:, 0], dtype=torch.bool)
        return self._model(rows.tokens_BT, rows.segments_BT, types_BT=rows.types_BT, sees_all_B=sees_all)

    def _batches(self, texts: Sequence[tuple[str, ...]], batch_size: int) -> Iterator[_Rows]:
        remaining = iter(texts)
        while batch := list(islice(remaining, batch_size)):
            yield self._framed(batch)

    def _framed(self, texts: Sequence[tuple[str, ...]]) -> _Rows:
        encoded = [[self._encoded(part) for part in parts] for parts in texts]
        if any(not part for parts in encoded for part in parts):
            raise ValueError("a text has no tokens; leave empty texts out")
        ids, room = self._ids, self._model.config.max_positions
        framed = [list(self._frame(parts, ids)) for parts in encoded]
        longest = max(map(len, framed))
        if longest > room:
            raise ValueError(
                f"a text takes {longest:,} tokens with those around it, the model has {room:,} positions; shorten it"
            )
        shape = (len(framed), longest)
        tokens_BT = torch.full(shape, ids.pad or 0)
        types_BT, content_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        segments_BT = torch.full(shape, PADDING_SEGMENT)
        for row, placed in enumerate(framed):
            tokens, types, content = zip(*placed, strict=True)
            tokens_BT[row, : len(placed)] = torch.tensor(tokens)
            types_BT[row, : len(placed)] = torch.tensor(types)
            content_BT[row, : len(placed)] = torch.tensor(content)
            segments_BT[row, : len(placed)] = TEXT_SEGMENT
        made = (tokens_BT, types_BT, segments_BT, content_BT)
        return _Rows(*(each.to(self._model.embed_tokens.weight.device) for each in made))

    def _frame(self, parts: Sequence[Sequence[int]], ids: SpecialIds) -> Iterator[tuple[int, int, bool]]:
        """Token, type and whether it is part of a text."""
        if not self._bidirectional:
            yield self._boundary_id, 0, False
            yield from ((token, 0, True) for part in parts for token in part)
            return
        assert ids.cls is not None and ids.sep is not None
        yield ids.cls, 0, False
        for kind, part in enumerate(parts):
            yield from ((token, kind, True) for token in part)
            yield ids.sep, kind, False

    def _encoded(self, text: str) -> list[int]:
        if self._ids.mask is None:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        # A mask stands for a word with the blank before it: byte-level tokens hold it, and would leave it alone.
        *before, last = text.split(MASK)
        texts = [*(piece.removesuffix(" ") for piece in before), last]
        pieces = [self._tokenizer.encode(piece, add_special_tokens=False).ids for piece in texts]
        return [*pieces[0], *(token for piece in pieces[1:] for token in (self._ids.mask, *piece))]

    def _ids_of(self, word: str) -> list[int]:
        """The tokens that spell a word, with a blank before it or without; none where several would."""
        texts, inner = self._vocabulary.texts, self._vocabulary.inner
        return [
            token for token, text in enumerate(texts) if text.strip() == word.encode() and not inner[token]
        ]

    def _spelled(self, token: int) -> str:
        """A token's text without blanks; a special one's name. Ids beyond the tokenizer's have none."""
        if token >= len(self._vocabulary.texts) or self._vocabulary.special[token]:
            return self._tokenizer.id_to_token(token) or f"<{token}>"
        return self._vocabulary.texts[token].decode(errors="replace").strip()


def _refuse_not_finite(outputs: Tensor, of_what: str) -> None:
    if not bool(outputs.isfinite().all()):
        raise DivergedModelError(
            f"the model's outputs for {of_what} are not finite: it has diverged; take another"
        )


def _place(probabilities_V: Tensor, ids: Sequence[int]) -> Place | None:
    """The best place of several tokens; equally likely ones share the better rank."""
    if not ids:
        return None
    probability = probabilities_V[list(ids)].max()
    return Place(int((probabilities_V > probability).sum()) + 1, probability.item())
