"""Sizing a job: the machines, and the texts where there are none to read yet."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting


@dataclass
class HardwareArguments(Settings):
    """What a machine can do. Memory is compared with it; the rest are assumptions that only times depend on."""

    gpu_memory_gb: float | None = setting(
        "memory of one GPU in GiB, as nvidia-smi shows it (default: that of the GPU here, else 80; for CPU ranks, "
        "their share of the machine's)",
        default=None,
        above=0,
    )
    gpu_tflops: float = setting("peak of one GPU in 10^12 FLOP/s, dense, in the precision used", default=989.0, above=0)
    efficiency: float = setting("share of gpu_tflops that is reached", default=0.41, above=0, at_most=1)
    node_gb_per_second: float = setting(
        "10^9 bytes per second from one GPU to others of its node", default=450.0, above=0
    )
    network_gb_per_second: float = setting(
        "10^9 bytes per second from one node to others, all its cards", default=50.0, above=0
    )

    def __post_init__(self):
        super().__post_init__()


@dataclass
class DryRunArguments(HardwareArguments):
    """For --dry_run true only."""

    dry_run: bool = setting(
        "check every setting, prepare the tokens, print what the job will take, and end before the model is loaded",
        default=False,
    )


@dataclass
class SizingArguments(HardwareArguments):
    num_gpus: int = setting("GPUs of the job, over all nodes", default=8, at_least=1)
    gpus_per_node: int = setting("GPUs of one node", default=8, at_least=1)
    num_records: int | None = setting(
        "training records, where there are no train_files to count", default=None, at_least=1
    )
    mean_query_tokens: int = setting(
        "tokens of a query, where there are no train_files to read", default=32, at_least=1
    )
    mean_doc_tokens: int = setting(
        "tokens of a document, where there are no train_files to read", default=128, at_least=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise UserError(
                f"--num_gpus {self.num_gpus}: is no multiple of --gpus_per_node {self.gpus_per_node}; nodes must be equal"
            )


# Of the plan of a job: a training command's flags can be used as they are, but nothing need be there yet.
SIZING_DEFAULTS = {"train_files": [], "output_dir": "", "deepspeed": "ds_configs/zero2.json"}
