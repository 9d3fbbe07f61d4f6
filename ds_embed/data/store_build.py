"""Builds token stores in one pass over the records, chunk by chunk, into arrays on disk.

A store's name is a hash of everything that determines its content, so a second build reuses the first.
"""

import bisect
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ds_embed.data.files import BadRecord, Records, format_location
from ds_embed.data.forms import AS_IT_IS, Columns, Reading, RecordFile, TrainingFile
from ds_embed.data.records import (
    QueryRecord,
    TrainingRecord,
    keys_of_document,
    keys_of_query,
    parse_document_record,
    parse_query_record,
)
from ds_embed.data.store_files import FORMAT_VERSION, obtain_store
from ds_embed.data.store_writer import PROMPTED, Progress, StoreWriter
from ds_embed.data.tally import SkippedRecords
from ds_embed.data.tokenize import TextFormat, TextTokenizer, tokenizer_fingerprint
from ds_embed.settings.errors import UserError

# One for all files, or a list with an entry for each; a file's queries may draw from several.
Formats = TextFormat | Sequence[TextFormat | Sequence[TextFormat]]


def build_training_store(
    files: Sequence[str | os.PathLike] | str | os.PathLike,
    tokenizer: Any,
    query_format: Formats,
    document_format: Formats,
    num_negatives: int | None,
    cache_dir: str | os.PathLike,
    progress: Progress | None = None,
    skip_bad_records: bool = False,
    reading: Reading = AS_IT_IS,
) -> Path:
    """Tokenize training records into a store under `cache_dir`, or reuse an existing one.

    Of a file's several query formats, a query takes the one that its text chooses, so that the same query always has the
    same one. At most the first `num_negatives` negatives
    of each record are kept (None: all). `progress` is called with the number of records added since its last call.
    Returns the store's folder; open it with TrainingStore.open. UserError for bad data, with file and line; with
    `skip_bad_records`, bad records are skipped and counted in the manifest, unless a whole file is bad.
    """
    if num_negatives is not None and num_negatives < 0:
        raise UserError(f"num_negatives={num_negatives}; expected 0 or more, or None for all")
    cache_dir = Path(cache_dir).expanduser()
    sources = [_Source(TrainingFile(path, reading, cache_dir)) for path in _listed(files)]
    of_queries = _listed_formats(query_format, len(sources))
    by_file = [one for (one,) in _listed_formats(document_format, len(sources))]
    for source, formats in zip(sources, of_queries):
        source.num_ways = len(formats)
        if len(formats) > 1 and not formats[0].include_prompt:
            raise UserError(f"--query_prefixes: a list for {source.file.path}: {_ONE_PREFIX}; give one")
    # A document behind another prefix is still the same one, as long as it is cut at the same length.
    like_first = [replace(by_file[0], max_length=one.max_length) for one in by_file]
    document_tokenizers = _tokenizers(tokenizer, by_file + like_first, "doc_max_length")
    bare = [replace(one[0], prefix="") for one in of_queries]
    prompted = _tokenizers(tokenizer, bare, "query_max_length")
    most = max(map(len, of_queries))  # every file has as many sides; it draws from its own formats only
    padded = [one[min(number, len(one) - 1)] for one in of_queries for number in range(most)]
    query_tokenizers = _tokenizers(tokenizer, padded, "query_max_length")
    sides = [
        {"queries": query_tokenizers[most * index], "documents": document, PROMPTED: own}
        | {f"queries {number + 1}": query_tokenizers[most * index + number] for number in range(1, most)}
        for index, (document, own) in enumerate(zip(document_tokenizers, prompted))
    ]
    key_sides = [one | {"documents": key} for one, key in zip(sides, document_tokenizers[len(sources) :])]
    settings = {
        "query_format": _described(query_format),
        "document_format": _described(document_format),
        "num_negatives": num_negatives,
        "skip_bad_records": skip_bad_records,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
    }
    if reading != AS_IT_IS:
        settings |= {"columns": list(reading.columns), "kinds": list(reading.kinds)}

    def write(folder: Path) -> None:
        def write_without(conflicts: dict[tuple[int, int], BadRecord]) -> dict[tuple[int, int], BadRecord]:
            skipped = SkippedRecords() if skip_bad_records else None
            with StoreWriter(folder, sides[0], progress, with_ids=False) as writer:
                for index, source in enumerate(sources):
                    bad = {number: error for (file, number), error in conflicts.items() if file == index}
                    for number, record in source.records(writer, sides[index], key_sides[index], skipped, bad):
                        if record.prompt is not None:
                            _count_prompt(writer, record.query, source.where, bare[index])
                        _add_training_record(writer, record, number, source, num_negatives)
                start = _manifest_start("training", settings, sources, sides)
                start |= {"skipped_records": skipped.describe()} if skipped else {}
                return writer.finish(start)

        conflicts = write_without({})
        if conflicts and not skip_bad_records:
            raise next(iter(conflicts.values()))
        if conflicts:
            # Conflicts are rare, so a second pass costs less than an index of all ids in the first.
            for path in folder.iterdir():
                path.unlink()
            left = write_without(conflicts)
            assert not left

    return obtain_store(cache_dir, f"training-{_store_key('training', settings, sources)}", write)


