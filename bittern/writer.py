"""An atomic checkpoint writer whose memory is the tensor at hand.

Everything is written into a temporary sibling of the output, ``.{name}.partial``. In it, weight files
carry the suffix .partial and there is no config.json, so that no loader opens it after a kill; commit()
gives them their names, adds index, manifest and last config.json, and renames the folder onto the output.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from bittern.disk import open_file, reserve
from bittern.errors import BitternError
from bittern.report import MANIFEST_FILE, file_record
from bittern.rope import with_old_rope
from bittern.shards import TensorInfo, header_bytes, write_elements

MAX_SHARD_SIZE = 5 * 10**9  # bytes
INDEX_FILE = "model.safetensors.index.json"
LICENCE_FILES = tuple(
    "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in name)
    for name in ("license*", "licence*", "notice*", "copying*", "use_policy*")
)
"""Names, in upper or lower case, of the files that a licence may ask to travel along."""
_LOCK = ".lock"
_BESIDE = (MANIFEST_FILE, "README.md", ".gitattributes", _LOCK)  # that a manifest does not list
_NAMES = (  # of files that are part of a checkpoint where no manifest says so; notes.txt and train.py are a user's
    "*.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "training_args.bin",
    "*.gguf",
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "*processing_*.py",
    *LICENCE_FILES,
)
_FOLDERS = ("additional_chat_templates", ".cache")  # that a checkpoint may have; the latter is the Hub client's
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EMFILE: "too many files are open: a larger --max-shard-size makes fewer, ulimit -n allows more",
}


def check_output(out: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse an output that would destroy something; for callers that work long before they write.

    Args:
        out: the folder to be written.
        source: the folder or file that is read meanwhile.
        overwrite: whether an artifact at ``out`` may be replaced.

    Raises:
        BitternError: when ``out`` exists (without overwrite), is no artifact or holds what belongs to none (with it),
            or is, holds or lies in the source.
    """
    if source is not None:
        target, origin = out.resolve(), source.resolve()
        if target == origin or origin.is_relative_to(target) or target.is_relative_to(origin):
            raise BitternError(f"output {out}: expected a folder apart from the source {source}")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise BitternError(f"output {out}: it exists already (--overwrite replaces it)")
    if out.is_symlink() or not out.is_dir():
        raise BitternError(f"output {out}: expected a folder to overwrite, found something else")
    if any(out.iterdir()) and not (out / "config.json").is_file():
        raise BitternError(f"output {out}: not overwritten, for it holds no config.json and so is no checkpoint")
    foreign = _foreign(out)
    if foreign is not None:
        raise BitternError(f"output {out}: not overwritten, for it holds {foreign}, which is no part of a checkpoint")


def _foreign(folder: Path) -> str | None:
    """What a user has put into a checkpoint's folder: a folder, or a file that the manifest does not list.

    Without a manifest, a file whose name is none of a checkpoint's.
    """
    try:
        listed = set(json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = None
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if path.name not in _FOLDERS:
                return f"the folder {path.name}"
            continue
        named = any(fnmatchcase(path.name, pattern) for pattern in _NAMES) if listed is None else path.name in listed
        if not named and path.name not in _BESIDE and path.suffix != ".partial":
            return path.name
    return None


def check_space(out: Path, needed: int) -> None:
    """Refuse an output that the disk has no room for.

    Raises:
        BitternError: naming both.
    """
    there = next(folder for folder in out.absolute().parents if folder.exists())
    available = shutil.disk_usage(there).free
    if needed > available:
        raise BitternError(f"output {out}: needs {needed} bytes of disk space, {available} are available")


def lock_folder(folder: Path, busy: str) -> int:
    """Make a folder, and own it until the returned file is closed or its owner removes it.

    The lock outlives no process, so a folder that a killed one has left is recognized.

    Raises:
        BitternError: with the text ``busy``, when another process owns it; when it is a link to somewhere else.
    """
    while True:
        folder.mkdir(exist_ok=True)
        _refuse_link(folder)
        try:
            file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its owner has just removed it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), (folder / _LOCK).stat()):
                return file
        except BlockingIOError:
            os.close(file)
            raise BitternError(busy) from None
        except FileNotFoundError:
            pass  # its owner has finished meanwhile
        os.close(file)


