"""Write a run as a folder for other libraries, loaded there and compared before it is called done.

    python recipes/export.py --run RUN --format sentence-transformers --output_dir DIR

adapter: the LoRA matrices, for PEFT. merged: a whole model, for AutoModel. sentence-transformers: a whole
model with pooling, normalisation and the prefixes as prompts. --average RUN1 RUN2 ..., instead of --run, writes the
mean of runs of one base. Each has a README.md that shows how to load it.
"""

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.settings.export_arguments import ExportArguments


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_arguments(ExportArguments, argv=argv)
    from ds_embed.tools.export.job import export  # torch takes seconds to import; mistakes in flags are found before

    export(arguments)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
