"""The conversions of recipes/convert.py; each input is read as training records, a retrieval set, rows or judgments."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from ds_embed.artifact.durable import check_writable_folder, remove
from ds_embed.data import trec
from ds_embed.data.forms import Columns, Reading, RecordFile, read_training_records
from ds_embed.data.records import keys_of_document, keys_of_query, parse_document_record, parse_query_record
from ds_embed.data.retrieval_sets import BeirFolder, OurFiles, RetrievalSet, TrainingSet
from ds_embed.data.tally import Tally, describe_skipped
from ds_embed.data.text_table import TextTable
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, listed, optional, setting, several
from ds_embed.tools.convert import conversions
from ds_embed.tools.convert.tables import table_writer

_TRAINING_OUTPUTS = ("training", "pairs", "triplets", "texts")
_QRELS_OUTPUTS = ("trec_qrels", "beir_qrels")
# The possible outputs of each input format.
OUTPUTS = {
    "beir": (*_TRAINING_OUTPUTS, "test", *_QRELS_OUTPUTS),
    "test": ("beir", *_QRELS_OUTPUTS),
    "training": (*_TRAINING_OUTPUTS, "beir", "test"),
    "table": (*_TRAINING_OUTPUTS, "beir", "test", "queries", "documents", *_QRELS_OUTPUTS, "trec_run"),
    "msmarco": (*_TRAINING_OUTPUTS, "beir", "test"),
    "qrels": _QRELS_OUTPUTS,
    "run": ("table",),
}


@dataclass
class ConvertArguments(Settings):
    input_format: str = setting(
        "beir (a folder), test (--query_files, --doc_files, --qrels), training (records in any format that training "
        "reads), table (rows with any column names, with --columns), msmarco (lines of query, positive, negative), qrels (TREC or "
        "BEIR), run (TREC)",
        choices=list(OUTPUTS),
    )
    output_format: str = setting(
        "training, test, beir, pairs or triplets (sentence-transformers' columns), texts (each text of training records once, to "
        "be encoded for a guide or a teacher), trec_qrels, beir_qrels; from table also queries, documents, trec_run; from run only table"
    )
    output: str = setting("file to write, or folder for beir, test and texts; must not exist yet")
    input: list[str] = several(
        "files to read, or one folder for beir", files=True, needs="input_format beir training table msmarco qrels run"
    )
    split: str = setting(
        "name of the judgments of a BEIR folder, read or written: qrels/SPLIT.tsv",
        "test",
        needs="input_format beir|output_format beir",
    )
    columns: list[str] = several(
        "mapping of our keys to other keys or columns, such as query=question neg_doc=worse,worst (default: detected "
        "from the keys)"
    )
    corpus_files: list[str] = several(
        "documents that training records refer to by id, as in training",
        files=True,
        needs="input_format training table",
    )
    query_files: list[str] = several("queries of test; for id triples of MS MARCO, lines of id, text", files=True)
    doc_files: list[str] = several("documents of test; for id triples of MS MARCO, lines of id, text", files=True)
    qrels: str | None = optional("judgments of test (default: the doc_id of each query)", files=True)
    join_titles: bool = setting(
        "put the title of a document in front of its text, as BEIR does",
        True,
        needs="input_format beir|output_format documents",
    )
    judged_negatives: bool = setting("documents judged not relevant become neg_doc of the query's records", False)
    num_negatives: int = setting(
        "negatives in each row of triplets; a record needs at least this many",
        1,
        above=0,
        needs="output_format triplets",
    )
    skip_bad_records: bool = setting("skip and count invalid records", False)
    skip_unknown: bool = setting("skip and count judgments and triples whose ids have no text", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_format not in OUTPUTS[self.input_format]:
            outputs = ", ".join(OUTPUTS[self.input_format])
            raise UserError(f"--output_format {self.output_format}: {self.input_format} can become {outputs}")
        if self.input_format == "test":
            if not self.query_files:
                raise UserError("--query_files and --doc_files: give the files of the test set")
        elif self.input_format == "beir":
            if len(self.input) != 1:
                raise UserError(f"--input {listed(self.input)}: give one BEIR folder")
        elif not self.input:
            raise UserError("--input: give at least one file")
        if bool(self.query_files) != bool(self.doc_files):
            raise UserError("--query_files and --doc_files go together; one of them is missing")
        if self.query_files and self.input_format not in ("test", "msmarco"):
            raise UserError(f"--query_files {listed(self.query_files)}: only test and msmarco read them")
        if self.qrels is not None and self.input_format != "test":
            raise UserError(f"--qrels {self.qrels}: only test reads them; judgments alone are --input_format qrels")
        if self.judged_negatives and (self.input_format != "beir" or self.output_format not in _TRAINING_OUTPUTS):
            raise UserError("--judged_negatives true: only for training records out of a BEIR folder")
        if self.columns and self.input_format not in ("training", "table"):
            raise UserError(f"--columns {listed(self.columns)}: only for --input_format training or table")
        if Path(self.output).exists():
            raise UserError(f"--output {self.output}: already exists; delete it or choose another name")


def convert(arguments: ConvertArguments) -> Tally:
    """Write --output, whole or not at all; return what was read, written and left out."""
    tally = Tally(skip_bad_records=arguments.skip_bad_records, skip_unknown=arguments.skip_unknown)
    output = Path(arguments.output).absolute()
    check_writable_folder("--output", output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, the most likely place with room for the texts.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".convert-") as work:
        _write(arguments, output, Path(work), tally)
    if not tally.counts:
        remove(output)
        why = "; ".join(describe_skipped(tally.skipped.describe())) or "no record or judgment in it can become that"
        raise UserError(
            f"--input {listed(arguments.input)}: nothing is left to write as {arguments.output_format}: {why}"
        )
    return tally


def _write(arguments: ConvertArguments, output: Path, work: Path, tally: Tally) -> None:
    target = arguments.output_format
    if target == "training":
        conversions.write_training(output, _records(arguments, work, tally), tally)
    elif target == "texts":
        conversions.write_training_texts(output, _records(arguments, work, tally), tally)
    elif target in ("pairs", "triplets"):
        num_negatives = arguments.num_negatives if target == "triplets" else 0
        conversions.write_pairs(output, _records(arguments, work, tally), num_negatives, tally)
    elif target in ("test", "beir"):
        with TextTable(work, "text") as ids_by_text:
            if arguments.input_format in ("test", "beir"):
                source = _retrieval_set(arguments, tally)
            else:
                source = TrainingSet(lambda again: _records(arguments, work, again), ids_by_text, tally)
            if target == "test":
                conversions.write_test_files(output, source, tally)
            else:
                conversions.write_beir(output, arguments.split, source, tally)
    elif target in ("queries", "documents"):
        parse_document = partial(parse_document_record, join_titles=arguments.join_titles)
        parse = parse_query_record if target == "queries" else parse_document
        conversions.write_texts(output, target, _rows(arguments, target, parse, tally), work, tally)
    elif target in _QRELS_OUTPUTS:
        write_qrels = trec.write_trec_qrels if target == "trec_qrels" else trec.write_beir_qrels
        unique = trec.unique_judgments(_judgments(arguments, tally))
        write_qrels(output, tally.counted("judgments written", (judgment for _, judgment in unique)))
    elif target == "trec_run":
        lines = (line for _, line in _rows(arguments, "run", trec.run_line, tally))
        trec.write_trec_run(output, tally.counted("lines written", lines), "converted")
    else:
        assert target == "table"
        with table_writer(output, get_type_hints(trec.RunLine)) as write:
            for path in arguments.input:
                for _, line in tally.counted("rows written", trec.read_run(path)):
                    write(line._asdict())


def _records(arguments: ConvertArguments, work: Path, tally: Tally) -> conversions.NumberedRecords:
    """The training records of the input."""
    if arguments.input_format in ("training", "table"):
        kinds = ("scored", "labels") if arguments.output_format == "texts" else ()
        reading = Reading(tuple(arguments.columns), tuple(arguments.corpus_files), kinds)
        return _told(arguments, read_training_records(arguments.input, reading, work, tally.refuse, tally.tell), tally)
    if arguments.input_format == "beir":
        source, negatives = _retrieval_set(arguments, tally), arguments.judged_negatives
        return conversions.training_records(source, tally, work, judged_negatives=negatives)
    files = arguments.input, arguments.query_files, arguments.doc_files
    return conversions.training_triples(*files, tally, work)


def _told(
    arguments: ConvertArguments, records: conversions.NumberedRecords, tally: Tally
) -> conversions.NumberedRecords:
    """The records, counting those that lose the scores of a teacher."""
    for where, record in records:
        if arguments.output_format not in ("training", "texts") and (record.pos_score is not None or record.neg_scores):
            tally.count("records whose scores were left out")
        yield where, record


def _rows(
    arguments: ConvertArguments, kind: str, parse: Callable[[str, dict], Any], tally: Tally
) -> Iterator[tuple[str, Any]]:
    """Yield (location, parsed row) of files of "queries", "documents", "judgments" or "run", with --columns applied."""
    for path in arguments.input:
        mapped = arguments.columns or kind in ("judgments", "run")
        keys_read = {"queries": keys_of_query, "documents": keys_of_document}.get(kind)
        file = RecordFile(path, parse, Columns(arguments.columns, kind) if mapped else None, keys_read)
        yield from ((where, one) for where, _, (one,) in file.read(tally.refuse))
        tally.tell(file.describe())


def _retrieval_set(arguments: ConvertArguments, tally: Tally) -> RetrievalSet:
    if arguments.input_format == "test":
        return OurFiles(arguments.query_files, arguments.doc_files, arguments.qrels)
    return BeirFolder(Path(arguments.input[0]), arguments.split, tally, join_titles=arguments.join_titles)


def _judgments(arguments: ConvertArguments, tally: Tally) -> Iterator[tuple[str, trec.Judgment]]:
    if arguments.input_format in ("beir", "test"):
        yield from _retrieval_set(arguments, tally).judgments()
    elif arguments.input_format == "table":
        yield from _rows(arguments, "judgments", trec.judgment, tally)
    else:
        for path in arguments.input:
            yield from trec.read_judgments(path)
