"""The folder of a run: its settings, its log, its monitors, its model."""

import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_embed.config import RunArguments


class RunFolder:
    """RUN/: config.yaml, ds_config.json, metrics.jsonl, monitors and, at the end, model/. Rank 0 writes."""

    def __init__(self, path: str):
        self.path = Path(path).expanduser().resolve()
        self._metrics = None
        self._monitor = None

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    def check_is_new(self) -> None:
        """ValueError when the folder can't be a new run's: it holds a run, or can't be written."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output_dir {self.path}: is a file; give a folder")
        if (self.path / "config.yaml").exists():
            state = "a finished run" if self.model_dir.exists() else "a run that was stopped"
            raise ValueError(f"--output_dir {self.path}: holds {state}; remove it or choose another folder")
        parent = next(p for p in [self.path, *self.path.parents] if p.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"--output_dir {self.path}: {parent} can't be written")

    def open(self, settings: list[Any], deepspeed_config: dict[str, Any], arguments: RunArguments) -> None:
        """Write the settings and open the log and the monitors."""
        import yaml

        self.path.mkdir(parents=True, exist_ok=True)
        values = {name: value for group in settings for name, value in asdict(group).items() if value is not None}
        _write_text(self.path / "ds_config.json", json.dumps(deepspeed_config, indent=2) + "\n")
        _write_text(self.path / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
        self._monitor = self._open_monitor(arguments.report_to)

    def _open_monitor(self, names: list[str]) -> Any:
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        sections = {
            "tensorboard": {"enabled": True, "output_path": str(self.path), "job_name": "tensorboard"},
            "csv": {"enabled": True, "output_path": str(self.path), "job_name": "csv"},
            "wandb": {"enabled": True, "project": "ds_embed"},
            "comet": {"enabled": True, "project": "ds_embed", "experiment_name": self.path.name},
        }
        keys = {"csv": "csv_monitor"}
        try:
            # Our own, beside the engine's: the engine would log its count of samples, which is not ours.
            return MonitorMaster(get_monitor_config({keys.get(n, n): sections[n] for n in names if n != "none"}))
        except ImportError as error:
            raise ValueError(f"--report_to {' '.join(names)}: {error}; install it or leave it out") from None

    def log(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl and, for the numbers, one event a monitor at values["step"]."""
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        step = values["step"]
        events = [(f"train/{k}", v, step) for k, v in values.items() if k not in ("step", "time")]
        self._monitor.write_events(events)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def publish_model(self, fill: Any) -> None:
        """Let `fill(folder)` write the model, and give the folder its name only when it is whole."""
        temporary = self.path / f".model-{os.getpid()}-{time.time_ns()}"
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        os.rename(temporary, self.model_dir)
        _sync(self.path)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