class CheckpointWriter:
    """Writes planned tensors in any order, from any thread; see the module's text.

    Use it as a context manager: leaving it without :meth:`commit` removes all that was written.

    Attributes:
        out: the folder that commit() makes.
        folder: the temporary sibling; side files may be put there.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        plan: Sequence[TensorInfo],
        *,
        max_shard_size: int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Lay out the shards and reserve their space.

        Args:
            out: the folder to be made; its parents are made too.
            plan: every tensor that will be written.
            max_shard_size: bytes of values in a shard; a larger tensor has a shard of its own.
            overwrite: replace an artifact that is at ``out``.
            metadata: further strings for the header of each file.

        Raises:
            BitternError: see :func:`check_output`; and for a plan that names a tensor twice, too little
                space, a place that cannot be written, or another bittern that is writing this.
        """
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 - resolve() would follow a link at out itself
        self.folder = self.out.with_name(f".{self.out.name}.partial")
        self._replaced = self.out.with_name(f".{self.out.name}.replaced")
        self._plan = {info.name: info for info in plan}
        self._overwrite = overwrite
        self._written: dict[str, list[tuple[int, int]]] = {info.name: [] for info in plan}
        self._mutex = threading.Lock()
        self._files: dict[int, int] = {}  # shard -> its file, from its first tensor to its last: there may be thousands
        self._left: list[int] = []  # bytes of each shard that are still to be written
        self._where: dict[str, tuple[int, int]] = {}  # name -> shard, byte offset
        self._lock_file: int | None = None
        if len(self._plan) != len(plan):
            raise BitternError(f"output {out}: the plan names a tensor twice")
        if max_shard_size < 1:
            raise BitternError(f"max_shard_size: expected a positive number of bytes, found {max_shard_size}")
        shards = split(plan, max_shard_size)
        self._names = shard_names(len(shards))
        try:
            with explained(self.out):
                self.out.parent.mkdir(parents=True, exist_ok=True)
                self._acquire()
                check_output(self.out, None, overwrite)
                check_space(self.out, sum(info.nbytes for info in plan))
                for name, shard in zip(self._names, shards, strict=True):
                    self._create(name, shard, {"format": "pt", **(metadata or {})})
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole planned tensor, once.

        Raises:
            BitternError: when it is not planned so, was written before, or the disk refuses.
        """
        info = self._info(name)
        if tuple(tensor.shape) != info.shape:
            raise BitternError(f"{name}: expected shape {info.shape}, found {tuple(tensor.shape)}")
        self.write_elements(name, 0, tensor)

    def write_elements(self, name: str, start: int, tensor: Tensor) -> None:
        """Write elements of a planned tensor, flattened, that begin at element ``start``."""
        info, stop = self._info(name), start + tensor.numel()
        if tensor.dtype != info.dtype:
            raise BitternError(f"{name}: expected {info.dtype}, found {tensor.dtype}")
        if not 0 <= start <= stop <= info.numel:
            raise BitternError(f"{name}: elements {start} to {stop} of a tensor of shape {info.shape}")
        with self._mutex:
            if any(start < end and begin < stop for begin, end in self._written[name]):
                raise BitternError(f"{name}: elements {start} to {stop} are written twice")
            self._written[name].append((start, stop))
        if start == stop:
            return
        shard, offset = self._where[name]
        with explained(self.out):
            with self._mutex:
                if self._lock_file is None:
                    raise BitternError(f"{name}: written after {self.out} was given up")
                if shard not in self._files:
                    self._files[shard] = open_file(self.folder / f"{self._names[shard]}.partial", os.O_WRONLY)
                # Its own: other threads may still write when an error gives the output up, and the number of a
                # closed file is that of the next one that is opened.
                file = os.dup(self._files[shard])
            try:
                write_elements(file, offset + start * info.dtype.itemsize, tensor.detach().cpu())
            finally:
                os.close(file)
            with self._mutex:
                self._left[shard] -= tensor.nbytes
                if not self._left[shard] and shard in self._files:
                    os.close(self._files.pop(shard))

    def write_file(self, name: str, text: str) -> None:
        """Write a text file beside the weights."""
        with explained(self.out):
            (self.folder / name).write_text(text, encoding="utf-8")

    def commit(self, config: dict[str, Any], manifest: dict[str, Any] | None = None) -> None:
        """Make the output whole and durable, in its place.

        Args:
            config: becomes config.json, with :func:`bittern.rope.with_old_rope`.
            manifest: becomes bittern_manifest.json, after ``files`` was put into it: size and hash of every other
                file. Each weight file is read once more for that.

        Raises:
            BitternError: when a planned tensor is missing (all or in part) or the disk refuses.
        """
        for name, info in self._plan.items():
            done = sum(stop - start for start, stop in self._written[name])
            if done != info.numel:
                raise BitternError(f"{name}: only {done} of {info.numel} elements were written before the commit")
        with explained(self.out):
            for name in self._names:
                (self.folder / f"{name}.partial").rename(self.folder / name)
            if len(self._names) > 1:
                where = {name: self._names[self._where[name][0]] for name in self._plan}
                self.write_file(INDEX_FILE, to_json(index(list(self._plan.values()), where)))
            self.write_file("config.json.partial", to_json(with_old_rope(config)))
            if manifest is not None:
                manifest["files"] = self._records()
                self.write_file(MANIFEST_FILE, to_json(manifest))
            (self.folder / "config.json.partial").rename(self.folder / "config.json")
            for path in [*(path for path in self.folder.rglob("*") if path.is_file()), self.folder]:
                fsync(path)
            self._move_into_place()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._discard()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._plan:
            raise BitternError(f"{name}: this tensor is not in the plan of {self.out}")
        return self._plan[name]

    def _acquire(self) -> None:
        """Own the temporary folder, empty."""
        self._lock_file = lock_folder(self.folder, f"output {self.out}: another bittern is writing this")
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _refuse_link(self._replaced)
        if self._replaced.exists():  # a kill between the two renames of _move_into_place
            _remove_checkpoint(self._replaced) if self.out.exists() else self._replaced.rename(self.out)

    def _create(self, name: str, shard: Sequence[TensorInfo], metadata: Mapping[str, str]) -> None:
        header, offsets = header_bytes(shard, metadata)
        values = sum(info.nbytes for info in shard)
        file = open_file(self.folder / f"{name}.partial", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            reserve(file, len(header) + values)
            os.pwrite(file, header, 0)
        finally:
            os.close(file)
        for tensor, offset in offsets.items():
            self._where[tensor] = (len(self._left), offset)
        self._left.append(values)

    def _records(self) -> dict[str, Any]:
        """Size and hash of every file that the output will hold, by its name there."""
        files = (path for path in self.folder.rglob("*") if path.is_file() and path.name != _LOCK)
        paths = {str(path.relative_to(self.folder)): path for path in files}
        paths["config.json"] = paths.pop("config.json.partial")
        return {name: file_record(paths[name]) for name in sorted(paths)}

    def _move_into_place(self) -> None:
        if self._overwrite and self.out.exists():
            self.out.rename(self._replaced)
        elif os.path.lexists(self.out):
            raise BitternError(f"output {self.out}: something has appeared there meanwhile")
        self.folder.rename(self.out)
        fsync(self.out.parent)
        (self.out / _LOCK).unlink()
        if self._replaced.exists():
            _remove_checkpoint(self._replaced)
        self._unlock()

    def _discard(self) -> None:
        with self._mutex:
            while self._files:
                os.close(self._files.popitem()[1])
            if self._lock_file is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
                self._unlock()

    def _unlock(self) -> None:
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None


def split(plan: Sequence[TensorInfo], max_shard_size: int) -> list[list[TensorInfo]]:
    """Fill shards in the plan's order; within each, wider dtypes first so that all values are aligned."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in plan:
        if shards[-1] and size + info.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return [sorted(shard, key=lambda info: -info.dtype.itemsize) for shard in shards]


