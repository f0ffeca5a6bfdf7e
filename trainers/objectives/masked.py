"""Objectives that hide tokens: alone, with pairs of texts, and mixed with the autoregressive one.

Legend: B rows, T positions, P most targets of a masked row, K terms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.order.permutation import uniform
from data.rows.framing import NO_LABEL
from data.rows.masking import Masking, row_keys
from trainers.model.backbone import at_slots
from trainers.objectives.causal import CAUSAL, Causal, document_segments
from trainers.objectives.objective import Inputs, RowBatch, StepLoss, Term, on_device

MASKED = Term("masked")
PADDING_SEGMENT = -1


@dataclass(frozen=True)
class MaskedAndPairs:
    """Find hidden tokens by all others and, of rows with two texts, what these are to each other (BERT, Devlin et
    al. 2018, section 3.1; ALBERT, Lan et al. 2019, section 3.1). The loss is the sum of both means.
    """

    hides_tokens: ClassVar[bool] = True

    masking: Masking
    sep_id: int
    document_mask: bool
    pairs: Term | None
    seed: int

    @property
    def terms(self) -> tuple[Term, ...]:
        return (MASKED, self.pairs) if self.pairs else (MASKED,)

    def inputs(self, batch: RowBatch) -> Inputs:
        return self._inputs(batch, row_keys("mask", self.seed, batch.rows))

    def evaluation_inputs(self, batch: RowBatch) -> Inputs:
        """The same of rows that are not trained on; the same ones for every seed."""
        return self._inputs(batch, row_keys("evaluation mask", 0, batch.rows))

    def _inputs(self, batch: RowBatch, keys: NDArray[np.uint64]) -> Inputs:
        tokens, of_row = batch.tokens.astype(np.int64), row_weights(batch)
        masked = self.masking.mask(tokens, keys)
        ends_text = tokens == self.sep_id
        texts_ended = np.cumsum(ends_text, axis=1) - ends_text  # before each position
        # The last [SEP] is the row's last token; a row that only fills up has none, and sees itself.
        filled = (np.cumsum(ends_text[:, ::-1], axis=1)[:, ::-1] > 0) | (of_row == 0)[:, None]
        inputs = {
            "tokens": masked.tokens,
            "slots": masked.slots,
            "targets": masked.targets,
            "weights": masked.weights * of_row[:, None],
        }
        # Rows of one text are full but at a fragment's end: without segments they take the faster kernel.
        if self.pairs or self.document_mask or not filled.all():
            segments = self._documents(tokens, texts_ended) if self.document_mask else 0
            inputs["segments"] = np.where(filled, segments, PADDING_SEGMENT)
        if self.pairs:
            inputs["types"] = ((texts_ended == 1) & filled).astype(np.int64)
            inputs["labels"] = np.maximum(batch.labels, 0).astype(np.int64)
            inputs["label_weights"] = (batch.labels != NO_LABEL) * of_row
        return inputs

    def _documents(self, tokens: NDArray[np.int64], texts_ended: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, T]: a number for each document. [CLS] is of the one that two texts meet in, which it judges."""
        documents = np.cumsum(tokens == self.masking.boundary_id, axis=1)
        if self.pairs:
            seam = (texts_ended == 0).sum(axis=1) - 1  # the first [SEP]
            has_two = (tokens == self.sep_id).sum(axis=1) == 2
            documents[has_two, 0] = documents[has_two, seam[has_two]]
        return documents

    def targets(self, inputs: Inputs) -> list[float]:
        weights = [inputs["weights"], *([inputs["label_weights"]] if self.pairs else [])]
        return [float(each.sum()) for each in weights]

    def global_targets(self, rows_per_step: int, seq_len: int) -> list[float] | None:
        return None

    def target_share(self, seq_len: int) -> float:
        return self.masking.num_slots(seq_len) / seq_len

    def loss(
        self, model: Callable[..., Any], inputs: Mapping[str, Tensor], counts: Sequence[float]
    ) -> StepLoss:
        total, _, *pair_logits = model(
            inputs["tokens"],
            inputs.get("segments"),
            targets_BP=inputs["targets"],
            weights_BP=inputs["weights"],
            types_BT=inputs.get("types"),
            slots_BP=inputs["slots"],
        )
        sums = [total]
        if self.pairs:
            sums.append((pair_losses(pair_logits[0], inputs) * inputs["label_weights"]).sum())
        parts = [
            each * (term.share / max(1, count))
            for term, each, count in zip(self.terms, sums, counts, strict=True)
        ]
        return StepLoss(torch.stack(parts).sum(), torch.stack(sums).detach())

    def measure(self, model: Any, batch: RowBatch, device: torch.device) -> NDArray[np.float64]:
        arrays = self.evaluation_inputs(batch)
        inputs = on_device(arrays, device)
        hidden_BTD = model(inputs["tokens"], inputs.get("segments"), types_BT=inputs.get("types"))
        found = [masked_sums(model, hidden_BTD, inputs)]
        if self.pairs:
            logits_B2, weights_B = model.pair_logits(hidden_BTD), inputs["label_weights"]
            hits_B = logits_B2.argmax(dim=-1) == inputs["labels"]
            found.append([(each * weights_B).sum() for each in (pair_losses(logits_B2, inputs), hits_B)])
        return np.array(
            [
                [nats.item(), targets, hits.item()]
                for (nats, hits), targets in zip(found, self.targets(arrays), strict=True)
            ]
        )


