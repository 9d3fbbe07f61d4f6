"""Outputs made in parts: complete under their name or absent, made from named inputs, resumable, with one owner.

    PATH/              the files of the parts, and manifest.json: made_from, and the place and SHA-256 of each part
    .unfinished-NAME/  the same until it is whole, with begun.json (made_from) and parts.jsonl (a line for each part)

A part is written to disk before its line. So whatever kills a job, the parts listed in parts.jsonl exist, and a part
that is damaged nevertheless is detected by its SHA-256.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ds_embed.artifact.durable import (
    free_bytes,
    hold_lock,
    put_in_place,
    remove_unfinished,
    sha256_of,
    sync_file,
    sync_path,
    unfinished_path,
    written_or_named,
    written_whole,
)
from ds_embed.artifact.identity import check_unchanged
from ds_embed.settings.errors import UserError

MANIFEST, BEGUN, _PARTS = "manifest.json", "begun.json", "parts.jsonl"


@dataclass(frozen=True)
class Part:
    """A part: `num_bytes` bytes of a file, from `start` on."""

    file: str
    start: int
    num_bytes: int
    sha256: str
    name: str = ""  # for the code that makes it; a whole file needs none

    @property
    def end(self) -> int:
        return self.start + self.num_bytes

    def is_in(self, folder: Path) -> bool:
        """Whether the part exists, with the right content."""
        path = folder / self.file
        if not path.is_file() or path.stat().st_size < self.end:
            return False
        return sha256_of(path, self.start, self.num_bytes) == self.sha256


class Artifact:
    """A folder that is whole under its name, or begun under a hidden one; it records what it was made from.

    `kind` is its content and the version of its format; another kind is refused. `flag` is the flag that sets its path.
    The process that makes it holds its lock (`claim`) or another one that covers it. `begun` overrides the hidden path,
    for a folder of intermediate work that never becomes whole.
    """

    def __init__(
        self, path: Path, kind: str, flag: str, made_from: Mapping[str, str] | None = None, begun: Path | None = None
    ):
        self.path, self.kind, self.flag = path, kind, flag
        self.made_from = dict(made_from or {})
        self.begun = unfinished_path(path) if begun is None else begun
        self._parts: list[Part] = []
        self._unsaved: list[Part] = []
        self._files: dict[str, int] = {}  # descriptors of open files, by name
        self._lock: IO | None = None

    def claim(self) -> None:
        """Own it until this process ends or calls `release`. UserError naming the owner if it has another one."""
        self._lock = hold_lock(self.path, self.flag)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def is_there(self) -> bool:
        """Own it, and return whether it is there and whole. UserError naming a file that has been changed."""
        self.claim()
        if self.look() != "whole":
            return False
        problem, _ = inspect(self.path, self.kind)
        if problem is not None:
            raise UserError(f"{self.flag} {self.path}: {problem}; remove the folder and run again")
        return True

    def look(self, accepted: Collection[str] = (), free_when_whole: Collection[str] = (), **words: Any) -> str:
        """The state on disk: "whole", "begun" or "absent". The caller owns it.

        UserError if it was damaged, or if it was made from something else, except for names in `accepted` and, if it is
        whole, in `free_when_whole`. `words` are passed to check_unchanged.
        """
        if not self.path.exists() and (self.begun / MANIFEST).exists():
            self._put_in_place()  # a job was killed just before this rename
        if self.path.exists():
            old = read_whole(self.path, self.kind, self._again(self.path))["made_from"]
            new = self.made_from | {name: old[name] for name in free_when_whole if name in old}
            check_unchanged(self.path, old, new, accepted, self.flag, **words)
            remove_unfinished(self.path)
            return "whole"
        return self.look_begun(accepted, **words)

    def look_begun(self, accepted: Collection[str] = (), **words: Any) -> str:
        """Like `look`, for an artifact that can't be whole."""
        begun = self.begun / BEGUN
        if not begun.exists():
            for path in self.begun.iterdir() if self.begun.exists() else ():
                if not path.name.startswith("."):  # left by a version that wrote no begun.json
                    _check_kind(self.begun, {}, self.kind, self._again(self.begun))
            return "absent"
        try:
            content = json.loads(begun.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{begun}: can't be read as JSON; {self._again(self.begun)}") from None
        _check_kind(begun, content, self.kind, self._again(self.begun))
        check_unchanged(self.begun, content["made_from"], self.made_from, accepted, self.flag, **words)
        return "begun"

    def begin(self, anew: bool = False) -> list[Part]:
        """Open what was begun, or begin (`anew`: in any case), and return the recorded parts, unchecked.

        The caller checks them in order and calls `keep` with those that it continues from.
        """
        if anew:
            remove_unfinished(self.path)
        self.begun.mkdir(parents=True, exist_ok=True)
        sync_path(self.begun.parent)
        remove_unfinished(self.begun, inside=True)
        (self.begun / MANIFEST).unlink(missing_ok=True)
        text = json.dumps({"kind": self.kind, "made_from": self.made_from}, indent=1)
        begun = self.begun / BEGUN
        if not begun.exists() or begun.read_text(encoding="utf-8") != text:
            with written_whole(begun) as file:
                file.write(text)
        lines = self.begun / _PARTS
        self._parts = list(_told(lines.read_text(encoding="utf-8"))) if lines.exists() else []
        return list(self._parts)

    def keep(self, parts: Iterable[Part]) -> None:
        """Forget all parts but these."""
        self._parts = list(parts)
        with written_whole(self.begun / _PARTS) as file:
            file.writelines(_line(part) for part in self._parts)

    def write(self, file: str, content: Any, start: int = 0, name: str = "") -> None:
        """Write a part, bytes or an array, at `start` of a file; it is recorded only by `save` or `publish`."""
        left = memoryview(content).cast("B")
        # Hashed in memory, so that corruption by a bad disk is detected too.
        part = Part(file, start, left.nbytes, hashlib.sha256(left).hexdigest(), name)
        if file not in self._files:
            self._files[file] = os.open(self.begun / file, os.O_WRONLY | os.O_CREAT, 0o666)
        while left:
            written = os.pwrite(self._files[file], left, start)
            left, start = left[written:], start + written
        self._unsaved.append(part)

    def save(self) -> None:
        """Sync the parts written so far to disk, and only then record them."""
        self._close_files()
        if not self._unsaved:
            return
        sync_path(self.begun)
        with open(self.begun / _PARTS, "a", encoding="utf-8") as file:
            file.writelines(_line(part) for part in self._unsaved)
            sync_file(file)
        self._parts, self._unsaved = self._parts + self._unsaved, []

    def drop(self, file: str) -> None:
        """Remove a file and its parts, which were only needed for resuming."""
        self.save()
        self._parts = [part for part in self._parts if part.file != file]
        (self.begun / file).unlink(missing_ok=True)

    def seal(self) -> None:
        """Save all parts; each file that other code wrote into the folder becomes a part. `publish` does this too."""
        self.save()
        known = {part.file for part in self._parts} | {BEGUN, _PARTS, MANIFEST}
        for path in sorted(self.begun.iterdir()):
            if path.name not in known:
                sync_path(path)
                self._parts.append(Part(path.name, 0, path.stat().st_size, sha256_of(path)))
        self._parts.sort(key=lambda part: (part.file, part.start))
        with written_whole(self.begun / MANIFEST, binary=True) as file:
            file.write(_manifest(self.kind, self.made_from, [asdict(part) for part in self._parts]))

    def publish(self) -> None:
        """Make it whole: sync everything to disk and give it its name, replacing any previous one."""
        if not (self.begun / MANIFEST).exists():
            self.seal()
        self._put_in_place()

    def discard(self) -> None:
        """Remove what was begun, after an error that leaves nothing worth keeping."""
        self._close_files(sync=False)
        remove_unfinished(self.path)

    def check_room(self, num_bytes: int) -> None:
        """UserError if the disk has no room for `num_bytes` in total."""
        more = num_bytes - sum(path.stat().st_blocks * 512 for path in self.begun.iterdir())
        if more > (free := free_bytes(self.begun)):
            raise UserError(
                f"{self.flag}: {self.path} needs {more / 2**30:,.1f} GiB and has {free / 2**30:,.1f} GiB free; "
                "make room or choose another place"
            )

    @contextmanager
    def or_named(self, what: str, kept: str) -> Iterator[None]:
        """Turn disk errors inside the block into a UserError with what is made, what is free and what is kept."""
        with written_or_named(self.path, f"{kept}. Cure that and start the same command again", what):
            yield

    def _put_in_place(self) -> None:
        for name in (BEGUN, _PARTS):
            (self.begun / name).unlink(missing_ok=True)
        sync_path(self.begun)
        put_in_place(self.begun, self.path)

    def _close_files(self, sync: bool = True) -> None:
        for file in list(self._files):
            descriptor = self._files.pop(file)
            try:
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _again(self, path: Path) -> str:
        return f"remove {path} and start the same command again, or choose another {self.flag}"


def read_whole(path: Path, kind: str, cure: str) -> dict[str, Any]:
    """The manifest of a whole artifact, after checking the sizes of its files.

    UserError with the `cure` if it is damaged, or of another kind or version.
    """
    problem, manifest = inspect(path, kind, every_byte=False, cure=cure)
    if problem is not None:
        raise UserError(f"{path}: {problem}; {cure}")
    return manifest


def inspect(
    path: Path, kind: str, every_byte: bool = True, cure: str = "go on with the version that wrote it"
) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a whole artifact, naming the file (None: nothing), and its manifest, with parts as `Part`s.

    Compares hashes of the content, or only sizes unless `every_byte`. UserError if it is of another kind or version.
    """
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if "format_version" not in manifest:  # earlier versions wrote one, and no hash of the manifest
            if text != _manifest(manifest["kind"], manifest["made_from"], manifest["parts"]):
                return f"{MANIFEST} was changed", {}
        _check_kind(path, manifest, kind, cure)
        parts = [Part(**part) for part in manifest["parts"]]
        ends: dict[str, int] = {}
        for part in parts:
            ends[part.file] = max(part.end, ends.get(part.file, 0))
        for name, num_bytes in ends.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing", {}
            if file.stat().st_size != num_bytes:
                return f"{name} has {file.stat().st_size:,} bytes and was written with {num_bytes:,}", {}
        for part in parts if every_byte else ():
            if not part.is_in(path):
                return f"{part.file} was changed: its SHA-256 is not the one it was written with", {}
        return None, manifest | {"parts": parts}
    except UserError:
        raise
    except FileNotFoundError:
        return f"{MANIFEST} is missing", {}
    except OSError as error:
        return f"can't be read: {error}", {}
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} can't be read as JSON", {}


def is_begun(path: Path) -> bool:
    """Whether the artifact `path` was begun and is not whole."""
    return not path.exists() and unfinished_path(path).is_dir()


def _check_kind(path: Path, content: Mapping[str, Any], kind: str, cure: str) -> None:
    if content.get("kind") != kind:
        found = content.get("kind", "what another version of ds_embed wrote")
        raise UserError(f"{path}: holds {found}, and this version of ds_embed reads {kind}; {cure}")


def _manifest(kind: str, made_from: Mapping[str, str], parts: list[dict[str, Any]]) -> bytes:
    """The text of the manifest, unique for its content; it includes its own hash, so that changes are detected."""
    content = {"kind": kind, "made_from": made_from, "parts": parts}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps(content | {"sha256": own}, indent=1, sort_keys=True) + "\n").encode()


def _line(part: Part) -> str:
    return json.dumps(asdict(part)) + "\n"


def _told(text: str) -> Iterator[Part]:
    """The parts recorded in `text`, up to a line that was cut off by a crash."""
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith("\n"):
                return
            yield Part(**json.loads(line))
        except (ValueError, TypeError):
            return
