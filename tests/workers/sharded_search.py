"""Three ranks of one search: argv are a rank, a folder and a file to meet in. Saves what every rank got."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ds_embed.job.ranks import FailedElsewhere, World
from ds_embed.vectors.search import search_sharded

rank, folder, meeting = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)
world = World(rank, 3, rank, 3, torch.device("cpu"), None)
for path in sorted(folder.glob("case*.npz")):
    case = np.load(path)
    found = search_sharded(world, case["queries"], case["documents"], int(case["k"]), tie_rank=case["tie_rank"])
    np.savez(folder / f"rank{rank}-{path.name}", scores=found[0], rows=found[1])
# The bad row lies in the last rank's slice: that rank reports it and none of the others waits for ever.
documents = np.ones((30, 4), dtype=np.float32)
documents[29] = np.nan
try:
    search_sharded(world, documents[:2], documents, 3)
except (ValueError, FailedElsewhere) as error:
    (folder / f"rank{rank}.error").write_text(f"{type(error).__name__} {error}")
dist.destroy_process_group()
