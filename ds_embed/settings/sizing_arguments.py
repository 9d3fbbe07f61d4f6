"""Sizing a job: the hardware, and assumptions about texts that don't exist yet."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting


@dataclass
class HardwareArguments(Settings):
    """What the hardware can do. Only the predicted times depend on settings other than gpu_memory_gb."""

    gpu_memory_gb: float | None = setting(
        "memory of one GPU in GiB, as nvidia-smi shows it (default: that of the local GPU, else 80; for CPU ranks, "
        "their share of the machine's memory)",
        default=None,
        above=0,
    )
    gpu_tflops: float = setting(
        "peak dense throughput of one GPU in 10^12 FLOP/s, in the precision used", default=989.0, above=0
    )
    efficiency: float = setting("fraction of gpu_tflops that is achieved", default=0.41, above=0, at_most=1)
    node_gb_per_second: float = setting(
        "bandwidth from one GPU to the others of its node, in 10^9 bytes per second", default=450.0, above=0
    )
    network_gb_per_second: float = setting(
        "bandwidth from one node to the others, over all its network cards, in 10^9 bytes per second",
        default=50.0,
        above=0,
    )

    def __post_init__(self):
        super().__post_init__()


@dataclass
class DryRunArguments(HardwareArguments):
    """For --dry_run true only."""

    dry_run: bool = setting(
        "check every setting, tokenize the data, print the memory and time that the job will need, and exit before the "
        "model is loaded",
        default=False,
    )


@dataclass
class SizingArguments(HardwareArguments):
    num_gpus: int = setting("number of GPUs of the job, over all nodes", default=8, at_least=1)
    gpus_per_node: int = setting("number of GPUs per node", default=8, at_least=1)
    num_records: int | None = setting(
        "number of training records, if train_files is not given", default=None, at_least=1
    )
    mean_query_tokens: int = setting("mean tokens per query, if train_files is not given", default=32, at_least=1)
    mean_doc_tokens: int = setting("mean tokens per document, if train_files is not given", default=128, at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise UserError(f"--num_gpus {self.num_gpus}: must be a multiple of --gpus_per_node {self.gpus_per_node}")


# Defaults of recipes/plan.py: it accepts the flags of a training command, but its files need not exist yet.
SIZING_DEFAULTS = {"train_files": [], "output_dir": "", "deepspeed": "ds_configs/zero2.json"}
