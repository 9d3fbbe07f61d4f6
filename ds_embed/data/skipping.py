"""Records that are left out on request: counted by reason, with the first places of each."""

from __future__ import annotations

import re
from typing import Any

from ds_embed.data.files import BadRecord

_PLACES_SHOWN = 3


class SkippedRecords:
    """What was left out so far; `add` takes the error that the record would have been."""

    def __init__(self):
        self.number = 0
        self._reasons: dict[str, dict[str, Any]] = {}

    def add(self, error: BadRecord) -> None:
        self.number += 1
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
