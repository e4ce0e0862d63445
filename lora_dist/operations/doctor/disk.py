"""Checks `disk` and `space`: does the run folder's file system keep the promises that checkpoints are published by?

A checkpoint is whole or not there because a folder is renamed over a free name and a file is replaced by `os.replace`; it survives a
crash because files and folders are flushed; two runs keep out of each other's folder by a lock. Each is tried, with a second process
looking on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_dist.operations.doctor import peer
from lora_dist.operations.doctor.context import Context
from lora_dist.operations.doctor.report import Finding, fail, ok, size_text, skip, time_text, warn
from lora_dist.process import flush

RENAMES = 100
RENAME_LIMIT_S = 20.0
PEER_LIMIT_S = 30.0
SLOW_FLUSH_S = 0.5
CLOCK_OFF_S = 2.0
LOW_SPACE_BYTES = 1 << 30
LOW_INODES = 10_000
KEPT = 4
"""checkpoints that a run holds by default at most for a moment: two, the best, and the one that is being written"""
NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "fuse.sshfs", "fuse.juicefs", "9p", "afs", "wekafs")
PASSING = {
    "tmpfs": ("is memory: gone with the machine, and it takes the memory that training needs", "a folder on a disk"),
    "ramfs": ("is memory: gone with the machine, and it takes the memory that training needs", "a folder on a disk"),
    "overlay": ("is a container's own layer: gone with the container", "a mounted folder (docker run -v /data/runs:/runs)"),
}


@dataclass(frozen=True)
class Mount:
    """Attributes:
    kind: of file system, as the system names it (`ext4`, `nfs4`).
    """

    point: str
    kind: str
    source: str
    options: tuple[str, ...]


def mount_of(folder: Path, mounts_text: str) -> Mount | None:
    """What a folder is on, from the text of /proc/mounts; of several on one point the last is in force."""
    found: Mount | None = None
    real = folder.resolve()
    for line in mounts_text.splitlines():
        parts = [re.sub(r"\\(\d{3})", lambda octal: chr(int(octal.group(1), 8)), part) for part in line.split()]
        if len(parts) < 4 or not real.is_relative_to(parts[1]):
            continue
        if found is None or len(parts[1]) >= len(found.point):
            found = Mount(parts[1], parts[2], parts[0], tuple(parts[3].split(",")))
    return found


def check_disk(context: Context) -> Generator[Finding, None, None]:
    folder = context.folder
    yield _kind(folder, Path(context.args.output_dir))
    try:
        with scratch(folder) as inside:
            yield _clock(inside)
            yield _flush_times(inside)
            yield check_publishing(inside)
            yield check_lock(inside)
    except OSError as error:
        yield cannot_write(folder, error)


def cannot_write(folder: Path, error: OSError) -> Finding:
    return fail(
        "write",
        f"{folder} cannot be written ({error.strerror})",
        "--output_dir in a folder that is yours to write, with free space (df -h)",
    )


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder to write in, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder, ignore_cleanup_errors=True) as inside:
        yield Path(inside)


def _kind(folder: Path, asked: Path) -> Finding:
    where = str(asked) if asked.is_dir() else f"{folder} ({asked} is not there yet)"
    try:
        mount = mount_of(folder, Path("/proc/mounts").read_text())
    except OSError:
        mount = None
    if mount is None:
        return ok("file system", where)
    text = f"{where}: {mount.kind} from {mount.source}"
    if mount.kind in PASSING:
        what, remedy = PASSING[mount.kind]
        return warn("file system", f"{where}: {mount.kind}, which {what}", f"--output_dir {remedy}")
    if mount.kind == "lustre" and "flock" not in mount.options:
        return warn(
            "file system", f"{text} without flock", "mount with -o flock: two runs in one folder would not notice each other"
        )
    if mount.kind in NETWORK:
        return ok("file system", f"{text}; other machines may see a checkpoint some seconds late")
    return ok("file system", text)


def _clock(inside: Path) -> Finding:
    file = inside / "clock"
    before = time.time()
    file.touch()
    off_s = file.stat().st_mtime - (before + time.time()) / 2
    if abs(off_s) > CLOCK_OFF_S:
        way = "ahead of" if off_s > 0 else "behind"
        return warn(
            "file times",
            f"the file server's clock is {time_text(abs(off_s))} {way} this machine's",
            "timedatectl set-ntp true on both",
        )
    return ok("file times", f"within {time_text(max(abs(off_s), 0.001))} of this machine's clock")


def _flush_times(inside: Path) -> Finding:
    times: dict[str, list[float]] = {"file": [], "folder": []}
    for number in range(5):
        file = inside / f"flush-{number}"
        file.write_bytes(os.urandom(1 << 16))
        for name, path in (("file", file), ("folder", inside)):
            start = time.perf_counter()
            try:
                flush(path)
            except OSError as error:
                return fail(
                    "flush",
                    f"a {name} cannot be flushed ({error.strerror})",
                    "--output_dir on another file system: a crash may lose a checkpoint",
                )
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    text = f"file {time_text(medians['file'])}, folder {time_text(medians['folder'])} (median of 5)"
    if max(medians.values()) > SLOW_FLUSH_S:
        return warn("flush", text, "--output_dir on a faster disk: every checkpoint flushes about 8 times")
    return ok("flush", text)


def publish(staging: Path, final: Path, number: int) -> None:
    """As checkpoints are: written under another name, then renamed."""
    staging.mkdir()
    for name in peer.FILES:
        (staging / name).write_text(peer.content(number))
    os.rename(staging, final)


def replace(temporary: Path, final: Path, number: int) -> None:
    """As single files are."""
    temporary.write_text(peer.content(number))
    os.replace(temporary, final)


def check_publishing(
    inside: Path,
    publish: Callable[[Path, Path, int], None] = publish,
    replace: Callable[[Path, Path, int], None] = replace,
) -> Finding:
    """Publish folders and replace a file, with another process looking on that must never see half of one.

    Args:
        publish, replace: how; given by tests that want it to fail.
    """
    folder = inside / "publishing"
    folder.mkdir()
    replace(folder / ".status", folder / peer.STATUS, 0)
    with subprocess.Popen(peer.command("watch", folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        try:
            _wait_for(folder / peer.READY, watcher)
            start, done = time.monotonic(), 0
            while done < RENAMES and time.monotonic() - start < RENAME_LIMIT_S:
                publish(folder / f".staging-{done}", folder / f"{peer.PUBLISHED}{done}", done)
                replace(folder / ".status", folder / peer.STATUS, done)
                done += 1
            time_s = time.monotonic() - start
            (folder / peer.STOP).touch()
            output, problem = watcher.communicate(timeout=PEER_LIMIT_S)
        finally:
            watcher.kill()
    if watcher.returncode != 0:
        return fail(
            "rename",
            f"the process that looks on ended with {watcher.returncode}: {problem.strip().splitlines()[-1:]}",
            _OTHER_DISK,
        )
    return _judge_publishing(json.loads(output), done, time_s)


_OTHER_DISK = "--output_dir on another file system: a reader may take half a checkpoint for a whole one"


def _judge_publishing(seen: dict[str, object], done: int, time_s: float) -> Finding:
    text = f"{done} folders and {done} files published in {time_text(time_s)}; a second process looked {seen['reads']:,} times"
    if seen["flaws"]:
        return fail("rename", f"not atomic: {seen['first']} ({seen['flaws']} such in {done} renames)", _OTHER_DISK)
    if seen["folders"] != done:
        return fail("rename", f"another process saw {seen['folders']} of {done} renamed folders", _OTHER_DISK)
    return ok("rename", f"{text} and saw no half one")


def _wait_for(file: Path, watcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PEER_LIMIT_S
    while not file.exists():
        if watcher.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the process that looks on did not start")
        time.sleep(0.005)


def check_lock(inside: Path) -> Finding:
    """A lock that this process holds must be seen by another, and be free afterwards."""
    import fcntl

    file = inside / "lock"
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return warn(
                "lock",
                f"this file system has no locks ({error.strerror})",
                "start no second run in one run folder: it would not be noticed",
            )
        while_held = _peer_lock(file)
    after = _peer_lock(file)
    if while_held != "held":
        return fail(
            "lock",
            "a second process got a lock that is held",
            "--output_dir on another file system, or mounted with locks (NFS: local_lock=none; Lustre: flock)",
        )
    if after != "free":
        return fail(
            "lock", f"a lock that was let go is {after} for a second process", "see the NFS server's lock daemon (rpc.statd)"
        )
    return ok("lock", "seen by a second process, free afterwards")


def _peer_lock(file: Path) -> str:
    done = subprocess.run(peer.command("lock", file), capture_output=True, text=True, timeout=PEER_LIMIT_S)
    return done.stdout.strip() or f"unknown ({(done.stderr.strip().splitlines() or ['no answer'])[-1]})"


def check_space(context: Context) -> Generator[Finding, None, None]:
    found = os.statvfs(context.folder)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    size, source = context.checkpoint
    needed = KEPT * size if context.args.model else 0
    text = f"{size_text(free)} free of {size_text(total)}"
    if needed:
        text += f"; {KEPT} checkpoints of {size_text(size)} ({source}) take {size_text(needed)}"
    if free < needed:
        yield fail("space", text, "free some, --output_dir on another disk, or --r smaller")
    elif free < max(LOW_SPACE_BYTES, 2 * needed):
        yield warn(
            "space", text, "free some, or --output_dir on another disk; --train.save_total_limit 2 keeps the fewest checkpoints"
        )
    else:
        yield ok("space", text)
    if not found.f_files:
        yield skip("inodes", "this file system does not count them")
    elif found.f_favail < LOW_INODES:
        yield warn("inodes", f"{found.f_favail:,} free of {found.f_files:,}", "remove small files (df -i); a checkpoint has 7")
    else:
        yield ok("inodes", f"{found.f_favail:,} free of {found.f_files:,}")
