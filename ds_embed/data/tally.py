"""Counts of records: written, refused, or skipped on request, by reason and with the first locations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ds_embed.data.files import BadRecord

T = TypeVar("T")
_PLACES_SHOWN = 3


class SkippedRecords:
    """The records skipped so far; `add` takes the error that each would have raised."""

    def __init__(self) -> None:
        self._reasons: dict[str, dict[str, Any]] = {}

    def add(self, error: BadRecord) -> None:
        entry = self._reasons.setdefault(_reason(error.problem), {"number": 0, "first": []})
        entry["number"] += 1
        if len(entry["first"]) < _PLACES_SHOWN:
            entry["first"].append(error.where)

    def describe(self) -> dict[str, dict[str, Any]]:
        """{reason: {"number": records, "first": [locations]}}, the most common reason first, as JSON content."""
        return dict(sorted(self._reasons.items(), key=lambda item: -item[1]["number"]))


def describe_skipped(reasons: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each reason of SkippedRecords.describe."""
    return [
        f"{entry['number']:,} skipped: {reason} (at {', '.join(entry['first'])}"
        + (", ...)" if entry["number"] > len(entry["first"]) else ")")
        for reason, entry in reasons.items()
    ]


def _reason(problem: str) -> str:
    """The problem without what differs between records: locations, ids, counts, details and the cure."""
    without_names = re.sub(r"\[\d+\]| '.*?'", "", problem)
    head = re.split(r"[;,(]| than at | at ", without_names)[0].strip()
    return re.sub(r"\b\d+(?= )", "N", head)


class Tally:
    """Counts by name, in the order of their first use, and skipped records by reason and location."""

    def __init__(self, *, skip_bad_records: bool = False, skip_unknown: bool = False):
        self._skip_bad_records, self._skip_unknown = skip_bad_records, skip_unknown
        self.counts: dict[str, int] = {}
        self._told: list[str] = []
        self.skipped = SkippedRecords()

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def tell(self, lines: list[str]) -> None:
        """Keep lines for the user, which come before the counts."""
        self._told += lines

    def counted(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, counting them."""
        for item in items:
            self.count(name)
            yield item

    def refuse(self, error: BadRecord) -> None:
        """Raise the error of an unusable record, or count it with --skip_bad_records true."""
        if not self._skip_bad_records:
            raise error
        self.skipped.add(error)

    def refuse_unknown(self, where: str, problem: str) -> None:
        """Raise an error for a record that names an id without a text, or count it with --skip_unknown true."""
        if not self._skip_unknown:
            raise BadRecord(where, f"{problem}; add the text, or set --skip_unknown true")
        self.skipped.add(BadRecord(where, problem))

    def silent(self) -> Tally:
        """A copy with the same settings that is never shown, for reading the same records again."""
        return Tally(skip_bad_records=self._skip_bad_records, skip_unknown=self._skip_unknown)

    def lines(self) -> list[str]:
        """Lines to print, for the files that were read, for each count and each reason."""
        counts = [f"{number:,} {name}" for name, number in self.counts.items()]
        return self._told + counts + describe_skipped(self.skipped.describe())
