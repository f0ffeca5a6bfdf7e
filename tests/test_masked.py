"""Masked tokens, pairs and the mixed objective, against transformers and computations by hand."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from data.order.epochs import Rows
from data.rows.framing import NO_LABEL, Framing, FramingConfig
from data.tokens.tokenizer import special_ids
from tests.bert_reference import BERT, SMALL, bert_of, lively, to_reference
from tests.test_framing import PROSE, fragment_of, tokenizer
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.objectives.causal import Causal, causal_lm
from trainers.objectives.kinds import ObjectiveConfig, objective_of
from trainers.objectives.objective import micro_batches, on_device

SEQ_LEN = 48
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batch:
    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    rows: Rows

    def __getitem__(self, index) -> "Batch":
        return Batch(self.tokens[index], self.labels[index], self.weights[index], self.rows[index])


def objective(kind: str, **settings):
    return objective_of(
        ObjectiveConfig(kind=kind, **settings),
        tokenizer().json.encode(),
        boundary_id=tokenizer().boundary_id,
        document_mask=False,
    )


@cache
def batch_of(kind: str, num_rows: int = 8) -> Batch:
    # Rows that hold whole sentences, and rows that hold none.
    short = (f"It rains. We wait. He has {number}. She has none. " * 4 for number in range(60))
    whole = fragment_of([text for both in zip(short, PROSE, strict=False) for text in both])
    start = np.arange(num_rows) * (SEQ_LEN + 1)
    rows = Rows(0 * start, 0 * start, 0 * start, start // SEQ_LEN, start)
    weights = np.ones(num_rows, np.float32)
    framing = ObjectiveConfig(kind=kind).framing
    if framing is None:
        plain = np.lib.stride_tricks.sliding_window_view(whole, SEQ_LEN + 1)[start]
        return Batch(plain, np.full(num_rows, NO_LABEL, np.int8), weights, rows)
    made = Framing(framing, tokenizer().json.encode(), boundary_id=tokenizer().boundary_id, seq_len=SEQ_LEN)
    return Batch(*made.frame(whole, rows), weights, rows)


def bert(kind: str):
    pairs = ObjectiveConfig(kind=kind).has_pairs
    return lively(build(replace(BERT, vocab_size=tokenizer().vocab_size, pair_head=pairs), seed=1))


@pytest.mark.parametrize("kind", ["masked_next_sentence", "masked_sentence_order"])
def test_loss_and_every_gradient_are_those_of_transformers_bert(kind):
    """Point by point what BertForPreTraining computes from input_ids, labels and next_sentence_label."""
    aim, batch, model = objective(kind), batch_of(kind), bert(kind)
    inputs = on_device(aim.inputs(batch), CPU)
    assert (batch.labels == NO_LABEL).any() and {0, 1} <= set(batch.labels.tolist()), "rows of all kinds"
    labels = torch.full_like(inputs["tokens"], -100)
    row, place = (inputs["weights"] > 0).nonzero(as_tuple=True)
    labels[row, inputs["slots"][row, place]] = inputs["targets"][row, place]
    reference = bert_of(model)
    expected = reference(
        input_ids=inputs["tokens"],
        attention_mask=(inputs["segments"] == 0).long(),
        token_type_ids=inputs["types"],
        labels=labels,
        next_sentence_label=torch.from_numpy(np.where(batch.labels == NO_LABEL, -100, batch.labels)).long(),
    )
    loss = aim.loss(model, inputs, aim.targets(aim.inputs(batch)))
    torch.testing.assert_close(loss.total, expected.loss, atol=1e-5, rtol=1e-5)

    loss.total.backward()
    expected.loss.backward()
    gradients = to_reference({n: p.grad for n, p in model.named_parameters()}, model.config)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "kind", ["causal", "masked", "masked_next_sentence", "masked_sentence_order", "mixed"]
)
@pytest.mark.parametrize(("workers", "micro_rows"), [(1, 8), (2, 2), (4, 1)])
def test_loss_and_gradient_of_the_global_batch_do_not_depend_on_how_it_is_split(kind, workers, micro_rows):
    """Law L1 for losses: the number of targets differs from row to row, the mean is over all of them."""
    aim, batch = objective(kind), batch_of(kind)
    results = []
    for shares, rows in (([np.arange(8)], 8), (np.array_split(np.arange(8)[::-1], workers), micro_rows)):
        model = bert(kind) if ObjectiveConfig(kind=kind).is_encoder else decoder()
        inputs = [aim.inputs(batch[share]) for share in shares]
        counts = np.sum([aim.targets(each) for each in inputs], axis=0).tolist()
        total, sums = 0.0, torch.zeros(len(counts))
        for each in inputs:
            for micro in micro_batches(on_device(each, CPU), rows):
                loss = aim.loss(model, micro, counts)
                loss.total.backward()
                total, sums = total + loss.total.item(), sums + loss.sums_K
        means = [
            term.share * nats / n for term, nats, n in zip(aim.terms, sums.tolist(), counts, strict=True)
        ]
        assert total == pytest.approx(sum(means), rel=1e-5)
        results.append((total, counts, [p.grad for p in model.parameters()]))
    (whole, counts, gradients), (parts, same_counts, others) = results
    assert whole == pytest.approx(parts, rel=1e-5) and counts == same_counts
    for ours, theirs in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["masked", "masked_next_sentence", "mixed"])
def test_rows_that_only_fill_up_count_for_nothing(kind):
    aim, batch = objective(kind), batch_of(kind)
    filler = Batch(np.zeros_like(batch.tokens), batch.labels * 0 - 1, batch.weights * 0, batch.rows)
    both = Batch(
        *(
            np.concatenate([getattr(each, name) for each in (batch, filler)])
            for name in ("tokens", "labels", "weights")
        ),
        Rows.join([batch.rows, Rows(*(column * 0 - 1 for column in filler.rows.columns()))]),
    )
    model = bert(kind) if ObjectiveConfig(kind=kind).is_encoder else decoder()
    counts = aim.targets(aim.inputs(batch))
    assert aim.targets(aim.inputs(both)) == counts
    alone, filled = (aim.loss(model, on_device(aim.inputs(each), CPU), counts) for each in (batch, both))
    torch.testing.assert_close(alone.sums_K, filled.sums_K, atol=1e-3, rtol=1e-5)
    assert filled.total.isfinite()


def decoder(**changes):
    return build(ModelConfig(**SMALL | {"vocab_size": tokenizer().vocab_size} | changes), seed=2)


def test_mixed_rows_are_those_of_a_causal_and_of_a_bidirectional_model_with_the_same_weights():
    aim, batch = objective("mixed", masked_share=0.4), batch_of("mixed")
    arrays = aim.inputs(batch)
    sees_all = arrays["sees_all"]
    assert 0 < sees_all.sum() < len(sees_all)
    loss = aim.loss(decoder(), on_device(arrays, CPU), aim.targets(arrays))

    causal_rows = torch.from_numpy(batch.tokens[~sees_all].astype(np.int64))
    causal = causal_lm(decoder(), causal_rows, torch.ones(len(causal_rows)), boundary_id=0)
    encoder = decoder(attention="bidirectional")
    scores = encoder.logits(encoder(torch.from_numpy(arrays["tokens"][sees_all]))).log_softmax(-1)
    original = torch.from_numpy(batch.tokens[sees_all].astype(np.int64))
    # Every hidden token by comparison with the original, but those that were left in sight.
    hidden = torch.from_numpy(arrays["weights"][sees_all] > 0)
    nats = -scores.gather(2, original[:, 1:, None])[:, :, 0][hidden]
    by_hand = 0.6 * causal.total / causal.num_targets + 0.4 * nats.mean()
    torch.testing.assert_close(loss.total, by_hand, atol=1e-4, rtol=1e-5)
    changed = torch.from_numpy(arrays["tokens"][sees_all])[:, 1:] != original[:, 1:-1]
    assert changed.any() and not (changed & ~hidden[:, :-1]).any(), (
        "what was changed is a target one place before"
    )


def test_the_share_of_masked_rows_is_the_configured_one():
    aim, number = objective("mixed", masked_share=0.3), np.arange(4_000)
    rows = Rows(number * 0, number * 0, number, number * 0, number * 0)
    tokens = np.resize(batch_of("mixed").tokens, (4_000, SEQ_LEN + 1))
    batch = Batch(tokens, np.full(4_000, NO_LABEL, np.int8), np.ones(4_000, np.float32), rows)
    assert aim.inputs(batch)["sees_all"].mean() == pytest.approx(0.3, abs=0.022)  # three standard deviations


@pytest.mark.parametrize("kind", ["masked", "masked_next_sentence"])
def test_measured_nats_and_hits_are_those_by_hand(kind):
    aim, batch, model = objective(kind), batch_of(kind), bert(kind)
    with torch.no_grad():
        found = aim.measure(model, batch, CPU)
        inputs = on_device(aim.evaluation_inputs(batch), CPU)
        hidden = model(inputs["tokens"], inputs.get("segments"), types_BT=inputs.get("types"))
        logits = model.logits(hidden)
    nats = hits = 0.0
    for row, place in (inputs["weights"] > 0).nonzero().tolist():
        scores, target = logits[row, inputs["slots"][row, place]], inputs["targets"][row, place]
        nats += F.cross_entropy(scores, target).item()
        hits += float(scores.argmax() == target)
    assert found[0].tolist() == pytest.approx([nats, inputs["weights"].sum().item(), hits], rel=1e-4)
    if kind == "masked_next_sentence":
        labelled = batch.labels != NO_LABEL
        expected = model.pair_logits(hidden)[labelled].argmax(-1).numpy() == batch.labels[labelled]
        assert found[1, 1:].tolist() == [labelled.sum(), expected.sum()]


def test_evaluation_masks_do_not_depend_on_the_seed_and_training_masks_do():
    batch = batch_of("masked")
    first, second = (objective("masked", seed=seed) for seed in (0, 1))
    assert np.array_equal(first.evaluation_inputs(batch)["tokens"], second.evaluation_inputs(batch)["tokens"])
    assert not np.array_equal(first.inputs(batch)["tokens"], second.inputs(batch)["tokens"])


def test_the_causal_loss_is_to_the_bit_that_of_causal_lm():
    batch, model = batch_of("causal"), decoder()
    rows = torch.from_numpy(batch.tokens.astype(np.int64))
    expected = causal_lm(model, rows, torch.ones(len(rows)), boundary_id=0).total / (8 * SEQ_LEN)
    aim = Causal(boundary_id=0, document_mask=False)
    loss = aim.loss(model, on_device(aim.inputs(batch), CPU), aim.global_targets(8, SEQ_LEN))
    assert torch.equal(loss.total, expected) and aim.targets(aim.inputs(batch)) == [8 * SEQ_LEN]


def test_a_causal_evaluation_looks_at_plain_rows_and_a_mixed_one_at_both_kinds():
    batch, model = batch_of("mixed"), decoder()
    weights = np.ones((8, SEQ_LEN), np.float32)
    weights[3, 20:] = 0
    padded = Batch(batch.tokens.copy(), batch.labels, weights, batch.rows)
    padded.tokens[3, 21:] = tokenizer().boundary_id
    with torch.no_grad():
        causal, masked = objective("mixed").measure(model, padded, CPU)
        alone = Causal(tokenizer().boundary_id, False).measure(model, padded, CPU)[0]
        changed = Batch(padded.tokens.copy(), batch.labels, weights, batch.rows)
        ids = Tokenizer.from_str(tokenizer().json)
        changed.tokens[3, 30:] = ids.token_to_id("[PAD]")
        again = objective("mixed").measure(model, changed, CPU)[1]
    assert np.array_equal(causal, alone, equal_nan=True) and causal[1] == weights.sum()
    assert masked.tolist() == pytest.approx(again.tolist()), "padding is not seen"
    assert 0 < masked[1] < 0.2 * weights.sum()


@pytest.mark.parametrize(
    ("wrong", "keys"),
    [
        ({"mask_rate": 0.0}, ["objective.mask_rate=0.0", "nothing would be learnt"]),
        ({"mask_rate": 1.0}, ["objective.mask_rate=1.0", "nothing would be left"]),
        ({"masked_share": 1.0}, ["objective.masked_share=1.0"]),
        ({"random_share": 0.7, "keep_share": 0.7}, ["random_share=0.7", "keep_share=0.7"]),
    ],
)
def test_every_impossible_rate_is_named(wrong, keys):
    [problem] = ObjectiveConfig(kind="masked", **wrong).problems("objective")
    assert all(key in problem for key in keys), problem


def test_a_tokenizer_without_mask_is_named():
    serialised = tokenizer().json.replace("[MASK]", "[XXXX]").encode()
    with pytest.raises(ValueError, match=r"objective.kind=masked needs a tokenizer with \[MASK\]"):
        objective_of(ObjectiveConfig(kind="masked"), serialised, boundary_id=0, document_mask=False)


def test_kinds_that_hide_tokens_frame_their_rows():
    kinds = {kind: ObjectiveConfig(kind=kind, seed=5).framing for kind in ("causal", "masked", "mixed")}
    assert kinds == {"causal": None, "masked": FramingConfig("single", 5), "mixed": None}


def test_under_a_document_mask_a_pair_is_judged_by_the_document_that_its_texts_meet_in():
    fixed, batch = tokenizer(), batch_of("masked_next_sentence", 40)
    config = ObjectiveConfig(kind="masked_next_sentence")
    ids = special_ids(fixed.json.encode())
    aim = objective_of(config, fixed.json.encode(), boundary_id=fixed.boundary_id, document_mask=True)
    seen = 0
    for tokens, segments, label in zip(
        batch.tokens, aim.inputs(batch)["segments"], batch.labels, strict=True
    ):
        seam = int((tokens == ids.sep).argmax())
        bounds = np.flatnonzero(tokens == fixed.boundary_id)
        if label != NO_LABEL:
            seen += len(bounds)
            assert segments[0] == segments[seam] == segments[seam + 1]
            assert all(segments[bound] != segments[seam] for bound in bounds if bound > seam)
            assert all(segments[bound - 1] != segments[seam] for bound in bounds if 1 < bound < seam)
        assert all(segments[bound] != segments[bound - 1] for bound in bounds if bound > 1)
    assert seen
