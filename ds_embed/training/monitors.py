"""TensorBoard, Weights & Biases, Comet and CSV files, through DeepSpeed's monitor, for runs that may be resumed."""

import csv
import os
import secrets
from pathlib import Path
from typing import Any

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.settings import RunArguments
from ds_embed.settings.errors import UserError

CSV_FOLDER = "csv"
WANDB_ID_NAME = "wandb_run_id"  # in RUN/: a resumed run continues the same W&B run


class Monitors:
    """The monitors named by --report_to, opened for a run that continues after `last_step`; only on rank 0."""

    def __init__(self, path: Path, arguments: RunArguments, last_step: int):
        from deepspeed.monitor.config import get_monitor_config
        from deepspeed.monitor.monitor import MonitorMaster

        self._names = [name for name in arguments.report_to if name != "none"]
        if "wandb" in self._names:
            _prepare_wandb(path, arguments)
        try:
            # Separate from the engine's monitors, which would log the engine's count of samples instead of ours.
            self._master = MonitorMaster(get_monitor_config(_sections(self._names, path, arguments)))
        except Exception as error:
            if type(error).__module__.split(".")[0] not in ("wandb", "comet_ml"):
                raise
            raise UserError(
                f"--report_to {' '.join(arguments.report_to)}: {type(error).__module__} says: {error}"
            ) from None
        if "csv" in self._names:
            # Each file starts with a header line, which already exists when a run is resumed.
            self._master.csv_monitor.filenames += cut_csv_files(path / CSV_FOLDER, last_step)

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """Write events, each with name, value and step."""
        self._master.write_events(events)

    def close(self) -> None:
        """Flush pending events; the process may end without running the libraries' own exit handlers."""
        if "tensorboard" in self._names:
            self._master.tb_monitor.summary_writer.close()
        if "wandb" in self._names:
            import wandb

            wandb.finish()
        if "comet" in self._names:
            self._master.comet_monitor.experiment.end()


def _sections(names: list[str], path: Path, arguments: RunArguments) -> dict[str, dict[str, Any]]:
    """The monitors' sections of a DeepSpeed config."""

    def project(variable: str) -> str:
        return arguments.report_project or os.environ.get(variable, "ds_embed")

    files = {"enabled": True, "output_path": str(path)}
    sections = {
        "tensorboard": files | {"job_name": "tensorboard"},
        "csv": files | {"job_name": CSV_FOLDER},
        "wandb": {"enabled": True, "project": project("WANDB_PROJECT"), "team": arguments.report_team},
        "comet": {
            "enabled": True,
            "project": project("COMET_PROJECT_NAME"),
            "workspace": arguments.report_team,
            "experiment_name": arguments.run_name or path.name,
            "samples_log_interval": 1,  # log every event; the default is every hundredth step
        },
    }
    return {{"csv": "csv_monitor"}.get(name, name): sections[name] for name in names}


def _prepare_wandb(path: Path, arguments: RunArguments) -> None:
    """Pass settings that DeepSpeed does not pass on through W&B's own variables, which a user may have set."""
    id_file = path / WANDB_ID_NAME
    if not id_file.exists():
        with replaced_when_whole(id_file) as file:
            file.write(secrets.token_hex(8) + "\n")
    ours = {"WANDB_DIR": str(path), "WANDB_RUN_ID": id_file.read_text().strip(), "WANDB_RESUME": "allow"}
    for name, value in (ours | {"WANDB_NAME": path.name}).items():
        os.environ.setdefault(name, value)
    if arguments.run_name is not None:
        os.environ["WANDB_NAME"] = arguments.run_name


def cut_csv_files(folder: Path, last_step: int) -> list[str]:
    """Drop the rows after `last_step`, which the resumed run writes again; return the names of the remaining files."""
    names = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        kept = [row for row in rows if len(row) == 2 and row[0].isdecimal() and int(row[0]) <= last_step]
        if kept:
            with replaced_when_whole(path) as file:
                csv.writer(file, lineterminator="\n").writerows([header, *kept])
            names.append(path.stem)
        else:
            path.unlink()
    return names
