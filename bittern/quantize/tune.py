"""Train scales and norms end to end, towards the logits of the full-precision model; the codes stay.

The cheapest large gain after the grid (Chen et al. 2024, EfficientQAT, whose second phase this is): a scale is a
handful of bits that the artifact has anyway. What is trained is a factor of each scale and of what each norm
multiplies with, less one, so one learning rate fits them all. The gradient of a scale is read off the gradient of
its dense weights, which is freed as soon as it is there; no layer needs to know that it is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bittern import model as live
from bittern.calibration import dataset_title
from bittern.checkpoint import Checkpoint
from bittern.errors import BitternError
from bittern.evaluate import evaluate
from bittern.model import Matrix, Piece
from bittern.quantize.balance import norms_seen
from bittern.quantize.plan import Plan
from bittern.sampling import Sampled
from bittern.training.state import read_story, read_tensor
from bittern.training.text import Windows, find_windows, read_windows, write_windows
from bittern.training.train import Diverged, Run, Training, train
from bittern.weight import QuantWeight, naming, round_scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bittern.quantize.resume import WorkFolder

LRS = {2: 6e-3, 3: 2e-3, 4: 7e-4, 8: 1e-5}
"""Of the factors of scales and norms, by bits: a third for each more, there is less to make up for (docs/log.md)."""

BATCH, MICRO = 1024, 1024
"""Tokens in a step and in one forward pass, about."""

SHORTLIST = 4096
"""Words whose logits a step computes, and at most as many more as it has tokens."""

HELD_OUT = 8
"""Windows that are kept to measure on."""

_STATE = "tuned.safetensors"


class _Scaled:
    """Rows of a quantized matrix in training.

    Args:
        matrix: where they are.
        rows: of the matrix.
        weight: as it was solved.
    """

    def __init__(self, matrix: Matrix, rows: slice, weight: QuantWeight, device: torch.device) -> None:
        groups = weight.scales.shape[1]
        steps = weight.codes.view(len(weight.codes), groups, -1).short() - weight.zeros.unsqueeze(2)
        self.matrix, self.rows, self.bits = matrix, rows, weight.spec.bits
        self.steps = (steps if weight.spec.bits == 8 else steps.to(torch.int8)).to(device)
        self.scales = weight.scales.float().to(device)
        self.factor = nn.Parameter(torch.zeros_like(self.scales))

    def write(self, parameter: Tensor) -> None:
        """Put the weights that the factor gives into their parameter."""
        values = self.steps * (self.scales * (1 + self.factor)).unsqueeze(2)
        self.matrix.view(parameter)[self.rows].copy_(values.flatten(1))

    def read(self, gradient: Tensor) -> None:
        """Add to the factor's gradient what that of the weights says."""
        dense = self.matrix.view(gradient)[self.rows].reshape(self.steps.shape)
        _add_gradient(self.factor, (dense * self.steps).sum(2).mul_(self.scales))

    def settle(self) -> None:
        """Take the scales as they will be stored for its own; the factor is nothing from now on."""
        self.scales = round_scale(self.scales * (1 + self.factor))
        self.factor.zero_()


class _Norm:
    """The weight of a norm in training, which will be stored in ``dtype``."""

    def __init__(self, weight: Tensor, added: float, dtype: torch.dtype) -> None:
        self.weight, self.added, self.dtype = weight.detach().to(dtype).to(weight.dtype, copy=True), added, dtype
        self.factor = nn.Parameter(torch.zeros_like(self.weight))

    def write(self, parameter: Tensor) -> None:
        """As of :class:`_Scaled`."""
        parameter.copy_(_scaled_norm(self.weight, self.added, self.factor))

    def read(self, gradient: Tensor) -> None:
        """As of :class:`_Scaled`."""
        _add_gradient(self.factor, gradient * (self.weight + self.added))

    def settle(self) -> None:
        """As of :class:`_Scaled`."""
        self.weight = _scaled_norm(self.weight, self.added, self.factor).to(self.dtype).to(self.weight.dtype)
        self.factor.zero_()


def _scaled_norm(weight: Tensor, added: float, factor: Tensor) -> Tensor:
    return weight + (weight + added) * factor


def _add_gradient(factor: nn.Parameter, found: Tensor) -> None:
    factor.grad = found if factor.grad is None else factor.grad.add_(found)


@dataclass(frozen=True)
class Tuned:
    """What came of it.

    Attributes:
        record: for the manifest.
        seconds: that earlier processes have trained, of a run that went on.
        path: of the trained factors; None where everything stays as it was solved.
        norms: checkpoint names of the norms that were trained, with what they add to their weight; none without a path.
    """

    record: dict[str, Any]
    seconds: float
    path: Path | None
    norms: Mapping[str, float]

    @property
    def notes(self) -> list[str]:
        """What a user must be told."""
        why = self.record["refused"]
        return [f"training of scales and norms: nothing taken: {why}"] if why else []

    def layer(self, name: str, weight: QuantWeight) -> QuantWeight:
        """A layer with its trained scales."""
        if self.path is None:
            return weight
        scales = weight.scales.float() * (1 + read_tensor(self.path, name))
        with naming(name):
            return replace(weight, scales=round_scale(scales).to(weight.scales.dtype))

    def norm(self, name: str, weight: Tensor) -> Tensor:
        """The weight of one of :attr:`norms`, trained; fp32."""
        assert self.path is not None
        return _scaled_norm(weight.float(), self.norms[name], read_tensor(self.path, name))


