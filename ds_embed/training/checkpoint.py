"""Saves an engine to checkpoints and loads it from them; models/checkpoint.py describes their content."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_embed.artifact.artifact import Artifact, read_whole
from ds_embed.artifact.durable import remove
from ds_embed.job.ranks import World
from ds_embed.models.checkpoint import KIND, STATE, WEIGHT, CheckpointReader, checkpoint_path, list_checkpoints
from ds_embed.training.engine_state import adam_step, gather_state, restore_state, trained_shapes

MAX_SHARD_BYTES = 2**30  # rank 0 holds about two shards of each kind in memory while it writes


def save_checkpoint(
    engine: Any,
    world: World,
    folder: Path,
    step: int,
    state: dict[str, Any],
    before: Callable[[], None],
    made_from: Mapping[str, str] | None = None,
) -> None:
    """Write `folder`/step_XXXXXXXX from all ranks. Every rank must call it.

    `state` is JSON content stored with the tensors; `made_from` is what the run is made from; `before` runs on rank 0
    just before the checkpoint appears. UserError naming the step if it can't be written; earlier checkpoints are
    untouched.
    """
    state = {"step": step, "adam_step": adam_step(engine), **state}
    problem: OSError | None = None
    writer: CheckpointWriter | None = None
    # After an error rank 0 still takes part in the gathering, so that no rank waits for it in a collective.
    for name, tensors in gather_state(engine, world):
        if not world.is_main or problem is not None:
            continue
        try:
            writer = writer or CheckpointWriter(folder, step, made_from)
            for kind, tensor in tensors.items():
                writer.add(name, kind, tensor)
        except OSError as error:
            problem = error

    def publish() -> None:
        known = list_checkpoints(folder)
        kept = f"the checkpoint of step {known[0][0]} is intact" if known else "there is no earlier checkpoint"
        artifact = Artifact(checkpoint_path(folder, step), KIND, "--output_dir")
        with artifact.or_named(f"--output_dir {folder.parent}: the checkpoint of step {step}", kept):
            try:
                if problem is not None:
                    raise problem
                writer.finish(state)
                before()
                writer.publish()
            except OSError:
                artifact.discard()
                raise

    world.on_main(f"save {folder} step {step}", publish)


def load_checkpoint(engine: Any, world: World, path: Path, state: dict[str, Any]) -> None:
    """Load the verified checkpoint at `path` into the engine. Every rank must call it; only rank 0 reads.

    UserError if its weights are not those that this model trains.
    """
    shapes = trained_shapes(engine)
    reader: CheckpointReader | None = None

    def open_and_check() -> None:
        nonlocal reader
        reader = CheckpointReader(path)
        reader.check(shapes, "use the model and LoRA settings of that run, or choose another --output_dir")

    world.on_main(f"open {path}", open_and_check)
    restore_state(engine, world, state["adam_step"], reader.read if reader else None)


def made_from(path: Path) -> dict[str, str]:
    """What the run of a verified checkpoint is made from."""
    return read_whole(path, KIND, "start the same command again")["made_from"]


def prune(folder: Path, keep: int, protected: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `protected`; `keep` 0 deletes none."""
    for step, path in list_checkpoints(folder)[keep:] if keep else []:
        if step in protected:
            continue
        remove(path)


class CheckpointWriter:
    """Writes tensors to a checkpoint in shards and finally makes it whole."""

    def __init__(
        self,
        folder: Path,
        step: int,
        made_from: Mapping[str, str] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self._artifact = Artifact(checkpoint_path(folder, step), KIND, "--output_dir", made_from)
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
        self._num_shards = {"weights": 0, "moments": 0}
        self._artifact.begin(anew=True)

    def add(self, name: str, kind: str, tensor: Tensor) -> None:
        stem = "weights" if kind == WEIGHT else "moments"
        pending = self._pending[stem]
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > self._max_shard_bytes:
            self._write_shard(stem)
        self._pending[stem][name if kind == WEIGHT else f"{name}/{kind}"] = tensor

    def _write_shard(self, stem: str) -> None:
        from safetensors.torch import save

        self._num_shards[stem] += 1
        self._artifact.write(f"{stem}-{self._num_shards[stem]:05d}.safetensors", save(self._pending[stem]))
        self._pending[stem] = {}

    def finish(self, state: dict[str, Any]) -> None:
        """Write everything to disk; `state` is JSON content."""
        for stem, pending in self._pending.items():
            if pending:
                self._write_shard(stem)
        self._artifact.write(STATE, (json.dumps(state, indent=1) + "\n").encode())
        self._artifact.seal()

    def publish(self) -> Path:
        """Give the checkpoint its name."""
        self._artifact.publish()
        return self._artifact.path
