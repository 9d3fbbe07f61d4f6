"""A folder of vectors as it stands on disk: whole under its name, unfinished under a hidden one beside it.

    test_docs/doc.npy                  float32 (n, D)
    test_docs/doc.ids                  line i is the id of row i
    test_docs/manifest.json            sizes of both, n, D, and what decides the rows (made_from)
    .unfinished-test_docs/             the rows so far and progress.json, until a rename makes them whole

Here is what rank 0 does with such folders; vectors_writer fills them while texts are encoded.
"""

import io
import json
import logging
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.artifact.durable import replaced_when_whole, sync_and_close, sync_path
from ds_embed.data.store import TextStore
from ds_embed.models.identity import list_changes
from ds_embed.settings.encode_arguments import ROUNDING_SETTINGS
from ds_embed.settings.errors import UserError
from ds_embed.vectors.vectors import UNFINISHED_PREFIX

FORMAT_VERSION = 1
MANIFEST, PROGRESS = "manifest.json", "progress.json"

logger = logging.getLogger(__name__)


def unfinished_folder(target: Path) -> Path:
    return target.with_name(UNFINISHED_PREFIX + target.name)


def npy_header(num_rows: int, num_dims: int) -> bytes:
    """What stands before the rows in a .npy file of float32 (num_rows, num_dims)."""
    buffer = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, num_dims)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()


def is_finished(target: Path, name: str, made_from: dict[str, str], accepted: list[str]) -> bool:
    """Whether `target` stands there whole; False also when it is to be begun, or to be gone on with.

    UserError when it, or its unfinished folder, was made from something else, apart from names in
    `accepted`, or when it is not as it was written.
    """
    unfinished = unfinished_folder(target)
    if target.exists():
        # Whole rows were all computed in one way, whichever the machine here would take.
        old = read_manifest(target, name)["made_from"]
        check_unchanged(target, old, made_from | kernels_of(old), accepted)
        (target / PROGRESS).unlink(missing_ok=True)  # killed between the rename and this
        shutil.rmtree(unfinished, ignore_errors=True)  # of a job that merged shards instead
        return True
    progress = read_progress(unfinished)
    if progress is not None:
        check_unchanged(unfinished, progress["made_from"], made_from, accepted)
    return False


def kernels_of(made_from: dict[str, str]) -> dict[str, str]:
    """How the rows of a folder were computed, where that was written down."""
    return {name: value for name, value in made_from.items() if name == "kernels"}


def check_unchanged(path: Path, old: dict[str, str], new: dict[str, str], accepted: list[str]) -> None:
    """UserError with every difference in what decides the rows that `accepted` does not name."""
    changes = list_changes(old, new)
    refused = [name for name in changes if name not in accepted]
    if refused:
        cure = f"Put that back, remove {path} to encode again, or choose another --output_prefix"
        if set(refused) <= set(ROUNDING_SETTINGS):
            cure += f"; --accept_changes {' '.join(refused)} goes on with rows that differ by rounding"
        raise UserError(f"{path} was made from something else: {'; '.join(changes[name] for name in refused)}. {cure}")
    for name in changes:
        logger.warning("warning: %s: accepted although rows may differ by rounding: %s", path, changes[name])


def read_manifest(target: Path, name: str) -> dict[str, Any]:
    """The manifest of a whole folder. UserError, with the cure, when a file is missing or has another size."""
    cure = f"remove {target} and start the same command again, or choose another --output_prefix"
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        sizes = {file: (target / file).stat().st_size for file in (f"{name}.npy", f"{name}.ids")}
    except FileNotFoundError as error:
        raise UserError(f"{target}: {Path(error.filename).name} is missing; {cure}") from None
    except ValueError:
        raise UserError(f"{target}: {MANIFEST} can't be read as JSON; {cure}") from None
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(f"{target}: was written by another version of ds_embed; {cure}")
    for file, num_bytes in sizes.items():
        if num_bytes != manifest["files"][file]:
            raise UserError(
                f"{target / file}: has {num_bytes:,} bytes and was written with {manifest['files'][file]:,}; {cure}"
            )
    return manifest


def read_progress(folder: Path) -> dict[str, Any] | None:
    """progress.json of an unfinished folder, None where there is none. UserError when it can't be used."""
    path = folder / PROGRESS
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path}: can't be read as JSON; remove {folder} to encode again") from None
    if progress["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path}: was written by another version of ds_embed; remove {folder} to encode again")
    return progress


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Have the file on the disk when this returns; it is there with its old or with its new content."""
    with replaced_when_whole(path) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
    sync_path(path.parent)


def check_room(path: Path, num_bytes: int) -> None:
    """UserError when the file `path` can't grow to num_bytes on its disk."""
    held = path.stat().st_blocks * 512 if path.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if num_bytes > held + free:
        raise UserError(
            f"--output_prefix: {path.parent} needs {(num_bytes - held) / 2**30:,.1f} GiB and has {free / 2**30:,.1f} GiB "
            "free; make room or choose another place"
        )


def publish(target: Path, name: str, store: TextStore, rows: range, num_dims: int, made_from: dict | None) -> None:
    """Add the ids and the manifest to the unfinished folder, whose rows are on the disk, and give it its name."""
    folder = unfinished_folder(target)
    npy, ids = folder / f"{name}.npy", folder / f"{name}.ids"
    written, wanted = npy.stat().st_size, len(npy_header(len(rows), num_dims)) + len(rows) * num_dims * 4
    assert written == wanted, f"{npy}: {written} bytes, want {wanted}"
    with open(store.ids_path, "rb") as lines, open(ids, "wb") as file:
        file.writelines(islice(lines, rows.start, rows.stop))
        sync_and_close(file)
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_rows": len(rows),
        "num_dims": num_dims,
        "files": {path.name: path.stat().st_size for path in (npy, ids)},
        "made_from": made_from or {},
    }
    write_json(folder / MANIFEST, manifest)
    replaced = target.with_name(f".replaced-{target.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(folder, target)
    sync_path(target.parent)
    # Last: without it a job that was killed before the rename would begin anew.
    (target / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)
