"""What a killed quantization goes on from: every finished block, in a file of its own.

The work folder ``.{name}.quantizing`` is a sibling of the output and is there until that stands. It holds a folder
for each run, named by a hash of all that decides the run's result. So blocks of different runs never meet, and
a command with another option does not destroy what the one before it has done: to repeat that one is to go on with it.

A run's folder has ``run.json``, which says what decided its result, and ``block-00012.safetensors`` for each finished
block: codes, scales and zeros of its layers, and in the header their records, and a hash of the values. Before a
block is finished, ``outputs-00012.safetensors`` may have how its outputs count (:mod:`bittern.quantize.guide`). Files
are written under another name and renamed when they are durable. There is no config.json: no loader opens the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import bittern
from bittern import replay
from bittern.calibration import dataset_names, split_column
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.model import Matrix
from bittern.processes import world
from bittern.quantize.solve import Layer
from bittern.runtime import native
from bittern.shards import Stored, TensorInfo, header_bytes, read_elements, read_header, write_elements
from bittern.weight import QuantSpec, QuantWeight
from bittern.writer import explained, fsync, lock_folder, replace_file

WITHOUT_EFFECT = (
    "tune_tokens",
    "dataset",
    "format",
    "target",
    "max_shard_size",
    "overwrite",
    "revision",
    "device",
)
"""Options that do not decide what the solver makes; of the dataset its tokens count (and the file, where more of
it is trained on), of the device what it is."""

_RUN = "run.json"
_SAMPLES, _SAMPLE = 16, 2**16  # pieces of a weight file, and their bytes
_STORY = "bittern"  # key in the header of a block's file
_PARTS = ("codes", "scales", "zeros")
_CHANGED = "changed."  # before the names of parameters that are not quantized


def decided_by(
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    layers: Mapping[str, QuantSpec | None],
    tokens: str | None,
    device: torch.device,
) -> dict[str, str]:
    """All that decides what the solver makes of a checkpoint, in words or as hashes.

    Args:
        checkpoint: the source.
        options: of the command; those of :data:`WITHOUT_EFFECT` are passed over.
        layers: their grids; gradients chose those of an average of bits, which a GPU sums in any order.
        tokens: hash of the calibration tokens.
        device: where it computes.
    """
    chosen = {}
    if isinstance(options["bits"], float):
        grids = [[name, None if grid is None else asdict(grid)] for name, grid in layers.items()]
        chosen["bits of the layers"] = _hash(grids)
    if options.get("tune_tokens"):  # these reach further into the text than the calibration tokens
        chosen["text to train on"] = _hash([_identity(name) for name in dataset_names(options["dataset"])])
    return {
        **{name: _text(value) for name, value in options.items() if name not in WITHOUT_EFFECT},
        **source_hashes(checkpoint),
        **chosen,
        "calibration tokens": tokens or "none",
        **computed_by(device),
    }


def computed_by(device: torch.device) -> dict[str, str]:
    """The programs and the machine that decide the last bits of what is computed, in words."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    rounding = "with" if replay.fast_in_sixteen_bits(device) else "without"
    return {
        "bittern": f"{bittern.__version__} {_code()}",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": f"{device.type} {processor} {rounding} bfloat16",
        "native kernels": _kernels() if device.type == "cpu" else "none",
        "threads": str(torch.get_num_threads()),
        "processes": str(world()[1]),
    }


def source_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """What tells a source from another in its place, in words -> hash.

    Weight files are told apart by size, time of change and some pieces of them: hashing them whole would read a large
    checkpoint once more, and archives and images give all files the same time.
    """
    files = [checkpoint.path] if checkpoint.gguf is not None else sorted(checkpoint.folder.iterdir())
    weights = [path for path in files if path.suffix in (".safetensors", ".bin", ".gguf")]
    return {
        "weight files of the source": _hash([[path.name, path.stat().st_mtime_ns, _sampled(path)] for path in weights]),
        "config.json of the source": _hash(checkpoint.config),
    }


