"""The output of a run: the progress bar, one line of metrics per step, and the message for a failed step."""

import math
import re
import sys
from pathlib import Path
from typing import Any

from ds_embed.data.batch import GlobalBatch
from ds_embed.data.store import TrainingStore
from ds_embed.job.ranks import World
from ds_embed.training.run_folder import RunFolder
from ds_embed.training.step import StepResult


class StepLog:
    """The progress bar on rank 0's terminal and the lines of metrics.jsonl; on other ranks it does nothing."""

    def __init__(
        self,
        world: World,
        folder: RunFolder,
        first_step: int,
        max_steps: int,
        interval: int,
        data: list[dict[str, Any]],
    ):
        """`data` describes what was read from each training file; it is logged in the first line after each start."""
        self.data = {"data": data}
        self.world, self.folder, self.max_steps, self.interval = world, folder, max_steps, interval
        self.bar = None
        if world.is_main:
            from tqdm import tqdm

            self.bar = tqdm(initial=first_step, total=max_steps, unit="step", desc="training", dynamic_ncols=True)

    def add(
        self,
        number: int,
        consumed_samples: int,
        rate: float,
        norm: float,
        result: StepResult,
        seconds: float,
        peak_gib: float,
        skipped_steps: int | None,
    ) -> None:
        """Log a line of metrics, with null for NaN. A skipped step is always logged, with the count so far."""
        is_logged = number % self.interval == 0 or number == self.max_steps or skipped_steps is not None
        if self.bar is None:
            return
        tokens_per_second = result.num_tokens / seconds
        encoded_per_second = result.num_tokens_encoded / seconds
        self.bar.set_postfix(
            refresh=False,
            loss=f"{result.loss:.4f}",
            rate=f"{rate:.2e}",
            tokens_per_s=f"{tokens_per_second:,.0f}",
            encoded_per_s=f"{encoded_per_second:,.0f}",
            padding=f"{result.padding_share:.1%}",
        )
        self.bar.update()
        if not is_logged:
            return
        counted = {} if skipped_steps is None else {"skipped_steps": skipped_steps}
        self.folder.log(
            counted
            | _without_nan(
                {
                    "step": number,
                    "loss": result.loss,
                    "accuracy": result.accuracy,
                    "positive_similarity": result.positive_similarity,
                    "negative_similarity": result.negative_similarity,
                    "margin": result.margin,
                    "without_negatives": result.without_negatives,
                    "temperature": result.temperature,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "consumed_samples": consumed_samples,
                    "tokens": result.num_tokens,
                    "tokens_encoded": result.num_tokens_encoded,
                    "tokens_per_second": tokens_per_second,
                    "tokens_encoded_per_second": encoded_per_second,
                    "padding_share": result.padding_share,
                    "seconds": seconds,
                    "peak_memory_gib": peak_gib,
                }
            )
            | self.data
        )
        self.data = {}

    def add_validation(
        self, number: int, consumed_samples: int, metrics: dict[str, float], seconds: float, best: str
    ) -> None:
        """Log one line of metrics and print one on the terminal; `best` describes the best validation so far."""
        if self.bar is None:
            return
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.bar.write(f"step {number}: {shown} ({best}{seconds:.1f} seconds)", file=sys.stderr)
        place = {"step": number, "consumed_samples": consumed_samples}
        self.folder.log(place | _without_nan(metrics) | {"seconds": seconds}, group="val")

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_) -> None:
        """End the bar's line, so that an error starts a new one."""
        if self.bar is not None:
            self.bar.close()


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def non_finite_message(number: int, result: StepResult, batch: GlobalBatch, store: TrainingStore) -> str:
    """A message that names the step, samples and records whose loss or gradient is not finite."""
    shown = ", ".join(store.location(int(record)) for record in batch.records[:3])
    what = "the gradient is not finite" if result.is_finite else f"the loss is {result.loss}"
    return (
        f"step {number}: {what}; samples {batch.first_sample} to "
        f"{batch.first_sample + len(batch.records) - 1}, the first ones from {shown}; this step changed no weights"
    )


def peak_memory_gib(device: Any) -> float:
    """Peak memory of this rank so far in GiB: on the accelerator, or of the process if there is none."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not getrusage, which also counts memory from before this program was exec'ed.
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def whole_size(parameter: Any) -> int:
    """Number of elements of a parameter; under ZeRO-3 the parameter itself is an empty shard."""
    return getattr(parameter, "ds_numel", parameter.numel())
