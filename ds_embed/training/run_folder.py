"""The folder of a run: its settings, its log, its monitors, its model."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ds_embed.artifact.durable import (
    check_writable_folder,
    folder_when_whole,
    hold_lock,
    remove_unfinished,
    replaced_when_whole,
    sync_file,
)
from ds_embed.settings import RunArguments
from ds_embed.settings.errors import UserError
from ds_embed.training.monitors import Monitors

logger = logging.getLogger(__name__)


class RunFolder:
    """RUN/: config.yaml, ds_config.json, metrics.jsonl, monitors and, at the end, model/. Rank 0 writes."""

    def __init__(self, path: str):
        self.path = Path(path).expanduser().resolve()
        self._metrics = None
        self._monitor = None
        self._lock: IO | None = None
        self._is_owned = False
        self.held_run = False

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def validation_dir(self) -> Path:
        return self.path / "validation"

    def claim(self, resume_if_exists: bool) -> None:
        """Take the folder for this job. UserError if it can't be written, is in use, or may not be resumed."""
        check_writable_folder("--output_dir", self.path)
        if self.path.exists():  # otherwise a run that can't start would leave a folder behind
            self._take_lock()
        self.held_run = self._holds_run()
        if self.held_run and not resume_if_exists:
            state = "a finished run" if self.model_dir.exists() else "a run that was stopped"
            raise UserError(
                f"--output_dir {self.path}: contains {state}, but --resume_if_exists is false; "
                "remove that flag to resume the run, or remove the folder, or choose another one"
            )

    def _holds_run(self) -> bool:
        return (self.path / "config.yaml").exists() or self.checkpoints_dir.exists()

    def _take_lock(self) -> None:
        """Hold RUN/.lock until this process ends; the system releases it however that happens."""
        if not self._is_owned:
            self._lock = hold_lock(self.path, "--output_dir", inside=True)
            self._is_owned = True

    def own(self, name: str) -> Path:
        """Make this job the owner of the run, and return the path RUN/`name` for it to write."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        return self.path / name

    def open(
        self,
        settings: list[Any],
        deepspeed_config: dict[str, Any],
        arguments: RunArguments,
        last_step: int,
        last_validation: int,
    ) -> None:
        """Write the settings; open the log, truncated to these steps, and the monitors."""
        import yaml

        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if self._holds_run() and not self.held_run:
            raise UserError(f"--output_dir {self.path}: another job has started a run there; choose another folder")
        values = {name: value for group in settings for name, value in asdict(group).items() if value is not None}
        with replaced_when_whole(self.path / "ds_config.json") as file:
            file.write(json.dumps(deepspeed_config, indent=2) + "\n")
        with replaced_when_whole(self.path / "config.yaml") as file:
            yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True)
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = lines_up_to(metrics.read_text(encoding="utf-8", errors="replace"), last_step, last_validation)
            with replaced_when_whole(metrics) as file:
                file.writelines(kept)
        self._metrics = open(metrics, "a", encoding="utf-8")
        self._monitor = Monitors(self.path, arguments, last_step)

    def log(self, values: dict[str, Any], group: str = "train") -> None:
        """Write a line to metrics.jsonl and, for each number, an event group/name at values["step"] to the monitors."""
        try:
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path}: metrics.jsonl could not be written ({error.strerror}); the checkpoints are "
                "intact. Fix the problem and start the same command again"
            ) from error
        step = values["step"]
        skip = ("step", "time", "data")
        numbers = {k.removeprefix("val_"): v for k, v in values.items() if k not in skip and v is not None}
        self._monitor.write_events([(f"{group}/{k}", v, step) for k, v in numbers.items()])

    def sync_log(self) -> None:
        """Flush the lines written so far to disk, before a checkpoint that relies on them."""
        sync_file(self._metrics)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._monitor is not None:
            self._monitor.close()

    def publish_model(self, fill: Any) -> None:
        """Let `fill(folder)` write the model; the folder takes its name only when it is whole.

        An existing model is replaced, since the run has trained further. A run killed between the two renames writes
        its model again from the last checkpoint.
        """
        remove_unfinished(self.model_dir)
        with folder_when_whole(self.model_dir) as folder:
            fill(folder)


def lines_up_to(text: str, last_step: int, last_validation: int = -1) -> list[str]:
    """The lines of a metrics.jsonl up to a step, without a line cut off by a crash.

    Lines of validations, which have no "loss", are kept up to last_validation: a step may be saved but not yet
    validated.
    """
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            values = json.loads(line)
            if values["step"] <= (last_step if "loss" in values else last_validation) and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
