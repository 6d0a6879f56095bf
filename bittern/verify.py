"""Whether an artifact is whole, and whether it still is what it was made of.

Hashes speak of bytes, tensors of the architecture, values of what the bytes mean, logits of the model that
comes out. One layer is in memory at a time, but for logits: they need a whole model in fp32 after the other.
"""

from __future__ import annotations

import gc
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittern.artifact import CONFIG_KEYS
from bittern.checkpoint import Checkpoint, contained, open_checkpoint, read_json
from bittern.compare import Comparison, View
from bittern.errors import BitternError, first_line
from bittern.report import MANIFEST_FILE, changed_names, file_record, runs
from bittern.runtime.load import load
from bittern.schema import problem
from bittern.tokenizer import check_vocabulary, context_length
from bittern.weight import is_finite

PROMPTS = (
    "Once upon a time there was a small house at the edge of the forest, and in it",
    "The three primary colours are red, blue and",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
)
LOGIT_TOLERANCE = 1e-3
"""How far the logits of equal weights may be apart, relative to the largest."""

OnStep = Callable[[str, int, int], None]
"""Called within a check with its name, the steps done and their number."""

_MOST_TOKENS = 256  # of a prompt
_PIECE = 2**21  # elements of plain tensors that are looked at at once
_NAMED = 5  # names in a message
_WEIGHTS = (".safetensors", ".safetensors.index.json")
# What may differ between the configurations of an artifact and of its source.
_NO_ARCHITECTURE = {"architectures", "dtype", *CONFIG_KEYS, "transformers_version", "use_cache"}
_IDLE = re.compile(r"^_|^initializer_|(dropout|_pdrop|layerdrop|_dropout_prob)$|^router_aux_loss_coef$|^output_router")


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes:
        name: "manifest", "files", "tensors", "values", "source config", "source tensors", "source values", "tokenizer"
            or "logits".
        passed: None when it was not asked; ``detail`` says why.
        detail: one line: what was counted and measured, or what is wrong.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        output, against: as the caller named them.
        checks: in the order in which they were made.
    """

    output: str
    against: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        return {**asdict(self), "passed": self.passed}


def verify(
    output: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    logits: bool = True,
    prompt: str | None = None,
    threads: int | None = None,
    revision: str | None = None,
    on_step: OnStep | None = None,
) -> Verification:
    """Check an artifact: hashes, tensors, values and logits, all but the first also against its source.

    Args:
        output: a folder, a GGUF file or a Hub id; packed or plain, made by whomever.
        against: what it was made of, in any of these forms.
        logits: whether to run the models.
        prompt: what tokenizers and models are given instead of :data:`PROMPTS`.
        threads: of torch; None for its own choice.
        revision: of ``against`` when that is a Hub id; without it, of ``output``.
        on_step: see :data:`OnStep`.

    Returns:
        The checks. What is wrong with ``output`` is a failed one.

    Raises:
        BitternError: when there is nothing at ``output``, ``against`` cannot be opened, or nothing reads ``prompt``.
    """
    if prompt is not None and not logits and against is None:
        raise BitternError("prompt: expected a source to compare tokens with, or logits; nothing else reads it")
    step: OnStep = on_step or (lambda name, done, total: None)
    checks = _Checks()
    own = revision if against is None else None
    with ExitStack() as stack:
        base = None if against is None else stack.enter_context(open_checkpoint(against, revision))
        checkpoint = _open(output, own, checks)
        folder = Path(output) if checkpoint is None else stack.enter_context(checkpoint).path
        with checks.guard("manifest"):
            checks.append(_manifest(folder))
        with checks.guard("files"):
            checks.append(check_files(folder, step))
        view = source = comparison = None
        if checkpoint is not None:
            with checks.guard("tensors"):
                view = View(checkpoint)
                checks.append(_tensors(view, base))
        if view is not None:
            with checks.guard("values"):
                checks.append(_values(view, step))
        if view is not None and base is not None:
            with checks.guard("source tensors"):
                source = View(base)
                checks.append(_config(view, source))
                inexact = _allows_inexact(folder)
                changed = _changed(view, source)
                comparison = Comparison(
                    view, source, inexact, changed, lambda done, total: step("source values", done, total)
                )
                checks += [_source_tensors(comparison), _source_values(comparison)]
            with checks.guard("tokenizer"):
                checks.append(_tokenizers(view, base, prompt))
        with checks.guard("logits"), _torch_threads(threads):
            if not logits:
                checks.append(Check("logits", None, "not asked for"))
            elif view is None or (base is not None and comparison is None):
                checks.append(Check("logits", None, "not run: the tensors are not in order"))
            elif view.unplaced:
                checks.append(Check("logits", None, f"not run: bittern run has no place for {_named(view.unplaced)}"))
            else:
                prompts, note = _prompts(view, prompt)
                found = _run(output, own, prompts, lambda done, total: step("logits", done, total))
                expected = None if against is None else _run(against, revision, prompts, lambda *_: None)
                checks.append(_logits(found, expected, note, comparison))
    return Verification(os.fspath(output), None if against is None else os.fspath(against), tuple(checks))


class _Checks(list[Check]):
    """The checks so far."""

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Make a failed check of an error."""
        try:
            yield
        except BitternError as error:
            self.append(Check(name, False, str(error)))
        except Exception as error:  # on broken files transformers and torch raise whatever comes of them
            self.append(Check(name, False, f"{type(error).__name__}: {first_line(error)}"))


