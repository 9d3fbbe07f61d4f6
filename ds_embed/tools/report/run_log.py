"""Reading a run's folder for its report: metrics.jsonl, the settings, the restarts, the trained weights."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.settings.errors import UserError

# Keys of a validation line that are no measure of retrieval.
_NO_MEASURES = {"step", "consumed_samples", "seconds", "val_loss", "val_accuracy"}


@dataclass(frozen=True)
class RunLog:
    """What RUN/ tells: `train` and `validation` are lines of metrics.jsonl, by step; `restarts` are steps."""

    path: Path
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    config: dict[str, Any]
    deepspeed: dict[str, Any]
    restarts: list[int]  # the first step of each start but the first
    state: dict[str, Any]  # of the newest checkpoint; empty without one
    num_trained_weights: int | None  # None where neither a model nor a checkpoint is written yet

    @property
    def name(self) -> str:
        return self.path.name

    def series(self, key: str, lines: list[dict[str, Any]] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a key, where it is a finite number; of the training lines unless told otherwise."""
        lines = self.train if lines is None else lines
        pairs = [(line["step"], line[key]) for line in lines if _is_finite(line.get(key))]
        steps, values = zip(*pairs) if pairs else ((), ())
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)

    @property
    def measures(self) -> list[str]:
        """Retrieval measures of the validation lines, in their order."""
        found = [key for line in self.validation for key, value in line.items() if _is_finite(value)]
        return [key for key in dict.fromkeys(found) if key not in _NO_MEASURES]


def read_run(path: str) -> RunLog:
    """Read a run that recipes/train_*.py wrote, finished or not.

    UserError with the file: no such run, a damaged or empty log, settings that can't be read.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"--run {path}: no such folder; give the --output_dir of a training run")
    lines = _read_metrics(folder / "metrics.jsonl")
    train = [line for line in lines if "loss" in line]
    if not train:
        raise UserError(f"{folder / 'metrics.jsonl'}: holds no training step, so there is nothing to report")
    for before, line in itertools.pairwise(train):
        if line["step"] <= before["step"]:
            raise UserError(
                f"{folder / 'metrics.jsonl'}: step {line['step']} stands after step {before['step']}: "
                "lines of two runs? Keep those of one"
            )
    return RunLog(
        path=folder,
        train=train,
        validation=[line for line in lines if "loss" not in line],
        config=_read_settings(folder / "config.yaml"),
        deepspeed=_read_settings(folder / "ds_config.json"),
        restarts=_read_restarts(folder / "tensorboard"),
        state=_newest_state(folder / "checkpoints"),
        num_trained_weights=_count_weights(folder),
    )


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the --output_dir of a training run that has logged a step")
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of JSON ({error}); take that line out") from None
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise UserError(f"{path}:{number}: no object with a whole number 'step'; take that line out")
        lines.append(line)
    if not lines:
        raise UserError(f"{path}: is empty; wait for the run's first logged step (--log_interval)")
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


def _read_restarts(folder: Path) -> list[int]:
    """The first steps trained in the second and later TensorBoard files: each start of a run opens its own."""
    if not folder.is_dir():
        return []
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    firsts = []
    for path in folder.glob("events.out.tfevents.*"):
        events = EventFileLoader(str(path)).Load()
        steps = (event.step for event in events if any(value.tag == "train/loss" for value in event.summary.value))
        firsts.append(next(steps, None))  # a start that was stopped before its first step has none
    return sorted({step for step in firsts if step is not None})[1:]


def _newest_state(folder: Path) -> dict[str, Any]:
    from ds_embed.training.checkpoint import STATE, list_checkpoints

    checkpoints = list_checkpoints(folder)
    return _read_settings(checkpoints[0][1] / STATE) if checkpoints else {}


def _count_weights(folder: Path) -> int | None:
    """Numbers in the weights that the run trains, from the heads of its files."""
    from safetensors import safe_open

    newest = sorted(folder.glob("checkpoints/step_*/weights-*.safetensors"))
    files = list(folder.glob("model/*.safetensors")) or [path for path in newest if path.parent == newest[-1].parent]
    total = 0
    for path in files:
        with safe_open(path, framework="np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors)
    return total or None