def _add_training_record(
    writer: StoreWriter, record: TrainingRecord, number: int, source: "_Source", num_negatives: int | None
) -> None:
    queries, documents, prompted = range(3)
    # Queries that a tokenizer may take for one draw the same.
    way = zlib.crc32(" ".join(record.query.split()).casefold().encode()) % source.num_ways
    side = prompted if record.prompt is not None else prompted + way if way else queries
    writer.add_text(side, "query", record.query)
    writer.add_text(documents, "pos_doc", record.pos_doc, record.pos_score)
    scores = record.neg_scores or [None] * len(record.neg_docs)
    for negative, score in list(zip(record.neg_docs, scores))[:num_negatives]:
        writer.add_text(documents, "neg_doc", negative, score)
    if not source.file.kind:
        writer.count_negatives(len(record.neg_docs), source.where)
        if record.pos_score is None or record.neg_scores is None:
            writer.count_record_without("scores", source.where)
    writer.end_record(number, query_id=record.query_id, doc_id=record.doc_id, label=record.label)


def build_text_store(
    files: Sequence[str | os.PathLike] | str | os.PathLike,
    text_key: str,
    id_key: str,
    tokenizer: Any,
    text_format: TextFormat,
    cache_dir: str | os.PathLike,
    progress: Progress | None = None,
    columns: Sequence[str] = (),
) -> Path:
    """Tokenize queries ("query", "query_id") or documents ("pos_doc", "doc_id") into a store.

    Rows follow the order of the files and their records; ids.txt holds their ids, one per line. A query repeated on
    several lines (one for each relevant document) is one row; a query_id with two texts is a UserError. Otherwise like
    build_training_store; open it with TextStore.open.
    """
    kinds = {
        ("query", "query_id"): ("queries", parse_query_record, keys_of_query, "query_max_length"),
        ("pos_doc", "doc_id"): ("documents", parse_document_record, keys_of_document, "doc_max_length"),
    }
    if (text_key, id_key) not in kinds:
        raise UserError(f"text_key={text_key!r} with id_key={id_key!r}; expected one of {list(kinds)}")
    kind, parse, keys_read, setting = kinds[text_key, id_key]
    files = _listed(files)
    sources = [
        _Source(RecordFile(path, parse, Columns(columns, kind) if columns else None, keys_read)) for path in files
    ]
    sides = {kind: TextTokenizer(tokenizer, text_format, setting)}
    if kind == "queries":
        sides[PROMPTED] = TextTokenizer(tokenizer, replace(text_format, prefix=""), setting)
    settings = {"text_format": asdict(text_format), "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
    settings |= {"columns": list(columns)} if columns else {}

    def write(folder: Path) -> None:
        texts: dict[str, tuple[bytes, str]] = {}  # for queries: hash and location by id
        with StoreWriter(folder, sides, progress, with_ids=True) as writer:
            for source in sources:
                for number, record in source.records(writer, sides, sides):
                    if kind == "queries" and _is_repeated(texts, record, source.where):
                        source.num_repeats += 1
                        continue
                    if not getattr(record, text_key).strip():
                        writer.count_blank()
                    is_prompted = getattr(record, "prompt", None) is not None
                    if is_prompted:
                        _count_prompt(writer, record.query, source.where, text_format)
                    writer.add_text(int(is_prompted), text_key, getattr(record, text_key))
                    writer.end_record(number, row_id=getattr(record, id_key))
            writer.finish(_manifest_start(kind, settings, sources, [sides] * len(sources)))

    return obtain_store(Path(cache_dir), f"{kind}-{_store_key(kind, settings, sources)}", write)


_ONE_PREFIX = "this model's pooling leaves out the tokens of one prefix for all queries of a file"


def _count_prompt(writer: StoreWriter, query: str, where: str, text_format: TextFormat) -> None:
    if not text_format.include_prompt:
        raise BadRecord(
            where,
            f"brings a prompt of its own, and {_ONE_PREFIX}; remove the prompt, and give each prompt a file and a query prefix",
        )
    writer.count_prompt(query)


def _is_repeated(texts: dict[str, tuple[bytes, str]], query: QueryRecord, where: str) -> bool:
    """Whether the query's id has occurred before. UserError if it had another text."""
    digest = hashlib.blake2b(query.query.encode(), digest_size=16).digest()
    known, place = texts.setdefault(query.query_id, (digest, where))
    if known != digest:
        raise UserError(
            f"{where}: query_id '{query.query_id}' names another query text at {place}; "
            "give each query text its own query_id"
        )
    return place != where


class _Source:
    """One entry of the files and what identifies its content. Its records are numbered across its parts."""

    def __init__(self, file: RecordFile):
        self.file = file
        # Read before the first record, so that a later change is detected.
        self.stamps = file.stamps()
        self.where = ""  # the location of the record read last
        self.num_ways = 1  # formats of its queries
        self._parts: list[dict] = []

    def records(
        self,
        writer: StoreWriter,
        sides: dict[str, TextTokenizer],
        key_sides: dict[str, TextTokenizer],
        skipped: SkippedRecords | None = None,
        known_bad: Mapping[int, BadRecord] = MappingProxyType({}),
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number, parsed record) of the entry; at the end `writer` has stored all, encoded by `sides`.

        A row may give several records. Bad ones are raised, or counted in `skipped`; `known_bad` has further ones by
        number.
        """
        digest, last_bad = hashlib.sha256(), None
        self.num_records = self.num_repeats = 0
        self._parts = parts = []
        last = 0

        def refuse(error: BadRecord) -> None:
            nonlocal last_bad
            if skipped is None:
                raise error
            skipped.add(error)
            last_bad = error

        with self.file as file:
            writer.start_source(sides, key_sides, lambda number: part_location(parts, number))
            for part, stamp in zip(file.parts, self.stamps):
                start, rows = last, Records(part, digest.update, refuse)
                file.open_part(rows)
                # Store the real path, since readers of the store may have another working directory.
                parts.append({"path": stamp["path"], "unit": rows.unit, "records_before": start})
                for number, row in rows:
                    last = start + number
                    try:
                        if last in known_bad:
                            raise known_bad[last]
                        self.where = rows.location(number)
                        records = file.parse(self.where, row)
                    except BadRecord as error:
                        refuse(error)
                        continue
                    for record in records:
                        self.num_records += 1
                        yield last, record
            writer.flush()
            if not self.num_records:
                raise UserError(f"{file.path}: holds no record that can be used; the last one: {last_bad}")
            file.end()
            if file.stamps() != self.stamps:
                raise UserError(f"{file.path}: changed while it was read; run again once it is whole")
        if type(file) is TrainingFile:
            digest.update(file.corpora_sha256.encode())
        self._sha256 = digest.hexdigest()

    def describe(self) -> dict:
        return {
            "path": self.file.path,
            "parts": self._parts,
            "stamps": self.stamps,
            "sha256": self._sha256,
            "num_records": self.num_records - self.num_repeats,
        } | self.file.facts()


def part_location(parts: Sequence[Mapping[str, Any]], number: int) -> str:
    """The location of a record, given its number across all parts of a file, as listed in a manifest."""
    part = parts[bisect.bisect_left([part["records_before"] for part in parts], number) - 1]
    return format_location(part["path"], part["unit"], number - part["records_before"])


def _listed(files: Any) -> list:
    """The paths as a list; a single path becomes a list of one (a string would otherwise be split into characters)."""
    listed = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    if not listed:
        raise UserError("no data files were given; name at least one")
    return listed


def _listed_formats(formats: Formats, num_files: int) -> list[list[TextFormat]]:
    """Those of each file."""
    listed = [formats] * num_files if isinstance(formats, TextFormat) else list(formats)
    assert len(listed) == num_files
    return [[one] if isinstance(one, TextFormat) else list(one) for one in listed]


def _tokenizers(tokenizer: Any, formats: Sequence[TextFormat], setting: str) -> list[TextTokenizer]:
    """A tokenizer for each format; equal formats share one."""
    made = {text_format: TextTokenizer(tokenizer, text_format, setting) for text_format in set(formats)}
    return [made[text_format] for text_format in formats]


def _described(formats: Formats) -> Any:
    return asdict(formats) if isinstance(formats, TextFormat) else [_described(one) for one in formats]


def _store_key(kind: str, settings: dict, sources: list[_Source]) -> str:
    stamps = [source.stamps for source in sources]
    text = json.dumps([FORMAT_VERSION, kind, settings, stamps], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _manifest_start(
    kind: str, settings: dict, sources: list[_Source], tokenizers: list[dict[str, TextTokenizer]]
) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "settings": settings,
        "files": [source.describe() for source in sources],
        # By file and side: the number of leading tokens of a text that the pooling leaves out.
        "prompt_lengths": [
            [sides[side].prompt_length for side in ("queries", "documents") if side in sides] for sides in tokenizers
        ],
    }