def _open(output: str | os.PathLike[str], revision: str | None, checks: _Checks) -> Checkpoint | None:
    """The artifact; None with a failed check when it is there but cannot be opened."""
    if not os.fspath(output) or not Path(output).exists() or revision is not None:
        return open_checkpoint(output, revision)
    with checks.guard("tensors"):
        return open_checkpoint(output)
    return None


def _manifest(folder: Path) -> Check:
    """The manifest against its schema."""
    if not (folder / MANIFEST_FILE).is_file():
        return Check("manifest", None, f"no {MANIFEST_FILE}: not written by bittern, or as a GGUF file")
    manifest = read_json(contained(folder, MANIFEST_FILE))
    wrong = problem(manifest)
    if wrong is not None:
        return Check("manifest", False, f"{MANIFEST_FILE}: {wrong}")
    count = len(runs(manifest))
    told = f"a chain of {count} runs, the last" if count > 1 else "a run"
    return Check("manifest", True, f"schema {manifest['schema_version']}: {told} of {manifest.get('kind', 'quantize')}")


def check_files(folder: Path, step: OnStep) -> Check:
    """Sizes and hashes of an artifact's files against its manifest.

    Raises:
        BitternError: for a manifest that is broken or names files outside the folder.
    """
    if not folder.is_dir():
        return Check("files", None, "a GGUF file has no manifest with hashes")
    if not (folder / MANIFEST_FILE).is_file():
        return Check("files", None, f"no {MANIFEST_FILE}, so no hashes: not written by bittern")
    listed = read_json(contained(folder, MANIFEST_FILE)).get("files")
    if listed is None:
        return Check("files", None, f"{MANIFEST_FILE} has no hashes: written by an older bittern")
    if not isinstance(listed, dict) or not all(isinstance(record, dict) for record in listed.values()):
        raise BitternError(f"{MANIFEST_FILE}: files: expected an object of objects")
    wrong, size = [], 0
    for done, (name, record) in enumerate(listed.items(), 1):
        path = contained(folder, name)
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != record.get("bytes"):
            wrong.append(f"{name} has {path.stat().st_size} bytes, expected {record.get('bytes')}")
        elif file_record(path)["sha256"] != record.get("sha256"):
            wrong.append(f"{name} has another hash")
        else:
            size += path.stat().st_size
        step("files", done, len(listed))
    inside = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    shown = [str(path) for path in inside if not any(part.startswith(".") for part in path.parts)]
    unlisted = [name for name in shown if name not in listed and name != MANIFEST_FILE]
    wrong += [f"{name} is not listed" for name in unlisted if name.endswith(_WEIGHTS)]
    if wrong:
        return Check("files", False, _named(wrong))
    more = f"; not listed: {_named(unlisted)}" if unlisted else ""
    return Check("files", True, f"{len(listed)} files, {size} bytes, as {MANIFEST_FILE} has them{more}")


def _tensors(view: View, base: Checkpoint | None) -> Check:
    """Every tensor is accounted for by the architecture, or by the source."""
    artifact = view.artifact
    foreign = [name for name in view.unplaced if base is None or name not in base.tensors]
    if foreign:
        kind = view.model.config.model_type
        return Check("tensors", False, f"a {kind} model has no place for {_named(foreign)}")
    what = f"{len(artifact.layers)} packed layers ({artifact.format}), " if artifact.layers else ""
    more = f"; beside the model, as in the source: {_named(view.unplaced)}" if view.unplaced else ""
    return Check("tensors", True, f"{what}{len(artifact.plain)} plain tensors, all of the architecture's{more}")


