"""The manifest: what a run did, to what, with which versions, and the hashes of what it wrote.

``bittern_manifest.json`` lies in the artifact. docs/manifest.md documents every key, ``manifest.schema.json``
is the schema that :mod:`bittern.schema` holds a manifest to. Two runs with the same seed on the same machine
agree in every file of the artifact and in all of the manifest but ``measured`` and ``prediction``.

A run that reads what bittern has made keeps that one's manifest under ``origin``; what its run measured is
under ``measured``, ``origin``. So a manifest is a chain of runs: :func:`runs` walks it, and
:func:`layer_records` finds the records of the run that chose the codes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bittern
from bittern.disk import read_ahead

MANIFEST_FILE = "bittern_manifest.json"
SCHEMA_VERSION = 3

_BUFFER_BYTES = 4 * 2**20
_VERBS = {"quantize": "quantize", "convert": "convert", "repack": "convert", "uptrain": "uptrain"}  # kind -> command
_NOT_REPEATED = ("overwrite", "revision", "layers", "sym")  # options that the command has in another form, or not


def base_manifest(
    kind: str, source: dict[str, Any], options: dict[str, Any], *, notes: list[str], seconds: float
) -> dict[str, Any]:
    """What the manifests of all jobs have; ``files`` is added when the artifact is committed.

    Args:
        kind: "quantize", "convert", "repack" or "uptrain".
        source: see :func:`bittern.origin.source_record`.
        options: the options that the run was called with, named as those of the command are.
        notes: warnings and fallbacks that a user must know of.
        seconds: wall time of the run.
    """
    import torch

    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "source": source,
        "options": options,
        "command": repeat_command(kind, source, options),
        "notes": notes,
        "versions": {
            "bittern": bittern.__version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "measured": {
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(),
            "threads": torch.get_num_threads(),
            "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
        },
    }


def repeat_command(kind: str, source: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """The command that does the same again, as arguments; ``OUT`` stands for the output.

    A Hub id comes with the commit that was read, whatever branch was asked for.
    """
    command = ["bittern", _VERBS.get(kind, kind), str(source.get("name", "SRC")), "-o", "OUT"]
    if source.get("revision"):
        command += ["--revision", str(source["revision"])]
    if "sym" in options:
        command.append("--sym" if options["sym"] else "--asym")
    for regex, bits in options.get("layers") or ():
        command += ["--layer", f"{regex}=bits:{bits}"]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name in _NOT_REPEATED or value is None or value is False:
            continue
        if value is True:
            command.append(flag)
        else:
            for each in value if isinstance(value, (list, tuple)) else (value,):
                command += [flag, str(each)]
    return command


def make_manifest(
    *,
    source: dict[str, Any],
    options: dict[str, Any],
    calibration: dict[str, Any] | None,
    layers: list[dict[str, Any]],
    kept: dict[str, str],
    notes: list[str],
    seconds: float,
) -> dict[str, Any]:
    """The manifest of a quantization.

    Args:
        source, options, notes, seconds: see :func:`base_manifest`.
        calibration: dataset, tokens asked for and found, hash; None without calibration.
        layers: a record per quantized layer; its ``seconds`` move to ``measured``.
        kept: layers left in 16 bits -> why.
    """
    manifest = base_manifest("quantize", source, options, notes=notes, seconds=seconds)
    manifest["calibration"] = calibration
    manifest["layers"] = [{key: value for key, value in record.items() if key != "seconds"} for record in layers]
    manifest["kept"] = kept
    manifest["measured"]["layer_seconds"] = {record["layer"]: round(record["seconds"], 4) for record in layers}
    return manifest


def repacked_manifest(
    origin: dict[str, Any] | None,
    source: dict[str, Any],
    options: dict[str, Any],
    *,
    repacked: list[dict[str, Any]],
    notes: list[str],
    seconds: float,
) -> dict[str, Any]:
    """The manifest of a repacking, which keeps the story of the run that quantized.

    Args:
        origin: the manifest of what was repacked, None where it had none.
        source, options, notes, seconds: see :func:`base_manifest`.
        repacked: a record per layer: its name as ``layer``, its grid, and what the move cost.
    """
    manifest = base_manifest("repack", source, options, notes=notes, seconds=seconds)
    manifest["repacked"] = repacked
    return with_origin(manifest, origin)


def with_origin(manifest: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
    """A manifest that keeps the story of the runs before it.

    Args:
        manifest: of the run that has just ended.
        origin: the manifest of what it read, None where that had none.
    """
    if origin is None:
        return {**manifest, "origin": None}
    before = {key: value for key, value in origin.items() if key != "measured"}
    return {**manifest, "origin": before, "measured": {**manifest["measured"], "origin": origin.get("measured")}}


def changed_names(manifest: Any, since: Any = None) -> set[str]:
    """The tensors and packed layers that a manifest, or one in its chain of origins, says were changed on purpose.

    Args:
        manifest: of the last run.
        since: the manifest of what an earlier run has made: its changes, and those before, are left out.
    """
    every, before = _changes(manifest), _changes(since)
    return set().union(*every[: max(0, len(every) - len(before))])


def _changes(manifest: Any) -> list[set[str]]:
    """The names that each run of a chain has changed, the last run's first."""
    found = []
    while isinstance(manifest, dict):
        layers = [layer for layer in manifest.get("layers") or () if isinstance(layer, dict)]
        rescaled = {str(layer["layer"]) for layer in layers if layer.get("rescaled")}
        found.append(rescaled | {str(name) for name in manifest.get("changed") or ()})
        manifest = manifest.get("origin")
    return found


def runs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run of a manifest that keeps to the schema, the first one first, each with its own ``measured``.

    ``origin`` is left out of them; ``measured`` is empty where it is not known.
    """
    found: list[dict[str, Any]] = []
    run: dict[str, Any] | None = manifest
    measured: dict[str, Any] | None = manifest.get("measured")
    while run is not None:
        own = {key: value for key, value in (measured or {}).items() if key != "origin"}
        found.append({**{key: value for key, value in run.items() if key != "origin"}, "measured": own})
        run, measured = run.get("origin"), (measured or {}).get("origin")
    return found[::-1]


def degraded_reason(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint is known to be worse than it should be: uptraining leaves it, what is made of that inherits it.

    Args:
        config: its config.json.
    """
    own = config.get("bittern")
    reason = own.get("degraded") if isinstance(own, dict) else None
    return reason if isinstance(reason, str) else None


def degraded_notes(reason: str | None) -> list[str]:
    """The note of a manifest about that; none without a reason."""
    return [f"this checkpoint is degraded: {reason}"] if reason else []


def layer_records(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the layers from the run that quantized them, however often they were repacked since.

    Args:
        manifest: of any kind, as it was read from a file.

    Returns:
        One record per layer; empty when bittern has not quantized it.
    """
    found: Any = manifest
    while isinstance(found, dict):
        layers = found.get("layers")
        if isinstance(layers, list):
            return [record for record in layers if isinstance(record, dict)]
        found = found.get("origin")
    return []


def file_record(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as ``files`` of a manifest has them.

    Raises:
        OSError: when it cannot be read.
    """
    buffer = bytearray(_BUFFER_BYTES)
    view, digest, size = memoryview(buffer), hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        read_ahead(file.fileno())
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
