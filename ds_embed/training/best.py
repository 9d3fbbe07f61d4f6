"""The best validations of a run: which checkpoints to keep, and when early stopping ends training.

Plain numbers, the same on every rank, stored in each checkpoint's state.json.
"""

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

LOWER_IS_BETTER = ("val_loss",)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A checkpoint that is kept because its validation was among the best."""

    step: int
    consumed_samples: int
    value: float  # of the metric


@dataclass
class BestValidations:
    """metric: the name of the metric, or None without validation; data: a hash of the validation files."""

    metric: str | None = None
    data: str = ""
    top_k: int = 0
    load_at_end: bool = False
    patience: int = 0  # validations; 0 never stops
    min_delta: float = 0.0
    kept: list[Kept] = field(default_factory=list)  # the best first; among equals the earlier
    reference: float | None = None  # the value that early stopping needs to see exceeded
    num_without_better: int = 0  # validations in a row
    last_validation: int = -1  # step

    def add(self, step: int, consumed_samples: int, value: float) -> bool:
        """Record a validation; True if its checkpoint is among the `top_k` best and should be kept.

        The validation before training is ignored: it has no checkpoint.
        """
        self.last_validation = step
        if step == 0:
            return False
        if self._is_better(value, self.reference, self.min_delta):
            self.reference, self.num_without_better = value, 0
        else:
            self.num_without_better += 1
        if value == value:  # NaN is never among the best
            better = [other for other in self.kept if not self._is_better(value, other.value)]
            worse = self.kept[len(better) :]
            self.kept = [*better, Kept(step, consumed_samples, value), *worse][: self.top_k]
        return step in self.steps

    def _is_better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        if than is None:
            return value == value
        return value < than - by if self.metric in LOWER_IS_BETTER else value > than + by

    @property
    def is_exhausted(self) -> bool:
        """Whether early stopping ends the run."""
        return 0 < self.patience <= self.num_without_better

    @property
    def steps(self) -> set[int]:
        """The steps of the checkpoints to keep."""
        return {kept.step for kept in self.kept}

    @property
    def to_load(self) -> Kept | None:
        """The checkpoint from which the final model is made; None: the last step."""
        return self.kept[0] if self.load_at_end and self.kept else None

    def describe(self) -> str:
        """Describe the best so far, for the terminal."""
        if not self.kept:
            return ""
        return f"best {self.metric} {self.kept[0].value:.4f} at step {self.kept[0].step}, "

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON content."""
        names = ("metric", "data", "reference", "num_without_better", "last_validation")
        return {name: getattr(self, name) for name in names} | {"kept": [asdict(kept) for kept in self.kept]}

    def restored(self, state: dict[str, Any] | None, steps_on_disk: set[int]) -> "BestValidations":
        """These settings with the history in `state`, restricted to checkpoints that still exist.

        Values of another metric or other files can't be compared; in that case the search starts over.
        """
        if state is None:
            return self
        if self.metric is not None and (state["metric"], state["data"]) != (self.metric, self.data):
            if state["metric"] is not None:
                logger.warning(
                    "warning: the best checkpoints so far were chosen by %s, which can't be compared with %s on the "
                    "current files; the search for the best checkpoints starts over",
                    state["metric"],
                    self.metric,
                )
            return replace(self, last_validation=state["last_validation"])
        kept = [Kept(**kept) for kept in state["kept"] if kept["step"] in steps_on_disk]
        if lost := {kept["step"] for kept in state["kept"]} - steps_on_disk:
            logger.warning("warning: the checkpoint of step %s was among the best, but it no longer exists", min(lost))
        # If this job does not validate, the earlier best are kept.
        top_k = self.top_k if self.metric is not None else len(kept)
        return replace(self, **state | {"top_k": top_k, "kept": kept[:top_k]})
