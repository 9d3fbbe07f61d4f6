"""Convert data between our formats and other formats, in both directions; docs/data_formats.md describes each.

    python recipes/convert.py --input_format beir --input BEIR_FOLDER --split train --output_format training --output train.jsonl
    python recipes/convert.py --input_format beir --input BEIR_FOLDER --split test --output_format test --output TEST
    python recipes/convert.py --input_format table --input pairs.parquet --columns query=question pos_doc=answer \
        --output_format training --output train.jsonl
"""

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.tools.convert.job import ConvertArguments, convert


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_arguments(ConvertArguments, argv=argv)
    tally = convert(arguments)
    print("\n".join(tally.lines()) + f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
