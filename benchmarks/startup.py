"""Startup time: of importing ds_embed, and from launch to the first optimizer step.

    python benchmarks/startup.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl --output_dir startup

Imports are timed in fresh processes that have already imported torch. The launch is that of a one-step training run
with an existing token store, from the command to the step's line in metrics.jsonl.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from contest import Goal, Spread, launched, play, print_goals, print_table, spread, write_results
from train import recipe_of

from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import Settings, setting

LONGEST_IMPORT, LONGEST_START = 0.3, 20.0
IMPORTS = {"import ds_embed": "import ds_embed", "from ds_embed import Embedder": "from ds_embed import Embedder"}


@dataclass
class StartupArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name")
    train_file: str = setting("training records (JSONL or JSON)", files=True)
    output_dir: str = setting("folder for runs and startup.json")
    rounds: int = setting("times that everything is measured", default=3, above=0)
    ranks: list[int] = setting("numbers of ranks that are launched", default_factory=lambda: [1, 2])
    deepspeed: str = setting("DeepSpeed JSON", default="ds_configs/zero1.json")
    pooling: str = setting("mean (recipes/train_bert.py) or last (train_gpt.py)", default="mean")
    global_batch_size: int = setting("queries of the step", default=64)
    max_length: int = setting("longest text in tokens", default=256)

    def __post_init__(self):
        super().__post_init__()
        recipe_of(self.pooling)


def import_seconds(statement: str) -> dict:
    code = f"import time, torch; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return {"seconds": float(done.stdout)}


def launch_seconds(settings: StartupArguments, folder: Path, ranks: int) -> dict:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    started = time.time()
    launched(
        ranks,
        recipe_of(settings.pooling),
        "--deepspeed",
        settings.deepspeed,
        "--model_name_or_path",
        settings.model_name_or_path,
        "--train_files",
        settings.train_file,
        "--output_dir",
        run,
        "--cache_dir",
        folder / "cache",
        "--max_length",
        settings.max_length,
        "--global_batch_size",
        settings.global_batch_size,
        "--max_steps",
        1,
        "--report_to",
        "none",
    )
    # The step's line is the last write to this file.
    return {"seconds": (run / "metrics.jsonl").stat().st_mtime - started}


def main() -> None:
    (settings,) = parse_arguments(StartupArguments)
    folder = Path(settings.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    launches = {f"launch to the end of step 1, {ranks} rank(s)": ranks for ranks in settings.ranks if ranks}
    if launches:
        launch_seconds(settings, folder, 1)  # builds the token store
    playing = {what: lambda _, code=code: import_seconds(code) for what, code in IMPORTS.items()}
    playing |= {
        what: lambda _, ranks=ranks: launch_seconds(settings, folder, ranks) for what, ranks in launches.items()
    }
    results = play(playing, settings.rounds)
    print_table(["what", "seconds: median (range)"], [[what, spread(results, what, "seconds")] for what in results])
    bounds = {next(iter(IMPORTS)): LONGEST_IMPORT} | dict.fromkeys(launches, LONGEST_START)
    reached = [
        Goal(f"seconds, {what}", Spread.of([r["seconds"] for r in results[what]]), bound, False)
        for what, bound in bounds.items()
    ]
    print_goals(reached)
    write_results(folder / "startup.json", settings, results, reached)


if __name__ == "__main__":
    main()
