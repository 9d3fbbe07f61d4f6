"""What was done with records: written, refused, or left out on request, counted by reason with the first places."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from ds_embed.data.files import BadRecord

T = TypeVar("T")
_PLACES_SHOWN = 3


class SkippedRecords:
    """What was left out so far; `add` takes the error that the record would have been."""

    def __init__(self) -> None:
        self._reasons: dict[str, dict[str, Any]] = {}

    def add(self, error: BadRecord) -> None:
        entry = self._reasons.setdefault(_reason(error.problem), {"number": 0, "first": []})
        entry["number"] += 1
        if len(entry["first"]) < _PLACES_SHOWN:
            entry["first"].append(error.where)

    def describe(self) -> dict[str, dict[str, Any]]:
        """{reason: {"number": records, "first": [places]}}, the commonest reason first; JSON can hold it."""
        return dict(sorted(self._reasons.items(), key=lambda item: -item[1]["number"]))


def describe_skipped(reasons: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each reason of SkippedRecords.describe."""
    return [
        f"{entry['number']:,} skipped: {reason} (at {', '.join(entry['first'])}"
        + (", ...)" if entry["number"] > len(entry["first"]) else ")")
        for reason, entry in reasons.items()
    ]


def _reason(problem: str) -> str:
    """What is wrong, without what differs from record to record: places, ids, counts, details, the cure."""
    without_names = re.sub(r"\[\d+\]| '.*?'", "", problem)
    head = re.split(r"[;,(]| than at | at ", without_names)[0].strip()
    return re.sub(r"\b\d+(?= )", "N", head)


class Tally:
    """Counts by name, in the order of their first use, and what was skipped by reason and place."""

    def __init__(self, *, skip_bad_records: bool = False, skip_unknown: bool = False):
        self._skip_bad_records, self._skip_unknown = skip_bad_records, skip_unknown
        self.counts: dict[str, int] = {}
        self.skipped = SkippedRecords()

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def counted(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, counted as they go by."""
        for item in items:
            self.count(name)
            yield item

    def refuse(self, error: BadRecord) -> None:
        """A record that can't be used: raised, or counted with --skip_bad_records true."""
        if not self._skip_bad_records:
            raise error
        self.skipped.add(error)

    def refuse_unknown(self, where: str, problem: str) -> None:
        """A record that names an id without a text: raised, or counted with --skip_unknown true."""
        if not self._skip_unknown:
            raise BadRecord(where, f"{problem}; add the text, or set --skip_unknown true")
        self.skipped.add(BadRecord(where, problem))

    def silent(self) -> Tally:
        """One that refuses as this one does and is never shown: for going through the same records again."""
        return Tally(skip_bad_records=self._skip_bad_records, skip_unknown=self._skip_unknown)

    def lines(self) -> list[str]:
        """What to print, a line for each count and each reason."""
        return [f"{number:,} {name}" for name, number in self.counts.items()] + describe_skipped(
            self.skipped.describe()
        )
