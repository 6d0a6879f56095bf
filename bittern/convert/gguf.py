"""An artifact or a plain checkpoint as one GGUF file: codes are moved, not rounded again.

Packed layers become Q4_0, Q5_0, Q8_0 or Q4_1 (:mod:`bittern.formats.gguf`), other matrices F32, F16 or BF16, vectors
F32. The file is written into a hidden sibling, ``.{name}.partial``, and renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import bittern
from bittern.artifact import Artifact
from bittern.checkpoint import Checkpoint, read_json
from bittern.convert.cast import DTYPES
from bittern.convert.gguf_model import GgufModel, merged_name, read_model
from bittern.convert.gguf_tensors import PlannedTensor, pieces, plan_tensors
from bittern.convert.gguf_vocabulary import Vocabulary, read_vocabulary
from bittern.disk import reserve
from bittern.errors import BitternError
from bittern.fit import fit
from bittern.formats.gguf import BLOCK_BYTES, kind_for, need_packages, refuse
from bittern.formats.gguf_file import CHANGED_KEY, DEGRADED_KEY, GRIDS_KEY
from bittern.formats.packing import check_name
from bittern.origin import LICENCE_KEYS, base_model, checkpoint_card, lineage, source_name
from bittern.report import MANIFEST_FILE, changed_names, degraded_notes, degraded_reason
from bittern.shards import write_elements
from bittern.ties import refuse_untied, tied_tensors
from bittern.weight import QuantSpec
from bittern.writer import explained, fsync

_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "BF16": 32}  # llama.cpp's llama_ftype
_ALIGNMENT = 32


@dataclass(frozen=True)
class Written:
    """One tensor of the file.

    Attributes:
        name: in the file.
        sources: the layers or tensors that it was made of; several for experts.
        kind: "F32", "F16", "BF16", or a key of :data:`bittern.formats.gguf.BLOCK_BYTES`.
        error: of a packed layer, how far the file's weights are from its own at most, in steps of its grid.
        relative_error: of floats, the largest one of a value by its cast.
    """

    name: str
    sources: tuple[str, ...]
    kind: str
    error: float = 0.0
    relative_error: float = 0.0


@dataclass(frozen=True)
class GgufSummary:
    """What :func:`write_gguf` did.

    Attributes:
        source: as the caller named it.
        output: the file that was made.
        architecture: llama.cpp's name of it.
        tokenizer: "llama", or "gpt2" and what cuts text into words; "none".
        tensors: what was written, in order.
        tied: tensors left out because the configuration ties them to an equal one.
        notes: what is not quite the same in llama.cpp, one sentence each.
        output_bytes: size of the file.
        seconds: wall time.
    """

    source: str
    output: str
    architecture: str
    tokenizer: str
    tensors: tuple[Written, ...]
    tied: tuple[str, ...]
    notes: tuple[str, ...]
    output_bytes: int
    seconds: float

    @property
    def layers(self) -> int:
        """Packed layers that were moved and stayed packed."""
        return sum(len(tensor.sources) for tensor in self.tensors if tensor.kind in BLOCK_BYTES)

    @property
    def error(self) -> float:
        """The largest change of a packed layer's weight, in steps of its grid; 0 when nothing was rounded."""
        return max((tensor.error for tensor in self.tensors), default=0.0)

    @property
    def max_relative_error(self) -> float:
        """The largest relative change of a float by its cast."""
        return max((tensor.relative_error for tensor in self.tensors), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        numbers = {"layers": self.layers, "error": self.error, "max_relative_error": self.max_relative_error}
        return {**asdict(self), "format": "gguf", **numbers}


def check_gguf(
    checkpoint: Checkpoint,
    grids: Mapping[str, QuantSpec | None],
    output: Path,
    overwrite: bool,
) -> None:
    """Refuse what :func:`write_gguf` would refuse of an artifact that is yet to be made.

    Args:
        checkpoint: what will be quantized.
        grids: every layer with its grid to be, None for one that stays floats.
        output, overwrite: as of :func:`write_gguf`.

    Raises:
        BitternError: for packages that are missing, an architecture, a tensor, a grid or a tokenizer that llama.cpp
            does not have, a checkpoint that is not whole or not what its config.json says, and an output that may not
            be written.
    """
    need_packages()
    _check_output(output, checkpoint.path, overwrite)
    for layer, spec in grids.items():
        reason = None if spec is None else refuse(spec)
        if reason is not None:
            raise BitternError(f"{layer}: not exact in GGUF: {reason}")
    merged: dict[str, set[str | None]] = {}
    for layer, spec in grids.items():  # experts share a tensor, whose type is one
        merged.setdefault(merged_name(f"{layer}.weight"), set()).add(None if spec is None else kind_for(spec))
    for name, kinds in merged.items():
        if len(kinds) > 1:
            each = ", ".join(sorted(kind or "floats" for kind in kinds))
            raise BitternError(f"{name}: GGUF has one tensor of all experts, expected one type, found {each}")
    model = read_model(checkpoint.config)
    artifact = Artifact(checkpoint)
    plan = plan_tensors(artifact, fit(artifact), model, [], None, allow_inexact=True)
    read_vocabulary(checkpoint, _rows(checkpoint, plan))


def write_gguf(
    artifact: Artifact,
    output: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    allow_inexact: bool = False,
    tokenizer: bool = True,
    overwrite: bool = False,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> GgufSummary:
    """Write an artifact, or a plain checkpoint, as a GGUF file.

    Args:
        artifact: of an architecture of :data:`bittern.formats.gguf.ARCHITECTURES`.
        output: a .gguf file that does not exist yet, unless ``overwrite``.
        dtype: of matrices that are not packed: "bf16", "fp16" or "fp32"; None as they are, fp16 where a GGUF file has
            them in blocks.
        allow_inexact: round what no block type holds, rather than refuse it; 8-bit asymmetric layers and groups that
            are no multiple of 32 become floats (``dtype``, else fp16), and 4-bit asymmetric ones Q4_1, which is smaller
            than Q5_0. The summary says how far that moved them.
        tokenizer: write the tokenizer; without one, a file serves to measure and not to chat.
        overwrite: replace the GGUF file at ``output``.
        on_tensor: called after each tensor with its name, the bytes written so far and in all.

    Raises:
        BitternError: for packages that are missing, an architecture, a grid or a tokenizer that llama.cpp does not
            have, a checkpoint that is not whole or not what its config.json says, values that are NaN, infinite or too
            large, and an output that may not or cannot be written. What headers tell is refused before anything is
            written.
    """
    started = time.monotonic()
    need_packages()
    if dtype is not None and dtype not in DTYPES:
        raise BitternError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype}")
    out, checkpoint = Path(output), artifact.checkpoint
    _check_output(out, checkpoint.path, overwrite)
    model = read_model(checkpoint.config)
    fitted = fit(artifact)
    checkpoint.fetch()
    refuse_untied(checkpoint)
    tied = tied_tensors(checkpoint)
    plan = plan_tensors(artifact, fitted, model, tied, dtype, allow_inexact)
    vocabulary = read_vocabulary(checkpoint, _rows(checkpoint, plan)) if tokenizer else None
    written: list[Written] = []
    total = sum(tensor.nbytes for tensor in plan)
    with _partial(out, overwrite) as (path, file):
        with explained(out):
            start = _write_header(path, artifact, model, vocabulary, plan)
            position = start + -start % _ALIGNMENT
            size = position + sum(tensor.nbytes + -tensor.nbytes % _ALIGNMENT for tensor in plan)
            available = shutil.disk_usage(path.parent).free
            if size - start > available:
                raise BitternError(f"output {out}: needs {size} bytes of disk space, {available} are available")
            reserve(file, size)
        done = 0
        for tensor in plan:
            error = relative = 0.0
            offset = position
            for values, lost, cast in pieces(artifact, tensor, allow_inexact):
                with explained(out):
                    write_elements(file, offset, values)
                offset += values.nbytes
                error, relative = max(error, lost), max(relative, cast)
            if offset != position + tensor.nbytes:
                raise BitternError(f"{tensor.name}: expected {tensor.nbytes} bytes, found {offset - position}")
            position = offset + -offset % _ALIGNMENT
            written.append(Written(tensor.name, tensor.sources, tensor.kind, error, relative))
            done += tensor.nbytes
            if on_tensor is not None:
                on_tensor(tensor.name, done, total)
    return GgufSummary(
        source=checkpoint.source,
        output=os.fspath(output),
        architecture=model.architecture,
        tokenizer="none" if vocabulary is None else _describe(vocabulary),
        tensors=tuple(written),
        tied=tuple(tied),
        notes=(
            *model.notes,
            *(vocabulary.notes if vocabulary is not None else ()),
            *degraded_notes(degraded_reason(checkpoint.config)),
        ),
        output_bytes=size,
        seconds=time.monotonic() - started,
    )


def _rows(checkpoint: Checkpoint, plan: list[PlannedTensor]) -> int:
    """Rows of the embedding."""
    for tensor in plan:
        if tensor.name == "token_embd.weight":
            return tensor.shape[0]
    raise BitternError(f"{checkpoint.source}: holds no embedding (model.embed_tokens.weight)")


def _describe(vocabulary: Vocabulary) -> str:
    return vocabulary.model if vocabulary.model == "llama" else f"{vocabulary.model}, {vocabulary.pre}"


def _write_header(
    path: Path, artifact: Artifact, model: GgufModel, vocabulary: Vocabulary | None, plan: list[PlannedTensor]
) -> int:
    """Everything before the values; the bytes written."""
    import numpy as np
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, model.architecture)
    writer.add_type("model")
    _write_origin(writer, artifact)
    model.write(writer)
    matrices = Counter[str]()
    for tensor in plan:
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            matrices[tensor.kind] += prod(tensor.shape)
    writer.add_file_type(_FILE_TYPES[matrices.most_common(1)[0][0]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    inside = (layer for tensor in plan if tensor.kind in BLOCK_BYTES for layer in tensor.sources)
    grids = {layer: artifact.layers[layer].spec for layer in inside}
    if grids:
        writer.add_string(GRIDS_KEY, _grids(grids))
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary.write(writer)
    for tensor in plan:
        kind = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path.stat().st_size


def _write_origin(writer: Any, artifact: Artifact) -> None:
    """Names of model and source, where that is known; what was changed on purpose, what made it worse, the licence, who
    quantized it."""
    checkpoint = artifact.checkpoint
    path = checkpoint.folder / MANIFEST_FILE
    manifest: dict[str, Any] = {"source": {"name": source_name(checkpoint), "revision": checkpoint.revision}}
    if checkpoint.gguf is None and path.is_file():
        manifest = manifest | read_json(path)
        changed = changed_names(manifest)
        if changed:
            writer.add_array(CHANGED_KEY, sorted(changed))
    reason = degraded_reason(checkpoint.config)
    if reason is not None:
        writer.add_string(DEGRADED_KEY, reason)
    base, revision = base_model(manifest)
    oldest = lineage(manifest)[-1].get("source")
    name = base or str(oldest.get("name") if isinstance(oldest, dict) else source_name(checkpoint))
    writer.add_name(Path(name).name.removesuffix(".gguf"))
    if base is not None:
        organization, _, model = base.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, model)
        if organization:
            writer.add_base_model_organization(0, organization)
        writer.add_base_model_version(0, str(revision))
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    card = checkpoint_card(checkpoint) or {}
    for name in LICENCE_KEYS:
        if name in card:
            found = card[name]
            getattr(writer, f"add_{name}")(found if isinstance(found, str) else ", ".join(found))
    if "language" in card:
        writer.add_languages([card["language"]] if isinstance(card["language"], str) else card["language"])
    if artifact.scheme is not None and artifact.scheme.quantizer:
        writer.add_quantized_by(", ".join(artifact.scheme.quantizer))
    writer.add_string("bittern.version", bittern.__version__)


def _grids(grids: dict[str, QuantSpec]) -> str:
    """The grids of packed layers: that of most, and those of the others by name."""
    default = Counter(grids.values()).most_common(1)[0][0]
    others = {layer: asdict(spec) for layer, spec in grids.items() if spec != default}
    return json.dumps({"default": asdict(default), "layers": others})


def _check_output(out: Path, source: Path, overwrite: bool) -> None:
    check_name(out, "gguf")
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise BitternError(f"output {out}: it exists already (--overwrite replaces it)")
    if out.is_symlink() or not out.is_file():
        raise BitternError(f"output {out}: expected a file to overwrite, found something else")
    if out.samefile(source):
        raise BitternError(f"output {out}: expected a file apart from the source")
    with out.open("rb") as file:
        if file.read(4) not in (b"GGUF", b""):
            raise BitternError(f"output {out}: not overwritten, for it is no GGUF file")


@contextmanager
def _partial(out: Path, overwrite: bool) -> Iterator[tuple[Path, int]]:
    """The hidden sibling, open and locked; becomes ``out`` unless an error gets in the way, which removes it."""
    path = out.with_name(f".{out.name}.partial")
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    owned = False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owned = path.exists() and os.path.samestat(os.fstat(file), path.stat())
        except BlockingIOError:
            pass
        if not owned:
            raise BitternError(f"output {out}: another bittern is writing this")
        yield path, file
        with explained(out):
            os.fsync(file)
            if os.path.lexists(out) and not overwrite:
                raise BitternError(f"output {out}: something has appeared there meanwhile")
            path.replace(out)
            owned = False
            fsync(out.parent)
    finally:
        if owned:
            path.unlink(missing_ok=True)
        os.close(file)
