"""Sizing a job: the machines, and the texts where there are none to read yet."""

from dataclasses import dataclass

from ds_embed.settings.checks import above_zero, at_least
from ds_embed.settings.data_arguments import DataArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import setting
from ds_embed.settings.run_arguments import RunArguments


@dataclass
class HardwareArguments:
    """What a machine can do. Memory is compared with it; the rest are assumptions that only times depend on."""

    gpu_memory_gb: float | None = setting(
        "memory of one GPU in GiB, as nvidia-smi shows it (default: that of the GPU here, else 80; for CPU ranks, "
        "their share of the machine's)",
        default=None,
    )
    gpu_tflops: float = setting("peak of one GPU in 10^12 FLOP/s, dense, in the precision used", default=989.0)
    efficiency: float = setting("share of gpu_tflops that is reached, in (0, 1]", default=0.41)
    node_gb_per_second: float = setting("10^9 bytes per second from one GPU to others of its node", default=450.0)
    network_gb_per_second: float = setting("10^9 bytes per second from one node to others, all its cards", default=50.0)

    def __post_init__(self):
        above_zero(self, "gpu_memory_gb", "gpu_tflops", "efficiency", "node_gb_per_second", "network_gb_per_second")
        if self.efficiency > 1:
            raise UserError(f"--efficiency {self.efficiency}: must be at most 1")


@dataclass
class DryRunArguments(HardwareArguments):
    """For --dry_run true only."""

    dry_run: bool = setting(
        "check every setting, prepare the tokens, print what the job will take, and end before the model is loaded",
        default=False,
    )


@dataclass
class SizingArguments(HardwareArguments):
    num_gpus: int = setting("GPUs of the job, over all nodes", default=8)
    gpus_per_node: int = setting("GPUs of one node", default=8)
    num_records: int | None = setting("training records, where there are no train_files to count", default=None)
    mean_query_tokens: int = setting("tokens of a query, where there are no train_files to read", default=32)
    mean_doc_tokens: int = setting("tokens of a document, where there are no train_files to read", default=128)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "num_gpus", "gpus_per_node", "num_records", "mean_query_tokens", "mean_doc_tokens")
        if self.num_gpus > self.gpus_per_node and self.num_gpus % self.gpus_per_node:
            raise UserError(
                f"--num_gpus {self.num_gpus}: is no multiple of --gpus_per_node {self.gpus_per_node}; nodes must be equal"
            )


@dataclass
class SizingDataArguments(DataArguments):
    """A training recipe's; here the files are optional."""

    def __post_init__(self):
        if self.train_files:
            super().__post_init__()
        else:
            TextArguments.__post_init__(self)
            at_least(self, 0, "hard_negatives")


@dataclass
class SizingRunArguments(RunArguments):
    """A training recipe's; nothing is written."""

    output_dir: str = setting("taken so that a training command can be used; nothing is written", default="")
    deepspeed: str = setting("path of the DeepSpeed JSON (see ds_configs/)", default="ds_configs/zero2.json")
