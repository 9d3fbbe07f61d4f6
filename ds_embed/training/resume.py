"""Where a run starts: at its newest whole checkpoint, at the beginning, or not at all because it is done."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_embed.artifact.durable import remove_all_unfinished, set_aside
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
    """The place in a run to go on from; a new run's is the default."""

    step: int = 0  # the last step taken
    consumed_samples: int = 0
    skipped_steps: int = 0
    best: BestValidations = field(default_factory=BestValidations)
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    damaged: tuple[Path, ...] = ()  # newer checkpoints that did not verify
    is_finished: bool = False


def find_start(
    folder: RunFolder,
    fingerprint: dict[str, str],
    accepted: list[str],
    max_steps: int,
    best: BestValidations | None = None,
) -> Start:
    """Choose the newest checkpoint that verifies and check that it belongs to this run; rank 0 calls it.

    `best` holds this job's settings (None: nothing is measured); the run's history of it comes with the checkpoint.
    UserError when there are checkpoints and none is whole, when the run differs in a name that is not
    in `accepted`, or when it has trained more than max_steps.
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
            f"--output_dir {folder.path}: it has checkpoints and none of them is whole ({found}). Bring back their "
            f"files, or remove {folder.checkpoints_dir} to start afresh"
        )
    state = read_state(path)
    check_unchanged(folder.path, made_from(path), fingerprint, accepted, "--output_dir", acceptable=fingerprint)
    if step > max_steps:
        raise UserError(
            f"--max_steps {max_steps}: {path} has trained {step} steps already; "
            "give at least that many or choose another --output_dir"
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
            "%s: finished at step %d already, the model is in %s; a higher %s trains on",
            folder.path,
            step,
            folder.model_dir,
            "--max_steps" if step == max_steps else "--early_stopping_patience",
        )
        return start
    logger.info("resuming from %s: step %d of %d, sample %d", path, step, max_steps, start.consumed_samples)
    if state["max_steps"] != max_steps:
        logger.info(
            "the learning rate follows the schedule of %d steps from here on; until here it was that of %d",
            max_steps,
            state["max_steps"],
        )
    return start


def clear_way(folder: RunFolder, start: Start) -> None:
    """Put aside what the resumed run would stumble over; rank 0 calls it once the run is sure to start."""
    remove_all_unfinished(folder.checkpoints_dir)
    for path in start.damaged:
        logger.warning("warning: the damaged checkpoint is kept as %s", set_aside(path))


def _without_checkpoint(folder: RunFolder, best: BestValidations) -> Start:
    if folder.model_dir.exists():
        raise UserError(
            f"--output_dir {folder.path}: holds a finished run without checkpoints, which can't go on; "
            "remove it or choose another folder"
        )
    if folder.held_run:
        logger.info("%s: the run there was stopped before its first checkpoint; it starts from step 1", folder.path)
    return Start(best=best)


def _model_samples(folder: RunFolder) -> int | None:
    """How many samples the model in RUN/model/ was trained on, None when there is none."""
    path = folder.model_dir / CARD_NAME
    return json.loads(path.read_text("utf-8"))["consumed_samples"] if path.exists() else None
