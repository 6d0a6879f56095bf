"""The ways to make an artifact that quality.py compares: which tool, with which of its options, by which command."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers

BITTERN = Path(__file__).resolve().parents[1] / "bittern"


@dataclass(frozen=True)
class Tool:
    """A tool with some of its options.

    Attributes:
        label: what tables call it.
        home: its environment; None for bittern.
        script: what runs it there.
        words: options of the command, ``{bits}`` and such left to fill in.
        calibrated: whether it is given calibration tokens.
    """

    label: str
    home: str | None
    script: str
    words: tuple[str, ...] = ()
    calibrated: bool = True


_GPTQMODEL = ("gptqmodel", "gptqmodel_quantize.py")
_COMPRESSOR = ("llmcompressor", "llmcompressor_quantize.py")

REFERENCE = "GPTQModel"
"""The label of the tool that ratios are to."""

# Its own choice on a CPU is bfloat16, which takes four times as long on a processor without instructions for it.
_FP32 = ("--dtype", "float32")

# What their documentation offers for quality, alone and together: what is best for a model only a run can say.
TOOLS: Mapping[str, Tool] = {
    "bittern": Tool("bittern", None, ""),
    "rtn": Tool("round to nearest", None, "", ("--method", "rtn"), calibrated=False),
    "gptqmodel": Tool(REFERENCE, *_GPTQMODEL, _FP32),
    "gptqmodel-bf16": Tool("GPTQModel bf16", *_GPTQMODEL),
    "gptqmodel-actorder": Tool("GPTQModel desc_act", *_GPTQMODEL, (*_FP32, "--desc-act")),
    "gptqmodel-mse": Tool("GPTQModel mse", *_GPTQMODEL, (*_FP32, "--mse", "2.4")),
    "gptqmodel-damp": Tool("GPTQModel damp .01", *_GPTQMODEL, (*_FP32, "--damp-percent", "0.01")),
    "gptqmodel-gptaq": Tool("GPTQModel GPTAQ", *_GPTQMODEL, (*_FP32, "--gptaq", "0.25")),
    "gptqmodel-best": Tool("GPTQModel desc_act mse", *_GPTQMODEL, (*_FP32, "--desc-act", "--mse", "2.4")),
    "gptqmodel-all": Tool(
        "GPTQModel desc_act mse damp .01 GPTAQ",
        *_GPTQMODEL,
        (*_FP32, "--desc-act", "--mse", "2.4", "--damp-percent", "0.01", "--gptaq", "0.25"),
    ),
    "llmcompressor": Tool("llm-compressor", *_COMPRESSOR),
    "llmcompressor-best": Tool("llm-compressor mse", *_COMPRESSOR, ("--observer", "mse")),
    "llmcompressor-imatrix": Tool("llm-compressor imatrix", *_COMPRESSOR, ("--observer", "imatrix_mse")),
    "autoround": Tool("AutoRound", "autoround", "autoround_quantize.py"),
    "autoround-ext": Tool("AutoRound alg_ext", "autoround", "autoround_quantize.py", ("--alg-ext",)),
    "autoround-best": Tool(
        "AutoRound 1000 steps, alg_ext", "autoround", "autoround_quantize.py", ("--iters", "1000", "--alg-ext")
    ),
    "llamacpp": Tool("llama.cpp", "llamacpp", "llamacpp_quantize.py", calibrated=False),
}
STANDARD = (
    "bittern",
    "rtn",
    "gptqmodel",
    "gptqmodel-best",
    "llmcompressor",
    "llmcompressor-best",
    "autoround",
    "llamacpp",
)
"""The tools of a table unless it names others."""

# llama.cpp's types nearest to a number of bits, by name; what they take in truth stands in the table.
KINDS = {8: ("Q8_0",), 4: ("Q4_0", "Q4_K_M"), 3: ("Q3_K_S",), 2: ("Q2_K",)}


@dataclass(frozen=True)
class Recipe:
    """One artifact to be made.

    Attributes:
        tool: which tool makes it, a key of ``TOOLS``.
        label: its line in tables and pictures, without the bits.
        bits: nominal ones.
        words: all that the command is given beside model, calibration and output.
        version: of the tool. bittern's is a hash of what quantizes, for it changes under its own benchmark.
    """

    tool: str
    label: str
    bits: int
    words: tuple[str, ...]
    version: str

    @property
    def home(self) -> str | None:
        return TOOLS[self.tool].home

    @property
    def calibrated(self) -> bool:
        return TOOLS[self.tool].calibrated


def recipes(
    tools: Sequence[str],
    bits: Sequence[int],
    group_size: int,
    efforts: Sequence[str] = (),
    autoround: Mapping[str, str] | None = None,
) -> list[Recipe]:
    """Every artifact of a table, in the order of ``bits`` and ``tools``.

    Args:
        tools: keys of ``TOOLS``.
        bits: nominal ones.
        group_size: of all that take one; llama.cpp's are its own.
        efforts: values of ``bittern quantize --effort``, an artifact each, with ``:N`` that of ``--tune-tokens`` behind
            it where asked for; none leaves bittern at its default.
        autoround: options of AutoRound's script, such as iters; they become part of its label.
    """
    found = []
    for width in bits:
        shape = ("--bits", str(width), "--group-size", str(group_size))
        for name in tools:
            tool = TOOLS[name]
            version = source_version() if tool.home is None else peers.PACKAGES[tool.home][-1]
            shaped = () if name == "llamacpp" else shape
            for label, more in _variants(name, width, efforts, autoround or {}):
                found.append(Recipe(name, label, width, (*shaped, *tool.words, *more), version))
    return found


def _variants(
    name: str, bits: int, efforts: Sequence[str], autoround: Mapping[str, str]
) -> list[tuple[str, tuple[str, ...]]]:
    """The rows of a tool at some bits: label, and options beside the tool's own."""
    label = TOOLS[name].label
    if name == "bittern" and efforts:
        return [_effort(label, *effort.split(":")) for effort in efforts]
    if name == "llamacpp":
        return [(f"{label} {kind}", ("--kind", kind)) for kind in KINDS[bits]]
    if name == "autoround" and autoround:
        said = ", ".join(f"{option} {value}" for option, value in autoround.items())
        return [(f"{label} {said}", tuple(word for pair in autoround.items() for word in (f"--{pair[0]}", pair[1])))]
    return [(label, ())]


