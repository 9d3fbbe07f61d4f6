"""Which records a step sees: a pure function of (seed, position in the data), so nothing needs to be stored.

Every source (a file, or all of them as one) is a stream: its sample number i is record p(i mod R) of epoch i // R,
where p is a permutation of its R records keyed by seed, source and epoch. It is computed record by record (a Feistel
network on the smallest even number of bits that can represent R, applied repeatedly until the result is below R: Black
and Rogaway 2002), so ten million records need no shuffled list in memory.

With several sources, sample g of the run is sample c_f(g) of the stream of source f(g), where c_f(g) counts the earlier
samples from that source. Both have a closed form. Of the first g samples, floor(g p + u) come from the first source,
where p is its probability and u a phase derived from the seed; the remaining samples are renumbered and divided among
the other sources in the same way. So every range of samples contains each source in proportion, to within one sample
per source, and nothing needs to be replayed.

A clustered stream has another permutation, which puts records that share documents next to each other, so that a batch
has fewer distinct texts. The records of one positive document form a group. Its position in a pass is the minimum of
the scrambled keys of all its documents, including hard negatives, so the more documents two groups share, the more
likely they get the same position (MinHash, Broder 1997). Each pass scrambles the keys anew. The sort, once per pass,
takes 8 bytes per text temporarily and 8 per record permanently.

Shapes: F sources, R records of a source, n samples.
"""

from dataclasses import dataclass, field

import numpy as np

_ROUNDS = 6
# Probabilities are multiples of 2**-30, so products with sample numbers up to 2**33 are exact in 64 bits.
_PROBABILITY_BITS = np.uint64(30)


