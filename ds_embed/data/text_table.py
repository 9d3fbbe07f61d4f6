"""Texts by id in a temporary file, for random access and checks of repeats in constant memory."""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from pathlib import Path

from ds_embed.data.files import BadRecord

_CACHE_KIB = 64 << 10


class TextTable:
    """{id: text} on disk. The file is in `folder`, has no name, and disappears when the process ends.

    `what` names the ids in errors. With `keep_texts` False only digests of the texts are kept, to tell repeats from
    conflicts. Use it as a context manager.
    """

    def __init__(self, folder: Path, what: str, *, keep_texts: bool = True):
        self._what = what
        self._keep_texts = keep_texts
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".texts-") as file:
            self._database = sqlite3.connect(file.name, isolation_level=None)
            # Nothing here outlives the process, so no journal is needed.
            self._database.execute("PRAGMA journal_mode = OFF")
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self._database.execute("CREATE TABLE texts (id TEXT PRIMARY KEY, text BLOB, place TEXT) WITHOUT ROWID")
            self._database.execute("BEGIN")

    def __enter__(self) -> TextTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, name: str, text: str, where: str) -> bool:
        """Add a text and return whether its id is new. BadRecord with both locations if the id has another text."""
        stored = text if self._keep_texts else hashlib.blake2b(text.encode(), digest_size=16).digest()
        row = name, stored, where
        if self._database.execute("INSERT OR IGNORE INTO texts VALUES (?, ?, ?)", row).rowcount:
            return True
        before, place = self._database.execute("SELECT text, place FROM texts WHERE id = ?", (name,)).fetchone()
        if before != stored:
            raise BadRecord(
                where, f"{self._what} '{name}' stands with another text at {place}; give each text its own id"
            )
        return False

    def __contains__(self, name: str) -> bool:
        return self._database.execute("SELECT 1 FROM texts WHERE id = ?", (name,)).fetchone() is not None

    def get(self, name: str) -> str | None:
        assert self._keep_texts
        row = self._database.execute("SELECT text FROM texts WHERE id = ?", (name,)).fetchone()
        return None if row is None else row[0]
