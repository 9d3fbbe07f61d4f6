"""Several training jobs, one after the other in one process, each by its recipe.

deepspeed --num_gpus W tests/workers/train_many.py JOBS.json     with [recipe, [flag, ...]] of each
"""

import json
import sys
from pathlib import Path

from ds_embed.job.ranks import run_recipe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny import load_recipe


def main() -> None:
    for recipe, flags in json.loads(Path(sys.argv[1]).read_text()):
        load_recipe(recipe).main(flags)


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    raise SystemExit(run_recipe(main))