@dataclass(frozen=True)
class SampleOrder:
    """The order of a run's samples.

    probabilities (F,): the sources' shares of the samples, or None for one stream over all records.
    batch_size: queries of a global batch where each batch has one source (homogeneous), else None.
    rows (G + 1,): where one record of each row is drawn in every pass: row g has records rows[g] to rows[g + 1] - 1,
        and source_sizes count rows. None where every record is a sample.
    documents: first_text (R + 1,) and text_keys of a training store, where the streams are clustered, else None.
    """

    seed: int
    source_sizes: tuple[int, ...]  # (F,) records; the store holds one source after the other
    probabilities: tuple[float, ...] | None = None
    batch_size: int | None = None
    rows: np.ndarray | None = field(default=None, compare=False)
    documents: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False)
    _passes: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @property
    def samples_per_pass(self) -> int:
        return sum(self.source_sizes)

    def records(self, first_sample: int, num_samples: int) -> np.ndarray:
        """Record numbers (n,) of samples first_sample, first_sample + 1, ... of the run."""
        chosen = self._chosen(first_sample, num_samples)
        if self.rows is None:
            return chosen
        samples = np.arange(first_sample, first_sample + num_samples, dtype=np.uint64)
        first, counts = self.rows[chosen], self.rows[chosen + 1] - self.rows[chosen]
        return first + (mix(samples ^ key_of(self.seed, 5)) % counts.astype(np.uint64)).astype(np.int64)

    def _chosen(self, first_sample: int, num_samples: int) -> np.ndarray:
        if self.probabilities is None:
            samples = np.arange(first_sample, first_sample + num_samples, dtype=np.int64)
            return self._stream(self.seed, 0, sum(self.source_sizes), samples)
        sources, places = self.places(first_sample, num_samples)
        records = np.empty_like(places)
        starts = np.cumsum([0, *self.source_sizes])
        for source, size in enumerate(self.source_sizes):
            chosen = sources == source
            seed = int(key_of(self.seed, 2, source))
            records[chosen] = self._stream(seed, int(starts[source]), size, places[chosen])
        return records

    def _stream(self, seed: int, first_record: int, num_records: int, samples: np.ndarray) -> np.ndarray:
        """Record numbers (n,) of samples (n,) of the stream over num_records records starting at first_record."""
        if self.documents is None:
            return first_record + stream_records(seed, num_records, samples)
        passes, positions = np.divmod(samples, num_records)
        records = np.empty_like(positions)
        for number in np.unique(passes).tolist():
            name = first_record, number
            if name not in self._passes:
                for old in [old for old in self._passes if old[0] == first_record][:-1]:
                    del self._passes[old]  # a batch spans at most two passes
                self._passes[name] = _clustered(*self.documents, first_record, num_records, key_of(seed, number, 6))
            chosen = passes == number
            records[chosen] = first_record + self._passes[name][positions[chosen]]
        return records

    def places(self, first_sample: int, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Source (n,) of each sample, and its number (n,) in the source's stream."""
        samples = np.arange(first_sample, first_sample + num_samples, dtype=np.uint64)
        if self.batch_size is None:
            return self._share_out(samples)
        batches, offsets = np.divmod(samples, np.uint64(self.batch_size))
        sources, places = self._share_out(batches)
        return sources, places * self.batch_size + offsets.astype(np.int64)

    def _share_out(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source (n,) of each of these samples (or batches), and how many earlier ones have the same source."""
        sources = np.full(len(numbers), len(self.source_sizes) - 1)
        counts = np.empty(len(numbers), dtype=np.int64)
        rest = np.arange(len(numbers))  # those not assigned to a source yet
        numbers, left = numbers.copy(), 1.0
        for source, probability in enumerate(self.probabilities[:-1]):
            share = np.uint64(round(2 ** int(_PROBABILITY_BITS) * min(1.0, probability / left)))
            phase = key_of(self.seed, 3, source) >> (np.uint64(64) - _PROBABILITY_BITS)
            before = (numbers * share + phase) >> _PROBABILITY_BITS
            mine = ((numbers + np.uint64(1)) * share + phase) >> _PROBABILITY_BITS > before
            sources[rest[mine]] = source
            counts[rest[mine]] = before[mine]
            rest, numbers = rest[~mine], (numbers - before)[~mine]
            left -= probability
        counts[rest] = numbers
        return sources, counts


def sample_records(seed: int, num_records: int, first_sample: int, num_samples: int) -> np.ndarray:
    """Record numbers (num_samples,) of samples first_sample, first_sample + 1, ... of one stream."""
    return stream_records(seed, num_records, np.arange(first_sample, first_sample + num_samples, dtype=np.int64))


def stream_records(seed: int, num_records: int, samples: np.ndarray) -> np.ndarray:
    """Record numbers (n,) of the given sample numbers (n,) of one stream."""
    epochs, positions = np.divmod(samples, num_records)
    records = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        records[chosen] = _permute(positions[chosen].astype(np.uint64), num_records, seed, int(epoch))
    return records


def _clustered(
    first_text: np.ndarray, text_keys: np.ndarray, first_record: int, num_records: int, key: np.uint64
) -> np.ndarray:
    """The records (R,), counted from first_record, in the order of a pass, with those that share documents together."""
    first = np.asarray(first_text[first_record : first_record + num_records + 1])
    keys, queries = np.asarray(text_keys[first[0] : first[-1]]), first[:-1] - first[0]
    last = np.iinfo(np.uint64).max
    scrambled = mix(keys.view(np.uint64) ^ key)
    scrambled[queries] = last
    positives, group = np.unique(keys[queries + 1], return_inverse=True)
    place = np.full(len(positives), last)
    np.minimum.at(place, group, np.minimum.reduceat(scrambled, queries))
    return np.lexsort((mix(np.arange(num_records, dtype=np.uint64) ^ key), group, place[group]))


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers so that any change of the input changes about half of the output bits.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    values = np.asarray(values, dtype=np.uint64)
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(*parts: int) -> np.uint64:
    """One 64-bit key from several integers."""
    key = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix(key + np.uint64(part % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return key


def _permute(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    half = max(1, -(-max(1, (size - 1).bit_length()) // 2))
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    round_keys = [key_of(seed, epoch, i) for i in range(_ROUNDS)]
    values, outside = positions.copy(), np.ones(len(positions), dtype=bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        values[outside] = (left << shift) | right
        outside = values >= size
    return values.astype(np.int64)