def planned_bytes(plan: Sequence[TensorInfo], max_shard_size: int, metadata: Mapping[str, str]) -> int:
    """Bytes of the weight files, and of their index, that a :class:`CheckpointWriter` makes of a plan."""
    shards = split(plan, max_shard_size)
    total = 0
    for shard in shards:
        total += len(header_bytes(shard, {"format": "pt", **metadata})[0]) + sum(info.nbytes for info in shard)
    if len(shards) == 1:
        return total
    names = shard_names(len(shards))
    where = {info.name: name for name, shard in zip(names, shards, strict=True) for info in shard}
    return total + len(to_json(index(plan, where)).encode())


def index(plan: Sequence[TensorInfo], where: Mapping[str, str]) -> dict[str, Any]:
    """The index of several weight files: which tensor is in which."""
    total = sum(info.nbytes for info in plan)
    return {"metadata": {"total_size": total}, "weight_map": {name: where[name] for name in sorted(where)}}


def shard_names(count: int) -> list[str]:
    """The file names that every loader expects for ``count`` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Turn what the file system refuses while ``out`` is written into one line."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"{error.strerror or error}: {error.filename}")
        raise BitternError(f"output {out}: cannot be written: {reason}") from error


def _refuse_link(folder: Path) -> None:
    """What is in a folder of bittern's own gets removed; what a link in its place leads to is somebody else's."""
    if folder.is_symlink():
        raise BitternError(f"{folder}: expected a folder that bittern has made, found a link to {folder.readlink()}")


def _remove_checkpoint(folder: Path) -> None:
    (folder / "config.json").unlink(missing_ok=True)  # first, so that a half-removed folder opens nowhere
    shutil.rmtree(folder)


def to_json(value: dict[str, Any]) -> str:
    """As files of a checkpoint have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Replace a file by a whole one: hidden, durable, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        partial.rename(path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