def tune(
    checkpoint: Checkpoint,
    sources: dict[str, tuple[Piece, ...]],
    plan: Plan,
    work: WorkFolder,
    *,
    tokens: int,
    seqlen: int,
    seed: int,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Tuned:
    """Train the scales of the blocks in a work folder, and the model's norms.

    Text that training has not seen decides whether what was trained is taken, rounded as it will be stored. A run that
    was killed goes on from its last evaluation.

    Args:
        checkpoint: the full-precision model; it and the quantized one are in memory whole.
        sources: of :func:`bittern.model.weight_map`.
        plan: what was quantized.
        work: holds all blocks, and the windows of :func:`write_text`.
        tokens: to train on.
        seqlen: of a window.
        seed: of the order of the windows.
        dtypes: in which what is not quantized will be stored, by checkpoint name.
        device: where to train.
        on_progress: called with each point of the curve.
    """
    batch, steps = _shape(tokens, seqlen)
    text = read_windows(_text_path(work, batch * steps), seed)
    held_out, windows = _split(text)
    teacher = live.load_dense(checkpoint, device=device)
    student = live.build(checkpoint.config)
    added = _added_to_norms(teacher, held_out[:1, :8].to(device))
    pieces = _pieces(teacher, student, sources, plan, work, added, dtypes, device)
    factors = {name: piece.factor for found in pieces.values() for name, piece in found.items()}
    _follow(student, pieces)
    path = work.folder / _STATE
    story: dict[str, Any] = {"step": 0, "curve": [], "perplexity": {}, "steps": steps, "windows": text.sha256}
    kept = read_story(path) if path.exists() else {}
    if (kept.get("steps"), kept.get("windows")) == (steps, text.sha256):
        story = kept
    else:
        path.unlink(missing_ok=True)
    run = Run(student, teacher, factors, windows, 0, held_out, path, story)
    lr = LRS[plan.commonest.bits]
    micro = max(1, min(batch, MICRO // seqlen))
    every = max(1, -(-steps // 4))
    rates = {  # of an average of bits they differ
        name: LRS[piece.bits] / lr
        for found in pieces.values()
        for name, piece in found.items()
        if isinstance(piece, _Scaled)
    }
    options = Training(steps, lr, batch, micro, kl_weight=1.0, eval_every=every, shortlist=SHORTLIST, rates=rates)
    record: dict[str, Any] = {
        "tokens": steps * batch * seqlen,
        "steps": steps,
        "held_out_tokens": held_out[:, 1:].numel(),
    }
    earlier = float(story.get("seconds", 0))
    if not story["step"]:
        solved = evaluate(student, held_out, batch_size=1, against=teacher)
        story |= {"perplexity": {"converted": solved.perplexity}, "kl": solved.kl}
    why: str | None = None
    try:
        train(run, options, on_progress)  # of a run that was trained to the end already, the state is loaded
        _settle(pieces)
    except Diverged as error:
        why = str(error)
        record |= {"tokens": error.step * batch * seqlen, "steps": error.step}
    except BitternError as error:  # a scale that fp16 does not hold
        why = str(error)
    tuned = evaluate(student, held_out, batch_size=1, against=teacher) if why is None else None
    before, after = float(story["kl"]), None if tuned is None else float(tuned.kl or 0.0)
    if after is not None and not after < before:
        why = f"KL to full precision on held-out text was {before:.4g} before it and {after:.4g} after it"
    record |= {
        "perplexity": {"solved": story["perplexity"]["converted"], "tuned": tuned.perplexity if tuned else None},
        "kl": {"solved": before, "tuned": after},
        "curve": story["curve"],
        "refused": why,
    }
    if why is not None:
        return Tuned(record, earlier, None, {})
    norms = {n: piece.added for found in pieces.values() for n, piece in found.items() if isinstance(piece, _Norm)}
    return Tuned(record, earlier, path, norms)


def trained(work: WorkFolder) -> float:
    """The share of its steps that the training in a work folder has behind it."""
    path = work.folder / _STATE
    story = read_story(path) if path.exists() else {}
    return float(story.get("step", 0) / story.get("steps", 1))


def write_text(
    checkpoint: Checkpoint,
    work: WorkFolder,
    dataset: str | Sequence[str],
    chat_template: bool,
    device: torch.device,
    on_sampled: Sampled | None,
    *,
    tokens: int,
    seqlen: int,
    seed: int,
    vocab_size: int,
) -> list[str]:
    """The windows that :func:`tune` reads, into the work folder: before hours are spent on what it trains.

    Args:
        checkpoint, work, tokens, seqlen: as of :func:`tune`.
        dataset, chat_template, on_sampled, vocab_size: see :func:`bittern.calibration.load_tokens`.
        device: where the model writes.
        seed: of text that it writes.

    Returns:
        What a user should know of it.

    Raises:
        BitternError: when the text has no two windows.
    """
    batch, steps = _shape(tokens, seqlen)
    path, wanted = _text_path(work, batch * steps), batch * steps + HELD_OUT
    if find_windows(path, seed) is None:
        write_windows(
            path,
            dataset,
            checkpoint.tokenizer(),
            seqlen=seqlen,
            count=wanted,
            vocab_size=vocab_size,
            model=lambda: live.load_dense(checkpoint, device=device),
            seed=seed,
            chat_template=chat_template,
            on_sampled=on_sampled,
        )
    found, named = len(read_windows(path, seed).ids), dataset_title(dataset)
    if found < 2:
        path.unlink()
        raise BitternError(f"{named}: expected two windows of {seqlen} tokens at least to train on, found {found}")
    if found < wanted:
        return [
            f"{named}: {wanted} windows of {seqlen} tokens to train on and to measure asked for,"
            f" {found} found, which are shown more than once"
        ]
    return []


def _shape(tokens: int, seqlen: int) -> tuple[int, int]:
    """Windows in a step, and steps."""
    batch = max(1, BATCH // seqlen)
    return batch, max(1, tokens // (batch * seqlen))


def _text_path(work: WorkFolder, count: int) -> Path:
    return work.folder / f"windows-{count}.safetensors"


def _split(windows: Windows) -> tuple[Tensor, Windows]:
    """Windows to measure on, spread over the text, and those to train on."""
    found = len(windows.ids)
    spread = max(2, found // HELD_OUT)
    held = list(range(spread // 2, found, spread))
    others = sorted(set(range(found)) - set(held))
    return torch.from_numpy(windows.ids[held]).long(), Windows(windows.ids[others], windows.seed)


def _added_to_norms(model: PreTrainedModel, ids: Tensor) -> dict[str, float]:
    """What norms add to their weights, by the names of these; of those that a few tokens come by."""
    names = [name.removesuffix(".weight") for name in model.state_dict() if _is_norm(model, name)]
    with norms_seen(model, names) as seen, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return {f"{name}.weight": added for name, (_, added) in seen.items()}


def _is_norm(model: PreTrainedModel, name: str) -> bool:
    """Whether a parameter is the weight of a norm."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and "norm" in type(model.get_submodule(owner)).__name__.lower()


def _pieces(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sources: dict[str, tuple[Piece, ...]],
    plan: Plan,
    work: WorkFolder,
    added: Mapping[str, float],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> dict[str, dict[str, _Scaled | _Norm]]:
    """Fill the student; by its parameter, what is trained in it, by layer or by the norm's name in the checkpoint.

    What is not trained is the teacher's own, in the same memory.
    """
    pieces: dict[str, dict[str, _Scaled | _Norm]] = {}
    for position, block in enumerate(plan.blocks):
        solved = {record["layer"]: weight for record, weight in work.load(position)}
        for matrix, _ in block:
            found = pieces.setdefault(matrix.parameter, {})
            for name, start, stop in matrix.parts:
                found[name] = _Scaled(matrix, slice(start, stop), solved[name], device)
    own = teacher.state_dict()
    for position in range(len(plan.blocks)):
        own |= {name: values.to(device) for name, values in work.changed(position).items()}
    for name in sources:
        if _is_norm(student, name) and len(sources[name]) == 1:
            stored = sources[name][0].name
            pieces[name] = {stored: _Norm(own[name], added.get(name, 0.0), dtypes[stored])}
        live.set_tensor(student, name, torch.empty_like(own[name]) if name in pieces else own[name])
    student.tie_weights()
    live.move_buffers(student, device)
    return pieces


@torch.no_grad()
def _settle(pieces: dict[str, dict[str, _Scaled | _Norm]]) -> None:
    for found in pieces.values():
        for name, piece in found.items():
            with naming(name):
                piece.settle()


def _follow(student: PreTrainedModel, pieces: dict[str, dict[str, _Scaled | _Norm]]) -> None:
    """Have the dense parameters follow their factors, and the factors' gradients those of the parameters."""
    parameters = {name: student.get_parameter(name) for name in pieces}
    factors = [piece.factor for found in pieces.values() for piece in found.values()]
    written = -1

    def write(*_: Any) -> None:
        nonlocal written
        version = sum(factor._version for factor in factors)
        if version == written:
            return
        written = version
        with torch.no_grad():
            for name, found in pieces.items():
                for piece in found.values():
                    piece.write(parameters[name])

    def reader(found: dict[str, _Scaled | _Norm]) -> Callable[[Tensor], None]:
        def read(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for piece in found.values():
                piece.read(parameter.grad)
            parameter.grad = None

        return read

    for name, found in pieces.items():
        parameters[name].requires_grad_(True)
        parameters[name].register_post_accumulate_grad_hook(reader(found))  # type: ignore[no-untyped-call]
    student.register_forward_pre_hook(write)
