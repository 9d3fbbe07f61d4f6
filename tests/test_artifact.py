"""The second idea of the project, in one place: what is made is whole or absent, says what it was made from, goes on,
and refuses what changed and a second owner."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from tiny import REPOSITORY, leave_out_when_fast

from ds_embed.artifact.artifact import Artifact, inspect, is_begun
from ds_embed.artifact.durable import folder_when_whole, hold_lock, remove, replaced_when_whole
from ds_embed.settings.errors import UserError

MADE_FROM = {"files": "aa", "seed": "1"}
PARTS = 5
TOUCHES_THE_DISK = [
    "open",
    "mkdir",
    "write",
    "writelines",
    "pwrite",
    "flush",
    "close",
    "fsync",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "truncate",
    "rmtree",
]


def artifact(path, made_from=MADE_FROM, kind="letters, form 1"):
    return Artifact(path, kind, "--letters_dir", made_from)


def content(number):
    return bytes([65 + number]) * 1000


def make(path, made_from=MADE_FROM):
    """Go on with what is there: parts in one file, each saved, and a file that another writer puts there."""
    made = artifact(path, made_from)
    made.claim()
    try:
        if made.look() == "whole":
            return 0
        told = made.begin()
        kept = []
        for part in told:
            if not part.is_in(made.begun):
                break
            kept.append(part)
        made.keep(kept)
        for number in range(len(kept), PARTS):
            made.write("letters", content(number), 1000 * number, str(number))
            made.save()
        (made.begun / "index").write_text("a to e\n")
        made.publish()
        return PARTS - len(kept)
    finally:
        made.release()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "letters"
    assert make(path) == PARTS
    return contents(path)


def killed_before(call, work):
    """Do the work in a process that is killed just before its `call`-th call that touches the disk; whether it was."""
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame, event, function):
            nonlocal calls
            if event == "c_call" and function.__name__ in TOUCHES_THE_DISK:
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_each_write(tmp_path, whole):
    leave_out_when_fast()
    call, made_again = 0, []
    killed = True
    while killed:
        call += 1
        path = tmp_path / str(call) / "letters"
        killed = killed_before(call, lambda path=path: make(path))
        if path.exists():
            assert contents(path) == whole  # or absent
        made_again.append(make(path))
        assert contents(path) == whole
        assert {entry.name for entry in path.parent.iterdir()} <= {"letters", ".letters.lock"}
    # What was told of is kept: ever less is made again.
    assert made_again == sorted(made_again, reverse=True) and set(made_again) == set(range(PARTS + 1)) and call > 40


def test_killed_while_one_is_replaced_or_removed(tmp_path):
    leave_out_when_fast()

    def fill(path, text):
        with folder_when_whole(path) as folder:
            (folder / "a").write_text(text)

    for work, after in ((lambda path: fill(path, "new"), {"old", "new"}), (remove, {"old", None})):
        call, killed, seen = 0, True, set()
        while killed:
            call += 1
            path = tmp_path / f"{len(after)}{work is remove}{call}" / "model"
            fill(path, "old")
            killed = killed_before(call, lambda path=path, work=work: work(path))
            seen.add((path / "a").read_text() if path.exists() else None)
            fill(path, "last")
            assert (path / "a").read_text() == "last"
        # Between the two renames that replace a folder neither stands there; a half one never does.
        assert after <= seen <= after | {None}


def test_a_file_is_whole_or_as_it_was(tmp_path):
    call, killed = 0, True
    path = tmp_path / "file"
    path.write_text("old")

    def work():
        with replaced_when_whole(path) as file:
            file.write("new")

    seen = set()
    while killed:
        call += 1
        path.write_text("old")
        killed = killed_before(call, work)
        seen.add(path.read_text())
    assert seen == {"old", "new"}


@pytest.mark.parametrize("number", range(PARTS))
def test_a_damaged_part_is_made_again(tmp_path, whole, number):
    path = tmp_path / "letters"
    made = artifact(path)
    made.begin(anew=True)
    for other in range(PARTS):
        made.write("letters", content(other), 1000 * other, str(other))
    made.save()
    assert is_begun(path)
    letters = bytearray((made.begun / "letters").read_bytes())
    letters[1000 * number + 500] ^= 1
    (made.begun / "letters").write_bytes(letters)
    assert make(path) == PARTS - number
    assert contents(path) == whole and not is_begun(path)


def test_every_byte_of_the_whole_counts(tmp_path, whole):
    path = tmp_path / "letters"
    make(path)
    for name in whole:
        for position in range(0, len(whole[name]), 1 if name == "manifest.json" else 97):
            changed = bytearray(whole[name])
            changed[position] ^= 1 << position % 8
            (path / name).write_bytes(changed)
            assert name in inspect(path, "letters, form 1")[0], (name, position)
        (path / name).write_bytes(whole[name])
    assert inspect(path, "letters, form 1")[0] is None
    for name in whole:
        (path / name).rename(tmp_path / "away")
        assert inspect(path, "letters, form 1")[0] == f"{name} is missing"
        with pytest.raises(UserError, match=f"letters: {name} is missing; remove .* or choose another --letters_dir"):
            make(path)
        shutil.move(tmp_path / "away", path / name)
    with pytest.raises(
        UserError, match="letters: holds letters, form 1, and this version of ds_embed reads letters, form 2"
    ):
        artifact(path, kind="letters, form 2").look()


@pytest.mark.parametrize("state", ["whole", "begun"])
def test_what_changed_is_refused_by_name(tmp_path, state):
    path = tmp_path / "letters"
    if state == "whole":
        make(path)
    else:
        artifact(path).begin()
    now = artifact(path, {"files": "bb", "seed": "1"})
    with pytest.raises(
        UserError, match="letters was made from something else: files was aa and is bb. Put that back, rem"
    ):
        now.look()
    with pytest.raises(UserError, match="; --accept_changes files goes on all the same"):
        now.look(acceptable=["files"])
    with pytest.raises(UserError, match="--accept_changes size: no such name; known are files"):
        now.look(["size"], acceptable=["files"])
    assert now.look(["files"], acceptable=["files"]) == state
    assert artifact(path).look() == state


def test_a_second_owner_is_refused_and_told_of_the_first(tmp_path):
    code = (
        "import pathlib, sys; from ds_embed.artifact.durable import hold_lock; "
        "lock = hold_lock(pathlib.Path(sys.argv[1]), '--letters_dir'); print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "letters"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.stdout.readline() == "held\n"
    owner = rf"--letters_dir {tmp_path}/letters: in use by another job \(process {process.pid} on "
    with pytest.raises(UserError, match=owner):
        artifact(tmp_path / "letters").claim()
    process.kill()
    process.wait()
    hold_lock(tmp_path / "letters", "--letters_dir").close()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if result.returncode:
        pytest.skip(f"a real full disk needs the right to mount: {result.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_keeps_what_was_saved(small_disk):
    path = small_disk / "letters"
    made = artifact(path)
    made.begin()
    saved = 0
    message = r"letters could not be written \(No space left on device; 0 MiB are free there\); \d parts stay. Cure"
    with pytest.raises(UserError, match=message):
        for number in range(50):
            with made.or_named(str(path), f"{saved} parts stay"):
                made.write("letters", content(number) * 9, 9000 * number, str(number))
                made.save()
            saved += 1
    assert 3 < saved < 8 and not path.exists()
    kept = [part for part in artifact(path).begin() if part.is_in(artifact(path).begun)]
    assert [part.name for part in kept] == [str(number) for number in range(saved)]
    with pytest.raises(UserError, match="--letters_dir: .*letters needs .* GiB and has 0.0 GiB free"):
        made.check_room(10**6)
    made.discard()
    assert list(small_disk.iterdir()) == []
