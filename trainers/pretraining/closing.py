"""Files that are made of a finished run: the n-gram floor that it is compared with, and samples; and when that was."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import psutil

from cluster.configuration.stored_file import read_json
from cluster.storage.uris import Store, open_store
from data.order.permutation import permute
from data.shards.manifest import Manifest
from data.shards.shards import read_fragment
from data.tokens.ngram import MAX_ORDER, NGram, fit
from data.tokens.tokenizer import read_tokenizer
from data.tokens.tokenizer_file import parse_tokenizer
from trainers.evaluation.verdict import EXPORT
from trainers.exported.folder import load_exported
from trainers.exported.sampling import SamplingConfig, complete, room_after
from trainers.pretraining.config import PretrainConfig
from trainers.recovery.clock import RunClock
from trainers.reporting.results import CONCLUDED, read_conclusions
from trainers.stored.metric_records import MERGED
from trainers.stored.run_files import MADE_ANEW, Interval, Sample

FLOOR, SAMPLES = "floor.json", "samples.json"
TOO_LONG = " … (the prompt alone fills the model's positions: shorten it in run.prompts)"
UNCHOSEN_ORDER = 6
"""Of the floor where no validation split can choose one."""
# What the floor is scored on at most: scoring all orders takes 1.3 s a MB.
FLOOR_SCORED_BYTES = 4_000_000


class Conclusion:
    """Notes down from when to when this driver lived, once nothing is left to train; kept as `concluded.json`.

    A run that was concluded before has its accounts closed, whoever makes its report again.
    """

    def __init__(self, run: Store) -> None:
        self._run, self._clock = run, RunClock(run)
        self._is_over = run.exists(MERGED)
        self._before = [] if self._is_over else read_conclusions(run)

    def note(self) -> None:
        """What was concluded so far is in the accounts, whatever comes."""
        if not self._is_over:
            all_of_them = [*self._before, Interval(self._clock.started, self._clock.now())]
            self._run.put(CONCLUDED, json.dumps(all_of_them, allow_nan=False).encode())


def write_floor(run: Store, config: PretrainConfig, manifest: Manifest) -> None:
    """Fit byte n-grams on the training split and score the best order on the others; kept as `floor.json`.

    The order is the one of 1 to 8 that takes the fewest bits on the validation split; the test split is read after
    that, by this order alone.

    As the model's, its bits per byte are the bits that it takes to say what the tokens say over the bytes of the
    original text (normalised, in UTF-8). A tokenizer that loses something, as WordPiece loses unknown words and the
    number of blanks, spares both the same: the n-gram predicts the text that is decoded from the tokens, with [UNK]
    for each unknown word. Of byte-level BPE that is the original text. The model predicts the boundaries between
    documents too; to the n-gram they join without any.

    The order of reading is a fixed permutation, so that a bounded part of a large split is a fair sample of it.
    """
    if config.run.floor_bytes == 0 or run.exists(FLOOR) or config.objective.is_encoder:
        return  # an encoder has no bits per byte to compare
    corpus = open_store(config.corpus.prepared)
    train = (text for text, _ in _texts(corpus, manifest, "train"))
    model = fit(train, MAX_ORDER, config.run.floor_bytes)

    def scores(split: str, model: NGram) -> list[float]:
        return _bits_per_byte(model, _first(_texts(corpus, manifest, split), FLOOR_SCORED_BYTES))

    floor: dict[str, Any] = {"smoothing": "modified Kneser-Ney", "fitted_bytes": model.num_bytes}
    order = UNCHOSEN_ORDER
    if len(manifest.select("validation")):
        floor["validation_by_order"] = by_order = scores("validation", model)
        order = 1 + int(np.argmin(by_order))
        floor["validation"] = by_order[order - 1]
    if len(manifest.select("test")):
        floor["test"] = scores("test", model.of_order(order))[-1]
    floor["order"] = order
    run.put(FLOOR, json.dumps(floor, indent=2, allow_nan=False).encode())


def write_samples(run: Store, config: PretrainConfig) -> list[dict[str, Any]]:
    """Let the exported model continue the prompts of the configuration; kept as `samples.json`. An encoder
    continues nothing, and a model too large for this host's memory is left alone."""
    if run.exists(SAMPLES):
        return read_json(run, SAMPLES, list[Sample], MADE_ANEW)
    if config.objective.is_encoder or not fits_here(run.child(EXPORT)):
        return []
    exported = load_exported(run.child(EXPORT))
    samples: list[dict[str, Any]] = []
    for seed, prompt in enumerate(config.run.prompts):
        room = room_after(prompt, exported)
        if room < 1:
            samples.append({"prompt": prompt, "continuation": TOO_LONG, "settings": None})
            continue
        settings = SamplingConfig(max_new_tokens=min(100, room), temperature=0.8, top_p=0.95, seed=seed)
        [completion] = complete(exported, [prompt], settings)
        samples.append({"prompt": prompt, "continuation": completion.text, "settings": asdict(settings)})
    run.put(SAMPLES, json.dumps(samples, indent=2, ensure_ascii=False, allow_nan=False).encode())
    return samples


def fits_here(export: Store) -> bool:
    """Whether a model can be loaded, of which the bytes and the tensors are held at once."""
    num_bytes = sum(info.num_bytes for info in export.list() if info.path.endswith(".safetensors"))
    return 2 * num_bytes < psutil.virtual_memory().available


def _bits_per_byte(model: NGram, texts: Iterator[tuple[bytes, float]]) -> list[float]:
    """Of each order, from 1 to the model's."""
    bits, num_bytes = np.zeros(model.order), 0.0
    for text, of_original in texts:
        bits += model.bits_by_order([text])
        num_bytes += of_original
    return [float(found) for found in bits / num_bytes]


def _texts(corpus: Store, manifest: Manifest, split: str) -> Iterator[tuple[bytes, float]]:
    """Of each fragment of a split the text that its tokens determine, and the bytes of the original."""
    tokenizer = parse_tokenizer(read_tokenizer(corpus, manifest.tokenizer), "the corpus's tokenizer.json")
    fragments = manifest.select(split)
    for fragment in fragments[permute(np.arange(len(fragments)), len(fragments), key=0)]:
        tokens = read_fragment(corpus, manifest, int(fragment))
        # Special tokens beside the boundary are unknown words: text never yields another.
        spoken = tokens[tokens != manifest.boundary_id].tolist()
        text = tokenizer.decode(spoken, skip_special_tokens=False).encode()
        yield text, float(manifest.fragments.num_bytes[fragment])


def _first(texts: Iterator[tuple[bytes, float]], num_bytes: int) -> Iterator[tuple[bytes, float]]:
    """Texts up to so many bytes; of one that is cut, the original's bytes are cut in proportion."""
    for text, of_original in texts:
        if len(text) > num_bytes:
            yield text[:num_bytes], of_original * num_bytes / len(text)
            return
        yield text, of_original
        num_bytes -= len(text)
