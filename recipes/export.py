"""Write a run as a folder for other libraries, loaded there and compared before it is called done.

    python recipes/export.py --run RUN --format sentence-transformers --output_dir DIR

adapter: the LoRA matrices, for PEFT. merged: a whole model, for AutoModel. sentence-transformers: a whole
model with pooling, normalisation and the prefixes as prompts. --average RUN1 RUN2 ..., instead of --run, writes the
mean of runs of one base. Each has a README.md that shows how to load it.
"""

from dataclasses import dataclass

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import parse_arguments
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

    def __post_init__(self):
        super().__post_init__()
        if (self.run is None) == (not self.average):
            raise UserError("give --run RUN, or --average RUN1 RUN2 ... for the mean of several runs")
        if len(self.average) == 1:
            raise UserError(f"--average {self.average[0]}: give two runs or more, or --run for one")
        if self.average and self.step is not None:
            raise UserError(f"--step {self.step}: with --average give the folders of the checkpoints themselves")
        if self.weights and not self.average:
            raise UserError("--weights: belongs to --average, which is not given")
        if self.format == "adapter" and self.dtype != "auto":
            raise UserError(f"--dtype {self.dtype}: an adapter is copied as it is; leave the flag out")


def main(argv=None):
    (arguments,) = parse_arguments(ExportArguments, argv=argv)
    from ds_embed.tools.export.job import export  # torch takes seconds to import; mistakes in flags are found before

    export(
        arguments.average or [arguments.run],
        arguments.format,
        arguments.output_dir,
        step=arguments.step,
        weights=arguments.weights,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
