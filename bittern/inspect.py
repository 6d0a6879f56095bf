"""What is in a checkpoint, from its headers and config alone."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from bittern.artifact import FORMATS, Artifact, quantization_config, read_scheme
from bittern.checkpoint import Checkpoint, open_checkpoint
from bittern.consumers import Verdict, verdicts
from bittern.errors import BitternError
from bittern.layout import Layout, layout_of
from bittern.report import MANIFEST_FILE
from bittern.schema import read_manifest
from bittern.shards import dtype_name
from bittern.size import KINDS, artifact_parameters, bits_per_weight, cache_size, kind, kv_elements, stored_bytes
from bittern.story import kind_of, tell

__all__ = ["KINDS", "inspect", "kind", "kv_elements"]


def inspect(source: str | os.PathLike[str], revision: str | None = None) -> dict[str, Any]:
    """Describe a checkpoint folder, a GGUF file or a Hub id without reading weights, or fetching them.

    Returns:
        A dictionary that JSON holds:

        - ``source``, ``revision``, ``model_type``, ``architectures``, ``context_length`` (None: no limit)
        - ``parameters``: of the model, whatever its packing; None for a packing that is not understood
        - ``bits_per_weight``: ``all`` and ``without_embeddings`` (nor head): stored bits, scales and
          zeros included, per parameter
        - ``bytes``: per kind of layer (``KINDS``) and ``total``
        - ``kv_bytes_per_token``: ``fp16`` and ``fp32``; 0 without attention, None for an unknown architecture
        - ``dtypes``: name -> ``tensors``, ``bytes``
        - ``quantization``: None, or method, format, bits, group_size, sym, desc_act, quantizer, ``layers`` (grid ->
          how many) and ``exceptions`` (layer -> grid, None for one left as floats); one that bittern does not
          read is there in its own words
        - ``files``: name -> bytes
        - ``manifest``: what bittern's manifest tells: ``schema_version``, ``kind``, ``story`` (a sentence per run and
          per measurement), ``notes`` and ``command``; ``problem`` alone where it does not keep to the schema; None
          without one
        - ``loads``: per consumer ``consumer``, ``loads``, ``reason``; of a quantization that bittern does not
          read, its own reason alone

    Raises:
        BitternError: not a checkpoint, or packed tensors that contradict its config.
    """
    with open_checkpoint(source, revision, headers_only=True) as checkpoint:
        length, cache = cache_size(checkpoint.config)
        method, found = quantization_config(checkpoint)
        unread = _why_unread(method, found, checkpoint.tensors)
        artifact = Artifact(checkpoint) if unread is None else None
        layout = None if artifact is None else layout_of(artifact)
        parameters = None if artifact is None else artifact_parameters(artifact)
        sizes = stored_bytes(checkpoint)
        judged = [Verdict("bittern", False, str(unread))] if layout is None else verdicts(layout)
        return {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "model_type": checkpoint.config.get("model_type"),
            "architectures": checkpoint.config.get("architectures") or [],
            "context_length": length,
            "parameters": None if parameters is None else sum(parameters.values()),
            "bits_per_weight": None if parameters is None else bits_per_weight(parameters, sizes),
            "bytes": {**sizes, "total": sum(sizes.values())},
            "kv_bytes_per_token": cache,
            "dtypes": _dtypes(checkpoint),
            "quantization": _summary(artifact, layout) if artifact and layout else found,
            "files": _files(checkpoint),
            "manifest": _manifest(checkpoint),
            "loads": [asdict(verdict) for verdict in judged],
        }


def _why_unread(method: str | None, found: Mapping[str, Any], tensors: Iterable[str]) -> str | None:
    """Why bittern does not understand a quantization, which is then shown as it was found."""
    if method is None:
        return None
    if method not in FORMATS:
        return f"quant_method: expected one of {', '.join(FORMATS)}, found {method!r}"
    try:
        read_scheme(method, found, tensors)
    except BitternError as error:
        return str(error)
    return None


def _dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    result: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"tensors": 0, "bytes": 0})
    gguf = checkpoint.gguf
    for name, info in checkpoint.tensors.items():
        kind = dtype_name(info.dtype) if gguf is None else "+".join(sorted(gguf.kinds(name)))
        entry = result[kind]
        entry["tensors"] += 1
        entry["bytes"] += info.nbytes if gguf is None else gguf.nbytes[name]
    return dict(result)


def _summary(artifact: Artifact, layout: Layout) -> dict[str, Any] | None:
    """What a user asks of a quantization."""
    if not layout.packed:
        return None
    grids = Counter(layout.packed.values())
    # a GGUF file states no grid of its own: what most layers have stands for it
    default = grids.most_common(1)[0][0] if artifact.scheme is None else artifact.scheme.default
    return {
        "method": quantization_config(artifact.checkpoint)[0] or "gguf",
        "format": layout.format,
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.sym,
        "desc_act": layout.desc_act,
        "quantizer": list(layout.quantizer),
        "layers": {f"{s.bits} bits, group {s.group_size}, {'sym' if s.sym else 'asym'}": n for s, n in grids.items()},
        "exceptions": {
            **{name: asdict(spec) for name, spec in layout.packed.items() if spec != default},
            **dict.fromkeys(layout.plain),
        },
    }


def _manifest(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if checkpoint.gguf is not None or not (checkpoint.folder / MANIFEST_FILE).is_file():
        return None
    try:
        manifest = read_manifest(checkpoint.folder)
    except BitternError as error:
        return {"problem": str(error)}
    return {
        "schema_version": manifest["schema_version"],
        "kind": kind_of(manifest),
        "story": tell(manifest),
        "notes": manifest["notes"],
        "command": manifest.get("command"),
    }


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    if checkpoint.gguf is not None:
        return {checkpoint.path.name: checkpoint.path.stat().st_size}
    return {path.name: path.stat().st_size for path in sorted(checkpoint.folder.iterdir()) if path.is_file()}