def _effort(label: str, effort: str, tokens: str | None = None) -> tuple[str, tuple[str, ...]]:
    if tokens is None:
        return f"{label} {effort}", ("--effort", effort)
    return f"{label} {effort}, {tokens} tokens trained", ("--effort", effort, "--tune-tokens", tokens)


def source_version() -> str:
    """A hash of bittern's code that decides what an artifact holds."""
    digest = hashlib.sha256()
    for path in sorted([*(BITTERN / "quantize").glob("*.py"), *(BITTERN / "formats").glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def protocol(recipe: Recipe, model: str, calibration: str, device: str = "cpu") -> dict[str, Any]:
    """All that decides what an artifact holds; a record with another one is of something else.

    Args:
        model: hash of the unquantized checkpoint.
        calibration: hash of the calibration tokens.
        device: that the tool computes on; a CPU goes without saying.
    """
    return {
        **({} if device == "cpu" else {"device": device}),
        "tool": recipe.tool,
        "version": recipe.version,
        "words": list(recipe.words),
        "model": model,
        "calibration": calibration if recipe.calibrated else None,
    }


def key(found: Mapping[str, Any]) -> str:
    """A short name for a protocol."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:10]


def command(
    recipe: Recipe,
    model: str | Path,
    output: Path,
    *,
    ids: Path,
    dataset: Sequence[str],
    gguf: Path,
    envs: Path,
    device: str = "cpu",
) -> list[str | Path]:
    """What makes an artifact.

    Args:
        ids: file of calibration tokens, for the peers.
        dataset: the options by which bittern finds the same tokens.
        gguf: the model as a GGUF file of floats, for llama.cpp.
        envs: folder of the peers' environments.
        device: for all but llama.cpp, which quantizes on the CPU.
    """
    tool = TOOLS[recipe.tool]
    start: list[str | Path]
    if tool.home is None:
        calibration = dataset if tool.calibrated else ()
        start = [sys.executable, "-m", "bittern", "quantize", model, "-o", output, "--device", device]
        return [*start, *recipe.words, *calibration]
    start = [peers.interpreter(tool.home, envs), peers.SCRIPTS / tool.script]
    if recipe.tool == "llamacpp":
        return [*start, gguf, output, *recipe.words]
    return [*start, model, output, "--calibration", ids, "--device", device, *recipe.words]
