"""Labelled texts as queries and documents: a positive is another text of the label, a negative a text of another label.

Both are drawn from the text's own file, as a pure function of random numbers. Letters: L labelled texts, n of them in a
batch, K negatives of each.
"""

from dataclasses import dataclass

import numpy as np

from ds_embed.data.order import mix


@dataclass(frozen=True)
class LabelledTexts:
    """The labelled texts by file and label; all arrays but by_label are in the order of the records."""

    records: np.ndarray  # (L,) ascending
    by_label: np.ndarray  # (L,) records, with those of each label together
    place: np.ndarray  # (L,) index of each in by_label
    keys: np.ndarray  # (L,) key of its file and label, never 0
    of_label: tuple[np.ndarray, np.ndarray]  # (L,) first index in by_label and number of the texts with its label
    of_file: tuple[np.ndarray, np.ndarray]  # (L,) the same for its file

    @classmethod
    def of(cls, records: np.ndarray, files: np.ndarray, labels: np.ndarray) -> "LabelledTexts":
        keys = (mix(labels.view(np.uint64)) ^ mix(files.astype(np.uint64) + np.uint64(1))).view(np.int64) | 1
        order = np.lexsort((keys, files))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return cls(records, records[order], place, keys, _spans(keys, place), _spans(files, place))

    def keys_of(self, records: np.ndarray) -> np.ndarray:
        """The key of file and label of each record; `records` may have any shape."""
        return self.keys[np.searchsorted(self.records, records)]

    def draw(self, records: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A positive (n,) and K negatives (n, K), as records, for records (n,), given random numbers (n, 1 + K)."""
        chosen = np.searchsorted(self.records, records)
        place = self.place[chosen]
        first, number = (values[chosen] for values in self.of_label)
        positive = first + _below(draws[:, 0], number - 1)
        positive += positive >= place  # not itself
        file_first, file_number = (values[chosen][:, None] for values in self.of_file)
        negatives = file_first + _below(draws[:, 1:], file_number - number[:, None])
        negatives += number[:, None] * (negatives >= first[:, None])  # not its label
        return self.by_label[positive], self.by_label[negatives]


def _below(draws: np.ndarray, bound: np.ndarray) -> np.ndarray:
    return (draws % bound.astype(np.uint64)).astype(np.int64)


def _spans(values: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each value: the lowest `place` of the values equal to it, and their number."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.full(len(counts), len(values))
    np.minimum.at(first, group, place)
    return first[group], counts[group]
