"""What a conversion did with the records it met: written, left out on request, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from ds_embed.data.files import BadRecord
from ds_embed.data.skipping import SkippedRecords, describe_skipped

T = TypeVar("T")


class Tally:
    """Counts by name, in the order of their first use, and what was skipped by reason and place."""

    def __init__(self, *, skip_bad_records: bool = False, skip_unknown: bool = False):
        self._skip_bad_records = skip_bad_records
        self._skip_unknown = skip_unknown
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