def _values(view: View, step: OnStep) -> Check:
    """Every packed layer can be unpacked, and every float is finite."""
    artifact, wrong = view.artifact, []
    total = len(artifact.layers) + len(artifact.plain)
    for done, layer in enumerate(artifact.layers, 1):
        try:
            weight = artifact.read(layer)
            for name, values in (("codes", weight.codes), ("zeros", weight.zeros)):
                if int(values.max()) > weight.spec.max_code:
                    wrong.append(f"{layer}: {name} above {weight.spec.max_code}")
            if not is_finite(weight.scales):
                wrong.append(f"{layer}: scales that are NaN or infinite")
        except BitternError as error:
            wrong.append(str(error))
        step("values", done, total)
    for done, info in enumerate(artifact.plain.values(), 1 + len(artifact.layers)):
        pieces = range(0, info.numel if info.dtype.is_floating_point else 0, _PIECE)
        read = artifact.checkpoint.read_elements
        if not all(is_finite(read(info.name, at, min(at + _PIECE, info.numel)).float()) for at in pieces):
            wrong.append(f"{info.name}: NaN or infinite values")
        step("values", done, total)
    if wrong:
        return Check("values", False, _named(wrong))
    return Check("values", True, "every packed layer unpacks, every float is finite")


def _config(view: View, source: View) -> Check:
    """Both configurations describe the same model."""
    found, expected = (side.model.config.to_dict() for side in (view, source))
    names = sorted(name for name in {*found, *expected} - _NO_ARCHITECTURE if not _IDLE.search(name))
    differing = [
        f"{name} is {found.get(name)!r}, {expected.get(name)!r} in the source"
        for name in names
        if not _same(found.get(name), expected.get(name))
    ]
    if not differing:
        return Check("source config", True, f"{len(names)} keys describe the same model")
    if "gguf" in (view.artifact.format, source.artifact.format):
        return Check("source config", None, f"metadata of GGUF say less than a config.json: {_named(differing)}")
    return Check("source config", False, _named(differing))


def _same(found: Any, expected: Any) -> bool:
    """Equality of JSON values, of floats in fp32: GGUF's metadata have no wider ones."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in found)
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=2**-23)
    return bool(found == expected)


def _allows_inexact(folder: Path) -> bool:
    """Whether the artifact's manifest says that its user allowed rounding."""
    path = folder / MANIFEST_FILE
    options = read_json(path).get("options") if path.is_file() else None
    return isinstance(options, dict) and options.get("allow_inexact") is True


def _changed(view: View, source: View) -> set[str]:
    """What was changed on purpose since: a GGUF file says so itself, of other artifacts the manifest does."""
    if source.artifact.layers:  # of what is quantized already, nothing is made that is not to be the same
        return set()
    if view.artifact.checkpoint.gguf is not None:
        return set(view.artifact.checkpoint.gguf.changed)
    paths = [side.artifact.checkpoint.path / MANIFEST_FILE for side in (view, source)]
    return changed_names(*(read_json(path) if path.is_file() else None for path in paths))


def _source_tensors(comparison: Comparison) -> Check:
    """Nothing of the source was dropped."""
    added = f"; only here: {_named(comparison.added)}" if comparison.added else ""
    if comparison.missing:
        return Check("source tensors", False, f"missing: {_named(comparison.missing)}{added}")
    excused = f"; left out, for nothing needs them: {_named(comparison.excused)}" if comparison.excused else ""
    return Check("source tensors", True, f"nothing of the source is missing{excused}{added}")


def _source_values(comparison: Comparison) -> Check:
    """What is here is the source's, or as near to it as a grid is."""
    if comparison.wrong:
        detail = _named([f"{name}: {why}" for name, why in comparison.wrong.items()])
        return Check("source values", False, detail)
    found = []
    if comparison.equal:
        found.append(f"{len(comparison.equal)} plain tensors equal")
    if comparison.layers:
        steps = f" within {comparison.steps:.2g} steps" if comparison.steps else ""
        found.append(f"{len(comparison.layers)} packed layers equal{steps}, {len(comparison.same_codes)} in codes too")
    if comparison.changed:
        found.append(f"{len(comparison.changed)} tensors rescaled or trained as the artifact says: the logits tell")
    if comparison.errors:
        worst = ", ".join(f"{name} {error:.4f}" for name, error in comparison.worst)
        found.append(f"{len(comparison.errors)} layers quantized, largest relative errors: {worst}")
    return Check("source values", True, "; ".join(found))


