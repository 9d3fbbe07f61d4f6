"""Requests to stop: SIGTERM and SIGUSR1, which schedulers send some time before killing a job, and Ctrl-C."""

import logging
import os
import signal
from types import FrameType

from ds_embed.job.ranks import STOP_SIGNALS, World

_NOTED = (*STOP_SIGNALS, signal.SIGINT)

logger = logging.getLogger(__name__)


class StopRequest:
    """Records this rank's signals inside its `with` block; `agreed()` tells all ranks at the same step.

    A second signal has no effect, since launchers and schedulers often send one each. A second Ctrl-C or SIGKILL ends
    the run at once.
    """

    def __init__(self, world: World):
        self.world = world
        self.received = 0  # the first signal's number
        self._before: list = []

    def __enter__(self) -> "StopRequest":
        self._before = [signal.signal(number, self._note) for number in _NOTED]
        return self

    def __exit__(self, *_) -> None:
        for number, handler in zip(_NOTED, self._before):
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            if self.world.is_main:
                os.write(2, b"\nCtrl-C: the run stops after this step and is saved; a second one ends it at once\n")

    def agreed(self, told: float | None = None) -> str | None:
        """The name of a signal that some rank received, or None; the same on all ranks, which must all call it.

        told: the largest `received` of all ranks, if they have already exchanged it.
        """
        number = int(self.world.max([float(self.received)])[0] if told is None else told)
        return signal.Signals(number).name if number else None
