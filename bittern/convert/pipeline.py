"""The convert command: another dtype, another packing, or floats again, as source and format ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bittern.artifact import Artifact
from bittern.checkpoint import open_checkpoint
from bittern.convert.cast import ConvertSummary
from bittern.convert.cast import convert as cast
from bittern.convert.repack import RepackSummary, dequantize, repack
from bittern.errors import BitternError
from bittern.fit import fit
from bittern.formats.packing import FORMATS as FOLDER_FORMATS
from bittern.formats.packing import check_name, is_gguf
from bittern.rope import says_old_rope, with_old_rope
from bittern.writer import MAX_SHARD_SIZE, check_output

if TYPE_CHECKING:
    from bittern.convert.gguf import GgufSummary

FORMATS = ("safetensors", *FOLDER_FORMATS, "gguf")

OnProgress = Callable[[str, int, int], None]
"""Called with what was done last, and how much of how much is done: bytes, or packed layers."""


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    target: str | None = None,
    dtype: str | None = None,
    clamp: bool = False,
    allow_inexact: bool = False,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
) -> ConvertSummary | RepackSummary | GgufSummary:
    """Write the checkpoint ``source`` to ``output`` in another dtype or format; nothing is quantized.

    Args:
        source: a folder, a .gguf file or a Hub id, packed or not.
        output: a folder that does not exist yet, unless ``overwrite``; for "gguf" a file whose name ends in .gguf.
        format: one of ``FORMATS``. "safetensors" is a plain checkpoint: of a packed source the weights as
            floats. By default "gguf" when ``output`` ends in .gguf, else "safetensors".
        target: the consumer that it is for (see :data:`bittern.consumers.TARGETS`); picks the format when
            none is given, and refuses what that consumer does not load or gets wrong.
        dtype: "bf16", "fp16" or "fp32" of what is not packed. By default "bf16" where safetensors
            are made of a plain source or of a GGUF file, else as stored.
        clamp: see :func:`bittern.convert.cast.cast`.
        allow_inexact: round what the format cannot hold exactly, and state the error.
        max_shard_size: bytes of a shard, of which a GGUF file has none; by default 5 GB.
        overwrite: replace the checkpoint that is at ``output``.
        revision: of a Hub id.
        on_progress: see :data:`OnProgress`.

    Raises:
        BitternError: for a source that cannot be read, a combination that cannot be exact or that the target does
            not load, and an output that may not or cannot be written.
    """
    with open_checkpoint(source, revision, headers_only=True) as checkpoint:
        artifact = Artifact(checkpoint)
        packed = bool(artifact.layers) and (artifact.format != "gguf" or format not in (None, "safetensors"))
        if target is not None:
            format = _for_target(target, artifact, format, allow_inexact)
        format = format or ("gguf" if is_gguf(output) else "safetensors")
        check_name(output, format)
        if format not in FORMATS:
            raise BitternError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
        if clamp and (packed or format != "safetensors"):
            what = "packed layers" if packed else format
            raise BitternError(f"clamp: expected floats of a plain checkpoint to be cast to safetensors, found {what}")
        if format == "gguf":
            if max_shard_size is not None:
                raise BitternError("max_shard_size: a GGUF file is written whole, without shards")
            from bittern.convert.gguf import write_gguf

            return write_gguf(
                artifact,
                Path(output),
                dtype=dtype,
                allow_inexact=allow_inexact,
                overwrite=overwrite,
                on_tensor=on_progress,
            )
        check_output(Path(output), checkpoint.path, overwrite)  # before what is on the Hub is downloaded
        if packed and checkpoint.headers_only:
            fit(artifact)
    max_shard_size = MAX_SHARD_SIZE if max_shard_size is None else max_shard_size
    if format == "safetensors" and not packed:
        return cast(
            source,
            output,
            dtype=dtype or "bf16",
            clamp=clamp,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            revision=revision,
            on_tensor=on_progress,
        )
    if format == "safetensors":
        return dequantize(
            source,
            output,
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            revision=revision,
            on_layer=on_progress,
        )
    return repack(
        source,
        output,
        format=format,
        dtype=dtype,
        allow_inexact=allow_inexact,
        target=target,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        revision=revision,
        on_layer=on_progress,
    )


def _for_target(target: str, artifact: Artifact, format: str | None, allow_inexact: bool) -> str:
    """The format that a target takes; the one asked for, when it does take that."""
    from bittern.consumers import check_target, choose_format
    from bittern.layout import layout_of

    # RoPE gets its old names with whatever is written.
    layout = replace(layout_of(artifact), old_rope=says_old_rope(with_old_rope(artifact.checkpoint.config)))
    if format is None:
        return choose_format(target, layout, allow_inexact=allow_inexact)
    check_target(target, replace(layout, format=format))
    return format
