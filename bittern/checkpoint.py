"""A checkpoint as a lazy reader from tensor names to tensors, whatever it is stored in.

Sources: a folder of safetensors or with a legacy pytorch_model.bin, a GGUF file, the id of a repository on the Hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from bittern.errors import BitternError
from bittern.formats.gguf_tokenizer import mend_tokenizer
from bittern.formats.legacy_bin import BinFiles, read_bin
from bittern.hub import download, fetch_headers, file_names
from bittern.shards import SafetensorsFiles, Stored, TensorInfo, read_header
from bittern.writer import LICENCE_FILES, CheckpointWriter, explained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bittern.formats.gguf_file import GgufFile

__all__ = ["Checkpoint", "CheckpointWriter", "TensorInfo", "open_checkpoint"]

# What travels from a checkpoint to what is made of it, besides config and weights.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
    "*.py",
    *LICENCE_FILES,
)
_MAX_JSON_BYTES = 100_000_000  # the index of a model with 400,000 tensors takes 60 million
_MAX_NAME = 1000  # characters of a tensor's name
_MAX_COUNT = 1024  # of what transformers builds so many of as config.json says, where there are fewer tensors
_COUNTS = re.compile(r"(num|n)_(\w*_)?(layer|block|expert|label)s?|(en|de)coder_layers")
_WEIGHTS = "model.safetensors, its shards and index, or pytorch_model.bin"
MODEL_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # on the Hub; of old models it has no owner


class Storage(Protocol):
    """Where a checkpoint's values come from."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a tensor, flattened, in memory of their own."""

    def close(self) -> None:
        """Let go of the files."""


