"""Create a report of a run: its curves and, given vectors of its model, its retrieval quality and its failures.

    python recipes/report.py RUN
    python recipes/report.py RUN --embeddings OUT/consumed_samplesX --query_files queries.jsonl --doc_files docs.jsonl

It writes RUN/report/report.html, a self-contained page, and a PNG of each chart next to it.
"""

import sys

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import ReportArguments, parse_arguments
from ds_embed.tools.report.build import build_report


def main() -> None:
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    (arguments,) = parse_arguments(ReportArguments, argv=argv)
    path, num_charts = build_report(arguments)
    print(f"written to {path} ({path.stat().st_size / 1024:,.0f} KiB, {num_charts} charts)")


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
