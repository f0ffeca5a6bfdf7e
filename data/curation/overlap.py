"""Which of some texts stand in a corpus: what is to be tested must not have been read in pretraining."""

from collections import defaultdict
from collections.abc import Sequence

from data.curation.folding import folded
from data.reading.documents import raw_texts

RUN = 32
"""Characters that a text and a document must have in common, one after another, as `data.curation.folding` leaves
them; of a
shorter text all of it. About 8 words: phrases of that length are seldom written twice (Lee et al. 2022, section 4.1,
take 50 tokens). In Shakespeare's plays none of 4,839 texts of sample tasks that are so long is found, and 13 of 1,161
shorter ones, of a word to four (`benchmarks/overlap_rates.py`)."""


def texts_within(texts: Sequence[str], corpus_uri: str) -> set[int]:
    """Indices of the texts that share a run of `RUN` characters, when folded, with a corpus's documents.

    Raises:
        CorpusError: there is no corpus.
    """
    runs = Runs(texts)
    found: set[int] = set()
    for text in raw_texts(corpus_uri):
        found |= runs.found_in(text)
    return found


class Runs:
    """The runs of characters of some texts, to be looked for in documents: each is read once, whatever the number
    of texts. About 250 bytes of memory for each character of the texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._owners: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, text in enumerate(map(folded, texts)):
            length = min(RUN, len(text))
            for run in {text[start : start + length] for start in range(len(text) - length + 1)}:
                if length < RUN or len(set(run)) > 2:  # a line of "=" is no text
                    self._owners[length][run].append(index)

    def found_in(self, document: str) -> set[int]:
        """Indices of the texts that share a run with a document."""
        found: set[int] = set()
        document = folded(document)
        for length, owners in self._owners.items():
            for start in range(len(document) - length + 1):
                found.update(owners.get(document[start : start + length], ()))
        return found