def _tokenizers(view: View, base: Checkpoint, prompt: str | None) -> Check:
    """Both make the same tokens of the same text."""
    try:
        theirs = base.tokenizer()
    except BitternError as error:
        return Check("tokenizer", None, str(error))
    try:
        mine = view.artifact.checkpoint.tokenizer()
    except BitternError as error:
        return Check("tokenizer", False, f"the source has one, here: {error}")
    texts = PROMPTS if prompt is None else (prompt,)
    for text in texts:
        found, expected = (list(one(text, verbose=False)["input_ids"]) for one in (mine, theirs))
        if found != expected:
            detail = f"expected tokens {expected[:8]} and so on of {text[:20]!r}, found {found[:8]}"
            return Check("tokenizer", False, detail)
    if mine.chat_template != theirs.chat_template and view.artifact.checkpoint.gguf is base.gguf is None:
        return Check("tokenizer", False, "its chat template is not the source's")
    return Check("tokenizer", True, f"the source's tokens of {len(texts)} texts")


def _prompts(view: View, prompt: str | None) -> tuple[list[Tensor], str]:
    """Token ids to run the models on, (1, tokens) each, and what they are."""
    config = view.model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    limit = min(context_length(config) or _MOST_TOKENS, _MOST_TOKENS)
    try:
        tokenizer = view.artifact.checkpoint.tokenizer()
    except BitternError:
        if prompt is not None:
            raise
        ids = torch.randint(vocabulary, (len(PROMPTS), min(limit, 16)), generator=torch.Generator().manual_seed(0))
        return [row.unsqueeze(0) for row in ids], f"{ids.numel()} random tokens, for it has no tokenizer"
    texts = PROMPTS if prompt is None else (prompt,)
    prompts = [torch.tensor([tokenizer(one, verbose=False)["input_ids"][:limit]]) for one in texts]
    if not all(ids.numel() for ids in prompts):
        raise BitternError("prompt: expected at least one token, found none")
    for ids in prompts:
        check_vocabulary(ids, tokenizer, vocabulary)
    return prompts, f"{sum(ids.numel() for ids in prompts)} tokens"


@torch.inference_mode()
def _run(
    path: str | os.PathLike[str],
    revision: str | None,
    prompts: Sequence[Tensor],
    on_prompt: Callable[[int, int], None],
) -> Tensor:
    """Logits of all prompts in a row, fp32 (tokens, vocabulary); the model is freed."""
    model = load(path, device="cpu", dtype=torch.float32, revision=revision, kernels="torch", decoder=False)
    found = []
    for done, ids in enumerate(prompts, 1):
        found.append(model(input_ids=ids, use_cache=False).logits[0].float())
        on_prompt(done, len(prompts))
    del model
    gc.collect()  # modules refer to each other in circles
    return torch.cat(found)


def _logits(found: Tensor, expected: Tensor | None, note: str, comparison: Comparison | None) -> Check:
    """The models' outputs: numbers at all, and how far from the source's."""
    for logits, whose in ((found, "its"), (expected, "the source's")):
        if logits is not None and not is_finite(logits):
            return Check("logits", False, f"{whose} logits hold NaN or Inf on {note}")
    if bool((found == found[:, :1]).all()):
        return Check("logits", False, f"all logits are the same on {note}")
    if expected is None or comparison is None:
        return Check("logits", True, f"finite on {note}")
    if found.shape != expected.shape:
        return Check("logits", False, f"a vocabulary of {found.shape[1]} tokens, {expected.shape[1]} in the source")
    difference = float((found - expected).abs().max())
    relative = difference / max(float(expected.abs().max()), 1e-30)
    target = expected.log_softmax(1)
    kl = float((target.exp() * (target - found.log_softmax(1))).sum(1).double().mean())
    agreement = float((found.argmax(1) == expected.argmax(1)).double().mean())
    detail = f"largest difference {difference:.3g} ({relative:.2g} of the largest), KL {kl:.3g}, top-1 {agreement:.1%}"
    exact = not comparison.rounded or bool(comparison.wrong)
    if exact and relative > LOGIT_TOLERANCE:
        return Check("logits", False, f"{detail}; expected {LOGIT_TOLERANCE:g} at most on {note}")
    ignorant = math.log(found.shape[1]) + float((target.exp() * target).sum(1).double().mean())
    if comparison.changed and kl >= ignorant:  # what was rescaled or trained is told by nothing else
        return Check("logits", False, f"{detail}; a model that knows nothing has {ignorant:.3g} on {note}")
    return Check("logits", True, f"{detail} on {note}")


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _named(items: Sequence[str]) -> str:
    """The first few of them on one line."""
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + more
