"""What recipes/export.py writes."""

from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting


@dataclass
class ExportArguments(Settings):
    output_dir: str = setting("folder to write; must be empty or not exist")
    run: str | None = setting("folder of a run, its model/, or one of its checkpoints", default=None)
    average: list[str] = setting(
        "runs or checkpoints, with the same base model, pooling and prefixes, whose mean is written as a whole model",
        default_factory=list,
    )
    weights: list[float] = setting("weight of each run in average (default: equal weights)", default_factory=list)
    step: int | None = setting("export the run's checkpoint of this step instead of its model/", default=None)
    format: str = setting(
        "adapter, merged or sentence-transformers",
        default="sentence-transformers",
        choices=("adapter", "merged", "sentence-transformers"),
    )
    dtype: str = setting(
        "data type of the weights of a whole model on disk: auto (the base model's), float32, bfloat16 or float16",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("where the checks run, in float32: cpu or cuda", default="cpu")
    trust_remote_code: bool = setting("run Python code shipped with the model", default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.run is None) == (not self.average):
            raise UserError("give either --run RUN, or --average RUN1 RUN2 ... for the mean of several runs")
        if len(self.average) == 1:
            raise UserError(f"--average {self.average[0]}: give at least two runs, or use --run for one")
        if self.average and self.step is not None:
            raise UserError(f"--step {self.step}: has no effect with --average; give it checkpoint folders")
        if self.weights and not self.average:
            raise UserError("--weights: has no effect without --average")
        if self.average and self.format == "adapter":
            raise UserError(
                "--format adapter: the mean of runs is a whole model; choose merged or sentence-transformers"
            )
        if self.format == "adapter" and self.dtype != "auto":
            raise UserError(f"--dtype {self.dtype}: an adapter is copied unchanged; remove the flag")
