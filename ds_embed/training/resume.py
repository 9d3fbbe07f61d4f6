"""Where a run starts: at its newest complete checkpoint, at the beginning, or not at all because it is finished."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_embed.artifact.durable import remove_unfinished, set_aside
from ds_embed.artifact.identity import check_unchanged
from ds_embed.models.card import CARD_NAME
from ds_embed.models.checkpoint import damage, list_checkpoints, read_state
from ds_embed.settings.errors import UserError
from ds_embed.training.best import BestValidations
from ds_embed.training.checkpoint import made_from
from ds_embed.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """The position from which a run continues; the defaults are those of a new run."""

    step: int = 0  # the last step taken
    consumed_samples: int = 0
    skipped_steps: int = 0
    best: BestValidations = field(default_factory=BestValidations)
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    damaged: tuple[Path, ...] = ()  # newer checkpoints that failed verification
    is_finished: bool = False


def find_start(
    folder: RunFolder,
    fingerprint: dict[str, str],
    accepted: list[str],
    max_steps: int,
    best: BestValidations | None = None,
) -> Start:
    """Choose the newest undamaged checkpoint and check that it belongs to this run; called on rank 0.

    `best` holds this job's settings (None: nothing is measured); the run's history comes from the checkpoint. UserError
    if all checkpoints are damaged, if the fingerprint differs in a name that is not in `accepted`, or if the run has
    already trained more than max_steps.
    """
    best = best or BestValidations()
    checkpoints = list_checkpoints(folder.checkpoints_dir)
    if not checkpoints:
        return _without_checkpoint(folder, best)
    problems = {}
    for step, path in checkpoints:
        problem = damage(path)
        if problem is None:
            break
        problems[path] = problem
        logger.warning("warning: %s is damaged (%s) and is skipped", path, problem)
    else:
        found = "; ".join(f"{path.name}: {problem}" for path, problem in problems.items())
        raise UserError(
            f"--output_dir {folder.path}: all of its checkpoints are damaged ({found}). Restore their files, or remove "
            f"{folder.checkpoints_dir} to start from scratch"
        )
    state = read_state(path)
    check_unchanged(folder.path, made_from(path), fingerprint, accepted, "--output_dir", acceptable=fingerprint)
    if step > max_steps:
        raise UserError(
            f"--max_steps {max_steps}: {path} has already trained {step} steps; "
            "set it to at least that many or choose another --output_dir"
        )
    best = best.restored(state["best"], {step for step, _ in checkpoints})
    model = best.to_load
    start = Start(
        step=step,
        consumed_samples=state["consumed_samples"],
        skipped_steps=state["skipped_steps"],
        best=best,
        checkpoint=path,
        state=state,
        damaged=tuple(problems),
        is_finished=(step == max_steps or best.is_exhausted)
        and _model_samples(folder) == (model.consumed_samples if model else state["consumed_samples"]),
    )
    if start.is_finished:
        logger.info(
            "%s: already finished at step %d, the model is in %s; to train further, raise %s",
            folder.path,
            step,
            folder.model_dir,
            "--max_steps" if step == max_steps else "--early_stopping_patience",
        )
        return start
    logger.info("resuming from %s: step %d of %d, sample %d", path, step, max_steps, start.consumed_samples)
    if state["max_steps"] != max_steps:
        logger.info(
            "from here on, the learning rate follows a schedule of %d steps; so far it followed one of %d steps",
            max_steps,
            state["max_steps"],
        )
    return start


def clear_way(folder: RunFolder, start: Start) -> None:
    """Rename damaged checkpoints that are in the way; called on rank 0 once the run is certain to start."""
    remove_unfinished(folder.checkpoints_dir, inside=True)
    for path in start.damaged:
        logger.warning("warning: the damaged checkpoint is kept as %s", set_aside(path))


def _without_checkpoint(folder: RunFolder, best: BestValidations) -> Start:
    if folder.model_dir.exists():
        raise UserError(
            f"--output_dir {folder.path}: contains a finished run without checkpoints, which can't be resumed; "
            "remove it or choose another folder"
        )
    if folder.held_run:
        logger.info("%s: the run was stopped before its first checkpoint and starts again from step 1", folder.path)
    return Start(best=best)


def _model_samples(folder: RunFolder) -> int | None:
    """How many samples the model in RUN/model/ was trained on, or None if there is no model."""
    path = folder.model_dir / CARD_NAME
    return json.loads(path.read_text("utf-8"))["consumed_samples"] if path.exists() else None
