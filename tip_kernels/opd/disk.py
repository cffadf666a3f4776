"""Files that outlive a crash, one writer a folder, and what cannot be written said in one line.

A rename is atomic, but neither it nor what was renamed is on the disk before fsync says so. So whatever others will
find is written beside its place, synced, renamed into it, and the folder that holds the name is synced last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tip_kernels.inspect.usage import UsageError

LOCK = "run.lock"


class Claim:
    """The right to write to a folder, of one process at a time: a lock that the system takes back when that ends."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, FileLock(folder / LOCK, blocking=False)

    def take(self) -> None:
        """Make the folder and hold it from here on; UsageError where another run does or where that cannot be."""
        if self.lock.is_locked:
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire()
            except Timeout:
                raise UsageError(
                    f"argument --output: expected a folder that no other run writes to, got {str(self.folder)!r},"
                    " where one is under way"
                ) from None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_) -> None:
        self.lock.release()


@contextmanager
def writing(path: Path, argument: str = "--output") -> Iterator[None]:
    """A disk that is full, a folder that may not be written to and the like are a UsageError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        at = getattr(error, "filename", None) or path
        raise UsageError(f"argument {argument}: expected files that can be written, got {reason}: {at}") from None


@contextmanager
def reading(path: Path, argument: str) -> Iterator[None]:
    """A file that is not there or cannot be read is a UsageError that names it."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or path}"
        raise UsageError(f"argument {argument}: expected files that can be read in {path}, got {reason}") from None


def write_text(path: Path, text: str) -> None:
    """Write or replace a file in one go."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


def publish(partial: Path, target: Path) -> None:
    """A folder that was written under another name beside it takes its place, with all that is in it on the disk."""
    with writing(target):
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        remove(target)
        os.replace(partial, target)
        sync(target.parent)


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, are on the disk when this returns."""
    if path.is_dir() and os.name == "nt":  # which cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(folder: Path) -> None:
    """A folder and what is in it; of a link, the link alone."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