@dataclass(frozen=True)
class Mixed:
    """Some rows masked, some causal, one set of weights (GPT-BERT, Charpentier and Samuel 2024, section 3).

    In masked rows every position sees all others, and a hidden token is predicted where the one before it stands, as
    in causal rows: one head serves both. The loss is the mean of each kind, weighted by its share of the rows.
    """

    hides_tokens: ClassVar[bool] = True

    causal: Causal
    masking: Masking
    masked_share: float
    seed: int

    @property
    def terms(self) -> tuple[Term, ...]:
        return replace(CAUSAL, share=1 - self.masked_share), replace(MASKED, share=self.masked_share)

    def inputs(self, batch: RowBatch) -> Inputs:
        hidden = self._hidden(batch, row_keys("mask", self.seed, batch.rows))
        tokens, of_row = batch.tokens.astype(np.int64), row_weights(batch)
        sees_all = uniform(row_keys("mixed", self.seed, batch.rows)) < self.masked_share
        # Targets of a masked row by position; of a causal one all.
        weights = np.zeros_like(tokens[:, 1:], np.float32)
        np.add.at(weights, (np.arange(len(tokens))[:, None], hidden["slots"]), hidden["weights"])
        return {
            "tokens": np.where(sees_all[:, None], hidden["tokens"], tokens[:, :-1]),
            "targets": tokens[:, 1:],
            "weights": np.where(sees_all[:, None], weights, of_row[:, None]),
            "sees_all": sees_all,
        }

    def evaluation_inputs(self, batch: RowBatch) -> Inputs:
        """All rows masked, the same ones for every seed."""
        return self._hidden(batch, row_keys("evaluation mask", 0, batch.rows))

    def _hidden(self, batch: RowBatch, keys: NDArray[np.uint64]) -> Inputs:
        """Rows with hidden tokens; slots are the positions before these, so a row's first token is never one."""
        tokens = batch.tokens[:, :-1].astype(np.int64)
        masked = self.masking.mask(tokens[:, 1:], keys)
        return {
            "tokens": np.concatenate([tokens[:, :1], masked.tokens], axis=1),
            "slots": masked.slots,
            "targets": masked.targets,
            "weights": masked.weights * row_weights(batch)[:, None],
        }

    def targets(self, inputs: Inputs) -> list[float]:
        of_row, sees_all = inputs["weights"].sum(axis=1), inputs["sees_all"]
        return [float(of_row[~sees_all].sum()), float(of_row[sees_all].sum())]

    def global_targets(self, rows_per_step: int, seq_len: int) -> list[float] | None:
        return None

    def target_share(self, seq_len: int) -> float:
        return 1.0

    def loss(
        self, model: Callable[..., Any], inputs: Mapping[str, Tensor], counts: Sequence[float]
    ) -> StepLoss:
        tokens, sees_all = inputs["tokens"], inputs["sees_all"]
        # Both kinds in one pass: their means' denominators go into the weights of the targets.
        causal, masked = (term.share / max(1, count) for term, count in zip(self.terms, counts, strict=True))
        factor = torch.where(sees_all, masked, causal)
        total, per_row = model(
            tokens,
            self._segments(tokens),
            targets_BP=inputs["targets"],
            weights_BP=inputs["weights"] * factor[:, None],
            sees_all_B=sees_all,
        )
        nats = per_row / factor
        return StepLoss(total, torch.stack([nats[~sees_all].sum(), nats[sees_all].sum()]))

    def measure(self, model: Any, batch: RowBatch, device: torch.device) -> NDArray[np.float64]:
        arrays = self.evaluation_inputs(batch)
        inputs = on_device(arrays, device)
        length = batch.weights.sum(axis=1) + 1  # tokens before padding
        filled = torch.from_numpy(np.arange(inputs["tokens"].shape[1]) < length[:, None]).to(device)
        segments = self._segments(inputs["tokens"])
        segments = torch.where(filled, 0 if segments is None else segments, PADDING_SEGMENT)
        sees_all = torch.ones(len(filled), dtype=torch.bool, device=device)
        nats, hits = masked_sums(model, model(inputs["tokens"], segments, sees_all_B=sees_all), inputs)
        masked = [nats.item(), float(arrays["weights"].sum()), hits.item()]
        return np.vstack([self.causal.measure(model, batch, device), masked])

    def _segments(self, tokens_BT: Tensor) -> Tensor | None:
        if not self.causal.document_mask:
            return None
        return document_segments(tokens_BT, self.causal.boundary_id)


def row_weights(batch: RowBatch) -> NDArray[np.float32]:
    """[B]: 0 for rows that only fill up."""
    return batch.weights if batch.weights.ndim == 1 else batch.weights.max(axis=1)


def pair_losses(logits_B2: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B], float32, in nats."""
    return F.cross_entropy(logits_B2.float(), inputs["labels"], reduction="none")


def masked_sums(model: Any, hidden_BTD: Tensor, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Sum of the losses of hidden tokens, in nats, and how many of them got the highest score."""
    logits_BPV = model.logits(at_slots(hidden_BTD, inputs["slots"])).float()
    losses_BP = F.cross_entropy(logits_BPV.transpose(1, 2), inputs["targets"], reduction="none")
    hits_BP = logits_BPV.argmax(dim=-1) == inputs["targets"]
    return [(each * inputs["weights"]).sum() for each in (losses_BP, hits_BP)]