def _sampled(path: Path) -> str:
    """A hash of a file's size and of pieces of it, from the first byte to the last."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def stored_bytes(blocks: Iterable[Sequence[tuple[Matrix, QuantSpec]]]) -> int:
    """What the files of some blocks take on the disk, but for their headers.

    Args:
        blocks: their matrices and grids, as a plan has them.
    """
    return sum(
        matrix.out_features * (matrix.in_features + 3 * spec.groups(matrix.in_features))
        for block in blocks
        for matrix, spec in block
    )


class WorkFolder:
    """The finished blocks of one run. A context manager: the folder belongs to one process at a time.

    Attributes:
        finished: positions of the blocks that are here whole.
        notes: what a user should know of what was found, a sentence each.
        seconds: that earlier processes have spent on the finished blocks.
    """

    def __init__(self, output: Path, decided: Mapping[str, str], blocks: int, resume: bool = True) -> None:
        """Nothing is touched yet.

        Args:
            output: what is to be made.
            decided: see :func:`decided_by`.
            blocks: how many there are.
            resume: False forgets what earlier runs have left.
        """
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - as the writer names it
        self.root = self.output.with_name(f".{self.output.name}.quantizing")
        self.folder = self.root / _hash(decided)[:16]
        self.finished: set[int] = set()
        self.notes: list[str] = []
        self.seconds = 0.0
        self._decided, self._blocks, self._resume = dict(decided), blocks, resume
        self._lock = -1
        self._since = 0.0

    def __enter__(self) -> WorkFolder:
        with explained(self.output):
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.root, f"output {self.output}: another bittern is writing this")
            try:
                if not self._resume:
                    self._forget()
                self._open()
            except BaseException:
                self._leave()
                raise
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if value is not None and self.finished:
            value.add_note(f"finished blocks are kept: the same command goes on from {self._next()}")
        self._leave()

    def save(self, position: int, layers: Sequence[Layer], changed: Mapping[str, Tensor]) -> None:
        """Keep a block: from now on, nothing that happens to this process can lose it.

        Args:
            position: of the block.
            layers: its quantized layers.
            changed: parameters of it that are not quantized, by their live names, where they are not the source's.

        Raises:
            BitternError: when the disk refuses.
        """
        now = time.monotonic()
        tensors = {
            f"{number}.{part}": getattr(weight, part).cpu().contiguous()
            for number, (_, weight) in enumerate(layers)
            for part in _PARTS
        }
        tensors |= {f"{_CHANGED}{name}": values.cpu().contiguous() for name, values in changed.items()}
        story = {
            "layers": [record for record, _ in layers],
            "seconds": now - self._since,
            "sha256": _digest(tensors),
        }
        self._write(self._path(position), tensors, story)
        self._curvatures(position).unlink(missing_ok=True)
        self.finished.add(position)
        self._since = now

    def keep_curvatures(self, position: int, curvatures: Mapping[Matrix, Tensor]) -> None:
        """Keep how the outputs of a block's matrices count, until that block is kept.

        Raises:
            BitternError: when the disk refuses.
        """
        tensors = {matrix.label: curvature.cpu().contiguous() for matrix, curvature in curvatures.items()}
        self._write(self._curvatures(position), tensors, {"sha256": _digest(tensors)})

    def has_curvatures(self, position: int) -> bool:
        """Whether they are here whole."""
        try:
            self._checked(self._curvatures(position))
        except BitternError:
            return False
        return True

    def curvatures(self, position: int, matrices: Iterable[Matrix]) -> dict[Matrix, Tensor]:
        """Those of some matrices of a block, as far as they were kept."""
        path = self._curvatures(position)
        if not path.exists():
            return {}
        stored, by_label = read_header(path), {matrix.label: matrix for matrix in matrices}
        found = _read_tensors(path, {label: stored[label] for label in by_label.keys() & stored.keys()})
        return {by_label[label]: curvature for label, curvature in found.items()}

    def load(self, position: int) -> list[Layer]:
        """The layers of a finished block.

        Raises:
            BitternError: when its file cannot be read or is not what was written.
        """
        return self._read(position)[0]

    def changed(self, position: int) -> dict[str, Tensor]:
        """The parameters of a finished block that are not quantized and not the source's, by their live names."""
        path = self._path(position)
        tensors = _read_tensors(path, {n: s for n, s in read_header(path).items() if n.startswith(_CHANGED)})
        return {name.removeprefix(_CHANGED): values for name, values in tensors.items()}

    def remove(self) -> None:
        """The output stands: what it was made of, and what other runs have left, is not needed any more."""
        with explained(self.output):
            shutil.rmtree(self.root)
        self.finished.clear()

    def _open(self) -> None:
        """See what is there; blocks that are not whole are removed, to be solved again."""
        others = [path for path in self.root.glob(f"*/{_RUN}") if path.parent != self.folder]
        if not self.folder.exists() and others:
            self.notes.append(self._other(max(others, key=lambda path: path.stat().st_mtime_ns)))
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / _RUN).exists():
            replace_file(self.folder / _RUN, json.dumps(self._decided, indent=2) + "\n")
        for position in range(self._blocks):
            if not self._path(position).exists():
                continue
            try:
                self.seconds += self._read(position)[1]
            except BitternError as error:
                self._path(position).unlink()
                self.notes.append(f"{error}; it is solved again")
            else:
                self.finished.add(position)
        if self.finished:
            self.notes.append(f"goes on from {self._next()}; --no-resume starts over")

    def _read(self, position: int) -> tuple[list[Layer], float]:
        path = self._path(position)
        try:
            tensors, story = self._checked(path)
            layers = []
            for number, record in enumerate(story["layers"]):
                spec = QuantSpec(record["bits"], record["group_size"], record["sym"])
                codes, scales, zeros = (tensors[f"{number}.{part}"] for part in _PARTS)
                layers.append((record, QuantWeight(codes, scales, zeros, spec)))
            return layers, float(story["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise BitternError(f"{path}: expected a block that bittern has kept, found something else") from error

    def _write(self, path: Path, tensors: Mapping[str, Tensor], story: Mapping[str, Any]) -> None:
        """Under another name, which it loses when it is durable."""
        infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        header, offsets = header_bytes(infos, {_STORY: json.dumps(story)})
        partial = path.with_suffix(".partial")
        with explained(self.output):
            file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.pwrite(file, header, 0)
                for name, tensor in tensors.items():
                    write_elements(file, offsets[name], tensor)
                os.fsync(file)
            finally:
                os.close(file)
            partial.rename(path)
            fsync(self.folder)

    @staticmethod
    def _checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a file, whose hash its story has, and that."""
        try:
            stored = read_header(path)
            with safe_open(path, framework="pt") as file:
                story = json.loads(file.metadata()[_STORY])
            tensors = _read_tensors(path, stored)
            if _digest(tensors) != story["sha256"]:
                raise BitternError(f"{path}: expected the values that its header has the hash of, found others")
            return tensors, story
        except (KeyError, TypeError, ValueError) as error:
            raise BitternError(f"{path}: expected what bittern has kept, found something else") from error
        except (OSError, EOFError) as error:
            raise BitternError(f"{path}: cannot be read: {error}") from error

    def _path(self, position: int) -> Path:
        return self.folder / f"block-{position:05}.safetensors"

    def _curvatures(self, position: int) -> Path:
        return self.folder / f"outputs-{position:05}.safetensors"

    def _next(self) -> str:
        """Where a run with these blocks goes on, in words that count from one."""
        missing = set(range(self._blocks)) - self.finished
        if not missing:
            return f"writing, for all {self._blocks} blocks are solved"
        return f"block {min(missing) + 1} of {self._blocks}"

    def _other(self, run: Path) -> str:
        """How the latest of the other runs differs."""
        try:
            found = json.loads(run.read_text(encoding="utf-8"))
            names = [name for name in self._decided if found.get(name) != self._decided[name]]
            changes = ", ".join(change(name, str(found.get(name, "none")), self._decided[name]) for name in names)
        except (OSError, ValueError, AttributeError):
            changes = "not known how"
        blocks = len(list(run.parent.glob("block-*.safetensors")))
        return (
            f"starts from block 1: {self.root.name} holds {blocks} of {self._blocks} blocks of a run that differs"
            f" ({changes}); they are kept until the output stands, and the earlier command would go on with them"
        )

    def _forget(self) -> None:
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)

    def _leave(self) -> None:
        """Let go of the folder; where nothing is left to go on from, it goes too."""
        if self.root.exists():
            if not self.finished:
                shutil.rmtree(self.folder, ignore_errors=True)
            if not any(path.is_dir() for path in self.root.iterdir()):
                shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)


def _read_tensors(path: Path, stored: Mapping[str, Stored]) -> dict[str, Tensor]:
    file = os.open(path, os.O_RDONLY)
    try:
        return {
            name: read_elements(file, each.offset, each.info.dtype, each.info.numel).view(each.info.shape)
            for name, each in stored.items()
        }
    finally:
        os.close(file)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _code() -> str:
    """A hash of this package's sources: between two releases the version does not tell them apart."""
    digest = hashlib.sha256()
    for path in sorted(Path(bittern.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _kernels() -> str:
    """The native library, and the instructions that it uses."""
    if not native.available():
        return "none"
    return f"{native.instructions()} {hashlib.sha256(native.LIBRARY.read_bytes()).hexdigest()[:16]}"


def _identity(dataset: str) -> list[Any]:
    """What tells a text file from another in its place."""
    path, _ = split_column(dataset)
    return [dataset, path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else [dataset]


def _text(value: Any) -> str:
    """The same whether a list or a tuple was given."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def change(name: str, before: str, now: str) -> str:
    """What became of one thing that decides the result; hashes are nothing to look at."""
    return f"other {name}" if 64 in (len(before), len(now)) else f"{name} {before}, now {now}"
