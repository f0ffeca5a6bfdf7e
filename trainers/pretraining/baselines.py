"""What counting alone reaches on hidden tokens and pairs: the distribution of single tokens in the training split,
its most frequent token, and the more frequent answer about pairs. On the very rows and masks that judge the model.

Legend: V vocabulary.
"""

import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cluster.storage.uris import Store, open_store
from data.order.permutation import permute
from data.rows.evaluation_rows import evaluation_batches
from data.shards.manifest import Manifest
from data.shards.shards import read_fragment
from data.tokens.tokenizer import read_tokenizer
from trainers.objectives.kinds import objective_of
from trainers.objectives.objective import Inputs, Masks
from trainers.pretraining.config import PretrainConfig, evaluation_framing

BASELINES = "baselines.json"
FITTED_TOKENS = 8_000_000
"""Of the training split, at most: more changes the shares of single tokens little."""
ROWS_PER_BATCH = 32


def write_baselines(run: Store, config: PretrainConfig, manifest: Manifest) -> None:
    """Keep as `baselines.json`, by split, what counting alone reaches; nothing where no token is hidden."""
    if not config.objective.hides_tokens or run.exists(BASELINES):
        return
    corpus = open_store(config.corpus.prepared)
    objective = objective_of(
        config.objective,
        read_tokenizer(corpus, manifest.tokenizer),
        boundary_id=manifest.boundary_id,
        document_mask=config.model.document_mask,
    )
    assert isinstance(objective, Masks)  # `objective_of` has looked
    counts_V = token_counts(corpus, manifest)
    counts_V[objective.masking.special] = 0
    found: dict[str, object] = {"fitted_tokens": int(counts_V.sum())}
    for split, max_rows in (("validation", config.validation.max_rows), ("test", 0)):
        if not len(manifest.select(split)):
            continue
        batches = evaluation_batches(
            manifest,
            corpus,
            split,
            seq_len=config.batch.seq_len,
            rows_per_batch=ROWS_PER_BATCH,
            rank=0,
            world_size=1,
            max_rows=max_rows,
            framing=evaluation_framing(config, manifest),
        )
        inputs = (objective.evaluation_inputs(batch) for batch in batches)
        found[split] = measure(inputs, counts_V, ~objective.masking.special, objective.terms[-1].name)
    run.put(BASELINES, json.dumps(found, indent=2, allow_nan=False).encode())


def token_counts(corpus: Store, manifest: Manifest) -> NDArray[np.int64]:
    """[V]: how often each token stands in the training split, or in a fixed random part of a large one."""
    counts_V, fragments = np.zeros(manifest.vocab_size, np.int64), manifest.select("train")
    for fragment in fragments[permute(np.arange(len(fragments)), len(fragments), key=0)]:
        counts_V += np.bincount(read_fragment(corpus, manifest, int(fragment)), minlength=len(counts_V))
        if counts_V.sum() >= FITTED_TOKENS:
            break
    return counts_V


def measure(
    inputs: Iterable[Inputs], counts_V: NDArray[np.int64], usual_V: NDArray[np.bool_], pairs: str
) -> dict[str, float]:
    """Loss of the tokens' distribution (one added to the count of every usual token), accuracy of the most frequent
    one, and share of the more frequent label of `pairs`, if there are labels.
    """
    smoothed_V = counts_V + usual_V
    nats_V = np.log(smoothed_V.sum()) - np.log(np.maximum(smoothed_V, 1))
    most_frequent, nats, hits, targets = int(counts_V.argmax()), 0.0, 0.0, 0.0
    labels = np.zeros(2)
    for each in inputs:
        weights = each["weights"]
        nats += float((nats_V[each["targets"]] * weights).sum())
        hits += float(((each["targets"] == most_frequent) * weights).sum())
        targets += float(weights.sum())
        if "labels" in each:
            labels += np.bincount(each["labels"], each["label_weights"], minlength=2)
    found = {"masked_loss": nats / targets, "masked_accuracy": hits / targets} if targets else {}
    return found | ({f"{pairs}_accuracy": labels.max() / labels.sum()} if labels.any() else {})
