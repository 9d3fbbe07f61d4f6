"""Which records a step sees: a pure function of (seed, position in the data), with nothing to store.

Sample number g of a run is record p(g mod R) of epoch g // R, where p is a permutation of the R
records keyed by seed and epoch. It is computed record by record (a Feistel network on the smallest
even number of bits that holds R, walked until it lands below R: Black and Rogaway 2002), so ten
million records need no shuffled list in memory.
"""

import numpy as np

_ROUNDS = 6


def sample_records(seed: int, num_records: int, first_sample: int, num_samples: int) -> np.ndarray:
    """Record numbers (num_samples,) of samples first_sample, first_sample + 1, ... of a run."""
    samples = np.arange(first_sample, first_sample + num_samples, dtype=np.int64)
    epochs, positions = np.divmod(samples, num_records)
    records = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        records[chosen] = _permute(positions[chosen].astype(np.uint64), num_records, seed, int(epoch))
    return records


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers so that any change of input changes half the output bits.

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