class Checkpoint:
    """A checkpoint whose tensors are read when they are asked for.

    Reading is safe from several threads. Nothing is kept: what is read twice is read from the file twice.

    Attributes:
        source: what the user named: a path or a Hub id.
        revision: the resolved commit when it came from the Hub.
        folder: where its files are; for a GGUF file, the folder that holds it.
        gguf: the open GGUF file when it is one, else None.
        config: the parsed config.json (for a GGUF file, what transformers makes of its metadata).
        tensors: what it holds, in the order of the files.
    """

    def __init__(
        self,
        source: str,
        folder: Path,
        config: dict[str, Any],
        tensors: Mapping[str, TensorInfo],
        storage: Storage,
        *,
        revision: str | None = None,
        gguf: GgufFile | None = None,
    ) -> None:
        self.source = source
        self.revision = revision
        self.folder = folder
        self.gguf = gguf
        self.config = config
        self.tensors = dict(tensors)
        self._storage = storage

    @property
    def headers_only(self) -> bool:
        """Whether it is on the Hub and its values are not here: reading one is an error before :meth:`fetch`."""
        return isinstance(self._storage, _NoValues)

    def fetch(self) -> None:
        """Have the values here too: download those of a checkpoint of which headers alone are; of others, do nothing.

        Raises:
            BitternError: as :func:`open_checkpoint`.
        """
        if self.headers_only:
            whole = open_checkpoint(self.source, self.revision)
            self.close()
            self.folder, self._storage = whole.folder, whole._storage

    @property
    def path(self) -> Path:
        """What is read, or will be after :meth:`fetch`: the folder, or the GGUF file."""
        if isinstance(self._storage, _NoValues):
            return self._storage.whole
        return self.folder if self.gguf is None else self.gguf.path

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU, in its stored dtype.

        Raises:
            BitternError: when there is no such tensor or its file cannot be read.
        """
        info = self._info(name)
        return self._read(info, 0, info.numel).view(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dimension 0: shape (stop - start, ...)."""
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise BitternError(f"{name}: rows {start} to {stop} of a tensor of shape {info.shape}")
        row = prod(info.shape[1:])
        return self._read(info, start * row, stop * row).view(stop - start, *info.shape[1:])

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor: shape (stop - start,)."""
        info = self._info(name)
        if not 0 <= start <= stop <= info.numel:
            raise BitternError(f"{name}: elements {start} to {stop} of a tensor of {info.numel}")
        return self._read(info, start, stop)

    def copy_side_files(self, folder: Path) -> list[str]:
        """Copy what belongs to a checkpoint besides config and weights; the names of what was copied.

        Tokenizer, generation config, chat template, processor files, model code, licence. Out of a
        GGUF file come the tokenizer and its chat template, in transformers' format.
        """
        if self.gguf is not None:
            tokenizer = self.tokenizer()
            try:
                saved = tokenizer.save_pretrained(folder)
            except Exception as error:  # the tokenizers library raises nothing narrower, on a full disk too
                raise BitternError(f"output {folder}: the tokenizer cannot be written: {_line(error)}") from error
            return sorted(str(Path(path).relative_to(folder)) for path in saved if Path(path).exists())
        names = self.side_files()
        for name in names:
            original = contained(self.folder, name)
            try:
                values = original.read_bytes()
            except OSError as error:
                raise BitternError(f"{original}: cannot be read: {error.strerror}") from error
            with explained(folder):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(values)
        return names

    def side_files(self) -> list[str]:
        """What :meth:`copy_side_files` copies out of a folder, by its name there; a GGUF file has none."""
        if self.gguf is not None:
            return []
        paths = {path for pattern in SIDE_FILES for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(str(path.relative_to(self.folder)) for path in paths)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer.

        Raises:
            BitternError: when it has none that transformers can load.
        """
        from transformers import AutoTokenizer

        try:
            if self.gguf is None:
                return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            with TemporaryDirectory() as alone:  # else it would take what lies beside the file, whosever that is
                (Path(alone) / self.gguf.path.name).symlink_to(self.gguf.path.resolve())
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=self.gguf.path.name, trust_remote_code=False)
            mend_tokenizer(tokenizer, self.gguf.path)
            return tokenizer
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise BitternError(f"{self.source}: no tokenizer that transformers loads: {_line(error)}") from error

    def close(self) -> None:
        """Let go of the open files."""
        self._storage.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise BitternError(f"{self.source}: no tensor {name}")
        return self.tensors[name]

    def _read(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        try:
            return self._storage.read(info.name, start, stop)
        except (OSError, EOFError) as error:
            raise BitternError(f"{self.source}: reading tensor {info.name}: {error}") from error


def open_checkpoint(
    source: str | os.PathLike[str], revision: str | None = None, *, headers_only: bool = False
) -> Checkpoint:
    """Open a folder, a GGUF file, or the Hub repository ``org/name`` at ``revision``.

    Only headers are read here. A Hub repository is downloaded into the usual cache first, unless ``headers_only`` says
    that values are needed later, after :meth:`Checkpoint.fetch`, or never: then of its safetensors headers alone are
    fetched, into a folder that is gone when the checkpoint is closed. Where they cannot be had, without network, of
    legacy files or of a server that sends no parts of files, it is downloaded all the same;
    :attr:`Checkpoint.headers_only` tells.

    Raises:
        BitternError: when there is no such source, or it is not a whole and honest checkpoint.
    """
    name, path = os.fspath(source), Path(source)
    if not name:  # the current folder, to pathlib
        raise BitternError("SOURCE: expected a folder, a .gguf file or a Hub id, found an empty name")
    if path.exists():
        if revision is not None:
            raise BitternError(f"--revision {revision}: only a Hub id has revisions, {name} is a local path")
        if path.is_dir():
            return _open_folder(name, path, None)
        if path.suffix == ".gguf":
            return _open_gguf(name, path)
        raise BitternError(f"{name}: expected a folder or a .gguf file")
    if path.suffix == ".gguf" or not MODEL_ID.fullmatch(name):
        raise BitternError(f"{name}: no such folder or .gguf file, and not a Hub id (org/name)")
    if headers_only and (found := _open_headers(name, revision)) is not None:
        return found
    folder, commit = download(name, revision)
    return _open_folder(name, folder, commit)


def _open_headers(repo_id: str, revision: str | None) -> Checkpoint | None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bittern-"))) / repo_id  # errors name it
        folder.mkdir(parents=True)
        whole = fetch_headers(repo_id, revision, folder)
        if whole is None:
            return None
        found = _open_folder(repo_id, folder, whole.name)
        storage = _NoValues(stack.pop_all(), whole)
    return Checkpoint(repo_id, folder, found.config, found.tensors, storage, revision=whole.name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BitternError: when the file is missing, endless or holds anything else.
    """
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise BitternError(f"{path}: expected a JSON file, found {'something else' if path.exists() else 'none'}")
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise BitternError(f"{path}: expected at most {_MAX_JSON_BYTES} bytes, found {path.stat().st_size}")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could be written nowhere
    except (OSError, ValueError, RecursionError) as error:
        raise BitternError(f"{path}: expected a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise BitternError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers is to make of a config.json: without its quantization, and with the numbers that JSON has no
    words for, which transformers 5 writes as ``{"__float__": "Infinity"}``.

    Raises:
        ValueError: for such a number that is none.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return float(value["__float__"]) if set(value) == {"__float__"} else {k: plain(v) for k, v in value.items()}
        return [plain(each) for each in value] if isinstance(value, list) else value

    return {key: plain(value) for key, value in config.items() if key != "quantization_config"}


def contained(folder: Path, name: str) -> Path:
    """``folder / name`` when the file that it leads to lies inside the folder.

    Links may only lead out as the Hub's cache does it: from snapshots/<commit>/ to blobs/.

    Raises:
        BitternError: when it lies elsewhere.
    """
    path = folder / name
    try:
        inside, real = folder.resolve(), path.resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL or too many characters, a link to itself
        raise BitternError(f"{folder}: the file {name} cannot be found: {error}") from error
    blobs = inside.parent.parent / "blobs" if inside.parent.name == "snapshots" else None
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not plain or not (real.is_relative_to(inside) or real.parent == blobs):
        raise BitternError(f"{folder}: the file {name} leads out of the folder")
    return path


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open_folder(source: str, folder: Path, revision: str | None) -> Checkpoint:
    _refuse_special_files(folder)
    path = contained(folder, "config.json")
    if not path.exists():
        raise _no_model(source, folder, revision, "config.json")
    config = read_json(path)
    weights = _weight_file(folder)
    if weights is None:
        raise _no_model(source, folder, revision, _WEIGHTS)
    where = _read_index(folder, weights) if weights.suffix == ".json" else None
    files = [weights] if where is None else list(dict.fromkeys(where.values()))
    read = read_bin if files and files[0].suffix == ".bin" else read_header
    stored: dict[str, Stored] = {}
    for file in files:
        for name, item in read(file).items():
            if where is not None and name not in where:
                raise BitternError(f"{file}: holds tensor {name}, which {weights.name} does not list")
            if where is None or where[name] == file:
                stored[name] = item
    for name in where or ():
        if name not in stored:
            raise BitternError(f"{weights}: lists tensor {name}, which is not in its file")
    storage = BinFiles(stored) if read is read_bin else SafetensorsFiles(stored)
    infos = {name: item.info for name, item in stored.items()}
    for name in infos:
        if not name.isprintable() or len(name) > _MAX_NAME:
            raise BitternError(f"{folder}: tensor {name}: expected a name of at most {_MAX_NAME} printable characters")
    _check_counts(folder / "config.json", config, len(infos))
    return Checkpoint(source, folder, config, infos, storage, revision=revision)


def _refuse_special_files(folder: Path) -> None:
    """Pipes and devices never end or keep their reader waiting, and libraries open what they find in a folder."""
    found = folder.iterdir() if folder.exists() else ()  # of a repository with nothing to fetch the cache has none
    for path in (*found, *folder.glob("additional_chat_templates/*")):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BitternError(f"{path}: expected a file, found a pipe, a socket or a device")


def _check_counts(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Refuse numbers that would keep transformers building modules until memory ends."""
    limit = max(_MAX_COUNT, tensors)
    unseen = [config]
    while unseen:
        part = unseen.pop()
        unseen += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            if isinstance(value, int) and value > limit and _COUNTS.fullmatch(key):
                raise BitternError(f"{path}: {key}: {value} is too many for a checkpoint of {tensors} tensors")


def _open_gguf(source: str, path: Path) -> Checkpoint:
    from bittern.formats.gguf import need_packages
    from bittern.formats.gguf_file import open_gguf
    from bittern.formats.gguf_header import check

    need_packages()
    check(path)  # before the gguf package believes what the file says
    config, tensors, storage = open_gguf(path)
    return Checkpoint(source, path.parent, config, tensors, storage, gguf=storage)


def _no_model(source: str, folder: Path, revision: str | None, expected: str) -> BitternError:
    """What a folder, or a repository at a commit, is instead of a checkpoint."""
    names = {path.name for path in folder.glob("*")} | set(file_names(source, revision) if revision else ())
    files = sorted(name for name in names if name.endswith(".gguf"))
    reason = f"expected {expected}; found none"
    if "adapter_config.json" in names:
        reason += ": it is an adapter, without the model that it adapts"
    elif files and revision is None:
        reason += f", but GGUF; name the file: {Path(source) / files[0]}"
    elif files:
        reason = f"holds GGUF files alone: download one (`hf download {source} FILE.gguf`) and name it"
    return BitternError(f"{source}: {reason}")


def _weight_file(folder: Path) -> Path | None:
    """The file or index that holds a folder's weights, in the order in which transformers looks for them."""
    usual = ("model.safetensors", "model.safetensors.index.json")
    legacy = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    # Artifacts of other quantizers name their only file as they please.
    own = [path.name for path in folder.glob("*.safetensors.index.json")] or [
        path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")
    ]
    names = [name for name in (*usual, *(own if len(own) == 1 else ()), *legacy) if (folder / name).is_file()]
    if own and not names:
        raise BitternError(f"{folder}: expected {_WEIGHTS}; found {len(own)} files of safetensors and no index")
    return contained(folder, names[0]) if names else None


def _read_index(folder: Path, path: Path) -> dict[str, Path]:
    weight_map = read_json(path).get("weight_map")
    if not (weight_map and isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())):
        raise BitternError(f"{path}: expected a weight_map from tensor names to file names")
    suffix = path.name.removesuffix(".index.json").rpartition(".")[2]
    for name, file in weight_map.items():
        if not file.endswith("." + suffix):
            raise BitternError(f"{path}: tensor {name}: expected a .{suffix} file, found {file}")
    paths = {file: contained(folder, file) for file in dict.fromkeys(weight_map.values())}
    for file, path_of_file in paths.items():
        if not path_of_file.is_file():
            raise BitternError(f"{path}: lists the file {file}, which is missing or no file")
    return {name: paths[file] for name, file in weight_map.items()}


class _NoValues:
    """Of a checkpoint whose headers alone are there; ``close`` removes them, ``whole`` is where all will be."""

    def __init__(self, folder: ExitStack, whole: Path) -> None:
        self._folder = folder
        self.whole = whole

    def read(self, name: str, start: int, stop: int) -> Tensor:
        raise BitternError(f"{name}: its values were not fetched, headers alone were asked for")

    def close(self) -> None:
        self._folder.close()
