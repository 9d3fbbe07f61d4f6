"""What recipes/export.py writes."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting


@dataclass
class ExportArguments(Settings):
    output_dir: str = setting("folder to write; must not exist, or be empty")
    run: str | None = setting("folder of a run, its model/, or a checkpoint of it", default=None)
    average: list[str] = setting(
        "runs, or checkpoints, of one base and one way to make vectors, whose mean is written as a whole model instead",
        default_factory=list,
    )
    weights: list[float] = setting("what each run of average counts (default: all alike)", default_factory=list)
    step: int | None = setting("export the checkpoint of that step of the run instead of its model/", default=None)
    format: str = setting(
        "adapter, merged or sentence-transformers",
        default="sentence-transformers",
        choices=("adapter", "merged", "sentence-transformers"),
    )
    dtype: str = setting(
        "of the weights of a whole model on disk: auto (the base model's), float32, bfloat16 or float16",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("where the checks run, in float32: cpu or cuda", default="cpu")
    trust_remote_code: bool = setting("run Python code that comes with the model", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.run is None) == (not self.average):
            raise UserError("give --run RUN, or --average RUN1 RUN2 ... for the mean of several runs")
        if len(self.average) == 1:
            raise UserError(f"--average {self.average[0]}: give two runs or more, or --run for one")
        if self.average and self.step is not None:
            raise UserError(f"--step {self.step}: with --average give the folders of the checkpoints themselves")
        if self.weights and not self.average:
            raise UserError("--weights: belongs to --average, which is not given")
        if self.average and self.format == "adapter":
            raise UserError(
                "--format adapter: the mean of runs is a whole model; choose merged or sentence-transformers"
            )
        if self.format == "adapter" and self.dtype != "auto":
            raise UserError(f"--dtype {self.dtype}: an adapter is copied as it is; leave the flag out")
