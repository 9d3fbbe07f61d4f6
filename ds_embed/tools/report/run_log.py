"""What a run's folder tells: the lines of metrics.jsonl, the settings, and the tables made of them."""

import json
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.data.store import describe_file
from ds_embed.settings.errors import UserError

# Keys of a validation line that are no measure of retrieval.
_NO_MEASURES = {"step", "consumed_samples", "seconds", "val_loss", "val_accuracy"}
# Figures of the training lines: the first and last tenth, or the median. Key, name, how it is written.
_FIRST_AND_LAST = (
    ("loss", "Loss", "{:.4g}"),
    ("accuracy", "Accuracy in the batch", "{:.1%}"),
    ("positive_similarity", "Cosine, right document", "{:.3f}"),
    ("negative_similarity", "Cosine, hardest negative", "{:.3f}"),
    ("temperature", "Temperature", "{:.4g}"),
)
_MEDIANS = (
    ("tokens_per_second", "Real tokens per second, median", "{:,.0f}"),
    ("tokens_encoded_per_second", "Encoded tokens per second, each text once, median", "{:,.0f}"),
    ("seconds", "Seconds per step, median", "{:.3g}"),
    ("padding_share", "Padding, median", "{:.1%}"),
)


@dataclass(frozen=True)
class RunLog:
    """What RUN/ tells: `train` and `validation` are lines of metrics.jsonl, by step."""

    path: Path
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    config: dict[str, Any]
    deepspeed: dict[str, Any]
    state: dict[str, Any]  # of the newest checkpoint; empty without one
    num_trained_weights: int  # 0 where no model is written yet

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def measures(self) -> list[str]:
        """Retrieval measures of the validation lines, in their order."""
        keys = [key for line in self.validation for key, value in line.items() if _is_finite(value)]
        return [key for key in dict.fromkeys(keys) if key not in _NO_MEASURES]

    @property
    def restarts(self) -> list[int]:
        """The first logged step of each start but the first: the line that says what was read."""
        return [line["step"] for line in self.train if "data" in line][1:]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps (n,), values (n,)) of a key of training or validation lines, where it is a finite number."""
        lines = self.validation if key.startswith("val_") or key in self.measures else self.train
        pairs = [(line["step"], line[key]) for line in lines if _is_finite(line.get(key))]
        return np.array([step for step, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float64)

    def settings(self) -> dict[str, str]:
        """By name, the settings that say what was trained; one that the run does not know is left out."""
        config, last = self.config, self.train[-1]

        def known(template: str, *keys: str) -> str | None:
            return None if any(config.get(key) is None for key in keys) else template.format(*map(config.get, keys))

        weights = known("LoRA of rank {}", "lora_rank") if config.get("lora_rank") else "all"
        planned = self.state.get("max_steps") or config.get("max_steps") or 0
        stage = self.deepspeed.get("zero_optimization", {}).get("stage", 0)
        data: list[dict[str, Any]] = next((line["data"] for line in reversed(self.train) if "data" in line), [])
        rows = {
            "Base model": known("{}", "model_name_or_path"),
            "Trained weights": f"{weights}"
            + f": {self.num_trained_weights:,} parameters" * bool(self.num_trained_weights),
            "Steps": f"{last['step']:,}" + f" of {planned:,}" * (planned > 0),
            "Batch": known("{:,} queries; hard negatives of each: {}", "global_batch_size", "hard_negatives"),
            "Samples": f"{last.get('consumed_samples', 0):,}",
            "Ranks and ZeRO": self.state.get("written_by") or f"ZeRO-{stage}",
            "Precision": "bfloat16" if self.deepspeed.get("bf16", {}).get("enabled") else "float32",
            "Negatives": known("{}", "negatives"),
            "Learning rate": known(
                "{:g}, {}, warm-up {:.1%} of the steps", "learning_rate", "lr_scheduler", "warmup_ratio"
            )
            or known("{:g}, {}, {} warm-up steps", "learning_rate", "lr_scheduler", "warmup_steps"),
            "Micro-batch": known("{:,} tokens", "micro_batch_tokens"),
            "Gradient caching": known("{}", "grad_cache"),
            "Training files": "\n".join(config.get("train_files", [])),
            "Data": "\n".join(line for file in data for line in describe_file(file)),
            "Seed": known("{}", "seed"),
        }
        return {name: value for name, value in rows.items() if value}

    def results(self) -> dict[str, str]:
        """By name, what came of the run."""
        rows, tail = {}, max(1, len(self.train) // 10)
        for key, name, form in _FIRST_AND_LAST:
            if len(values := self.series(key)[1]):
                rows[name] = f"{form.format(values[:tail].mean())} → {form.format(values[-tail:].mean())}"
        for key in ("val_loss", "val_accuracy", *self.measures):
            steps, values = self.series(key)
            if len(values):
                best = values.argmin() if key == "val_loss" else values.argmax()
                other = f", best {values[best]:.4f} (step {steps[best]:,})" * bool(values[best] != values[-1])
                rows[f"Validation {key.removeprefix('val_')}"] = f"{values[-1]:.4f}{other}"
        for key, name, form in _MEDIANS:
            if len(values := self.series(key)[1]):
                rows[name] = form.format(np.median(values))
        if len(seconds := self.series("seconds")[1]):
            # Where not every step is logged, the logged ones stand for the others.
            rows["Time in steps"] = str(timedelta(seconds=round(seconds.mean() * self.train[-1]["step"])))
        if self.restarts:
            rows["Restarted at step"] = ", ".join(f"{step:,}" for step in self.restarts)
        if skipped := max(line.get("skipped_steps", 0) for line in self.train):
            rows["Skipped steps"] = f"{skipped:,} (loss or gradient not finite)"
        return rows


def read_run(path: str) -> RunLog:
    """Read a run that recipes/train_*.py wrote, finished or not.

    UserError with the file: no such run, a damaged or empty log, settings that can't be read.
    """
    from safetensors import safe_open

    from ds_embed.models.checkpoint import STATE, list_checkpoints

    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"--run {path}: no such folder; give the --output_dir of a training run")
    lines = _read_metrics(folder / "metrics.jsonl")
    checkpoints = list_checkpoints(folder / "checkpoints")
    num_trained = 0
    for file in (folder / "model").glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()  # safe_open can't be iterated
            num_trained += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return RunLog(
        path=folder,
        train=[line for line in lines if "loss" in line],
        validation=[line for line in lines if "loss" not in line],
        config=_read_settings(folder / "config.yaml"),
        deepspeed=_read_settings(folder / "ds_config.json"),
        state=_read_settings(checkpoints[0][1] / STATE) if checkpoints else {},
        num_trained_weights=num_trained,
    )


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the --output_dir of a training run that has logged a step")
    lines, last_step = [], -1
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of JSON ({error}); take that line out") from None
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise UserError(f"{path}:{number}: no object with a whole number 'step'; take that line out")
        if "loss" in line:
            if line["step"] <= last_step:
                reason = f"step {line['step']} stands after step {last_step}: lines of two runs? Keep those of one"
                raise UserError(f"{path}:{number}: {reason}")
            last_step = line["step"]
        lines.append(line)
    if last_step < 0:
        raise UserError(f"{path}: holds no training step; wait for the run's first logged one (--log_interval)")
    return lines


def _read_settings(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise UserError(f"{path}: no such file; is {path.parent} the whole folder that training wrote?")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings (name: value)")
    return content
