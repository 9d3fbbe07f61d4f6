"""Export a run to a folder for other libraries, and check it by loading it there and comparing the vectors.

    python recipes/export.py --run RUN --format sentence-transformers --output_dir DIR

adapter: the LoRA matrices, for PEFT. merged: a whole model, for AutoModel. sentence-transformers: a whole
model with pooling, normalization and the prefixes as prompts. --average RUN1 RUN2 ... instead of --run writes the
mean of runs that share a base model. Each folder has a README.md that shows how to load it.
"""

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.settings.tool_arguments import ExportArguments


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_arguments(ExportArguments, argv=argv)
    from ds_embed.tools.export.job import export  # importing torch takes seconds; check the flags first

    export(arguments)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
