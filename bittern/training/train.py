"""Train a regrouped model back on the logits of the model that it was made of.

One process, or several under torchrun: then torch's FSDP shards student, teacher and optimizer over them, and each
takes its part of every batch. What a step sees depends on its number and the seed alone, so a run that was killed goes
on from its last state to the same bytes.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from bittern import model as live
from bittern import replay
from bittern.errors import BitternError
from bittern.evaluate import evaluate
from bittern.processes import add_up, world
from bittern.training.loss import distillation_loss, hidden_error
from bittern.training.shortlist import commonest, make_shortlist, only, vocabulary_size
from bittern.training.state import load_state, save_state
from bittern.training.text import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIVERGED = 2.0
"""A run ends when its perplexity is this many times that before training."""

_BETAS = (0.9, 0.95)
_WARMUP = 0.1  # of the steps
_LEAST_LR = 0.02  # of the largest


class Diverged(BitternError):
    """The loss is not a number, or perplexity grows beyond :data:`DIVERGED`; ``step`` says after how many steps."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Training:
    """How a student is trained.

    Attributes:
        steps: of the optimizer.
        lr: the largest learning rate, after the warm-up; a cosine takes it down from there.
        rates: of parameters that learn faster or slower, by name: what theirs is times that.
        batch_size: windows in a step, over all processes.
        micro_batch: windows that one process computes at once; gradients accumulate over these.
        kl_weight: share of the KL to the teacher in the loss; the rest is next-token loss. Of text that the teacher has
            written itself all is KL: next tokens are drawn from what that knows already, and would add noise.
        hidden_weight: of the error of hidden states (:func:`bittern.training.loss.hidden_error`), added to both.
        trained: "blocks", "all" (embeddings, last norm and head too) or "attention".
        eval_every: steps between evaluations; the state is written then.
        clip: largest norm of the gradient.
        weight_decay: of AdamW, on matrices.
        shortlist: words whose logits a step computes (:mod:`bittern.training.shortlist`), 0 for all: where the
            vocabulary is large and the model small, the output head is most of the work.
        recompute: activation checkpointing: each block is computed again for its gradient.
    """

    steps: int
    lr: float
    batch_size: int = 4
    micro_batch: int = 4
    kl_weight: float = 0.9
    hidden_weight: float = 0.0
    trained: str = "blocks"
    eval_every: int = 50
    clip: float = 1.0
    weight_decay: float = 0.0
    shortlist: int = 0
    recompute: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """A student in training.

    Attributes:
        student, teacher: whole, or sharded by :func:`shard`.
        parameters: those of the student that are trained, by name.
        windows: to train on.
        first: the window that training begins with: those before it the conversion has seen already.
        held_out: int64 (windows, seqlen), to evaluate on.
        path: of the state.
        story: what the state keeps besides tensors; ``step`` and ``curve`` are kept up here, the rest is the caller's.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    windows: Windows
    first: int
    held_out: Tensor
    path: Path
    story: dict[str, Any]


def shard(model: PreTrainedModel) -> None:
    """Shard a model's parameters over all processes, block by block."""
    for block in live.blocks(model)[1]:
        fully_shard(block)
    fully_shard(model)


def train(run: Run, options: Training, on_progress: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Train from the state's step to the last one; the student's parameters are what comes of it.

    ``run.story["curve"]`` gets a point per evaluation: step, tokens, lr, perplexity on the held-out windows; and as
    means since the last point the loss and its terms: kl, nll, and hidden where that has a weight. With each,
    ``run.story["seconds"]`` grows by what was spent.

    Args:
        run: see there; when ``story["step"]`` is not 0, the state is loaded first.
        options: how.
        on_progress: called with each point, with ``steps`` and ``seconds`` since this process began.

    Raises:
        Diverged: when the loss is not a number or perplexity grows to :data:`DIVERGED` times what it was.
    """
    story = run.story
    optimizer = torch.optim.AdamW(_groups(run.parameters, options), lr=options.lr, betas=_BETAS)
    if run.path.exists():
        load_state(run.path, run.parameters, optimizer)
    if options.recompute:
        for block in live.blocks(run.student)[1]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    began, first, spent = time.monotonic(), int(story["step"]), float(story.get("seconds", 0))
    sums = torch.zeros(4, dtype=torch.float64)
    seqlen = run.windows.ids.shape[1]
    words = vocabulary_size(run.student)
    common = commonest(run.windows.ids, words, options.shortlist) if 0 < options.shortlist < words else None
    for step in range(first, options.steps):
        lr = learning_rate(step, options)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        sums += _step(run, options, step, common)
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), options.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % options.eval_every and done != options.steps:
            continue
        since = done - (story["curve"][-1]["step"] if story["curve"] else 0)
        loss, kl, nll, hidden = (sums / since).tolist()
        sums.zero_()
        perplexity = held_out_perplexity(run) if math.isfinite(loss) else math.nan
        _check(loss, perplexity, run, done)
        point = {
            "step": done,
            "tokens": done * options.batch_size * seqlen,
            "loss": loss,
            "kl": kl,
            "nll": nll,
            **({"hidden": hidden} if options.hidden_weight else {}),
            "lr": lr,
            "perplexity": perplexity,
        }
        story["curve"].append(point)
        story |= {"step": done, "seconds": spent + time.monotonic() - began}
        save_state(run.path, run.parameters, optimizer, story, write=world()[0] == 0)
        if on_progress is not None:
            seconds = time.monotonic() - began
            left = seconds / (done - first) * (options.steps - done)
            on_progress({**point, "steps": options.steps, "seconds": seconds, "left": left})


def held_out_perplexity(run: Run) -> float:
    """Of the student on the held-out windows; NaN where its logits are."""
    try:
        return evaluate(run.student, run.held_out, batch_size=1).perplexity
    except BitternError:  # the windows were fine before the first step
        return math.nan


def learning_rate(step: int, options: Training) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    warmup = max(1, round(_WARMUP * options.steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    return options.lr * max(_LEAST_LR, cosine((step - warmup) / max(1, options.steps - warmup)))


def cosine(share: float) -> float:
    """A factor that falls from 1 to 0 while ``share`` of the way grows from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _step(run: Run, options: Training, step: int, common: Tensor | None = None) -> Tensor:
    """Gradients of one batch; loss, KL, nll and error of hidden states over all processes, fp64 (4,).

    ``common`` are the words that every shortlist holds; without them, logits of all words are computed.
    """
    rank, processes = world()
    start = run.first + step * options.batch_size
    rows = run.windows.order(start, start + options.batch_size)
    batch, own = run.windows.read(rows), run.windows.is_own(rows)
    windows = batch[rank::processes]
    device = next(iter(run.parameters.values())).device
    targets = windows[:, 1:].to(device)
    kl_weight = own[rank::processes, None].float().clamp_min(options.kl_weight).to(device).expand(targets.shape)
    known = targets.shape[1]  # of the last position nothing is
    kept = {}
    if "logits_to_keep" in inspect.signature(run.student.forward).parameters:  # others compute all, as xLSTM
        kept["logits_to_keep"] = torch.arange(known, device=device)
    words, offsets = None, None
    if common is not None:  # of the whole batch: however many processes there are, they learn from the same words
        seed = run.windows.seed + step
        chosen = make_shortlist(common, batch.to(device), vocabulary_size(run.student), options.shortlist, seed)
        words, offsets, targets = chosen.words, chosen.offsets, chosen.places[targets]
    sums = torch.zeros(4, dtype=torch.float64)
    pieces = [torch.split(each, options.micro_batch) for each in (windows, targets, kl_weight)]
    for ids, wanted, kl_share in zip(*pieces, strict=True):
        ids = ids.to(device)
        share = len(ids) / len(windows)
        call = {
            "input_ids": ids,
            "use_cache": False,
            **kept,
            "output_hidden_states": options.hidden_weight > 0,
        }
        with replay.sixteen_bits(device):  # weights and their updates stay fp32
            with torch.no_grad(), only(run.teacher, words):
                teacher = run.teacher(**call)
            with only(run.student, words):
                student = run.student(**call)
            logits = student.logits[:, :known].flatten(0, 1), teacher.logits[:, :known].flatten(0, 1)
            loss, kl, nll = distillation_loss(*logits, wanted.flatten(), kl_share.flatten(), offsets)
            hidden = loss.new_zeros(())
            if options.hidden_weight:  # the first are the embeddings
                hidden = hidden_error(student.hidden_states[1:], teacher.hidden_states[1:])
                loss = loss + options.hidden_weight * hidden
        (share * loss).backward()  # type: ignore[no-untyped-call]
        sums += share * torch.stack([loss, kl, nll, hidden]).detach().double().cpu()
        del teacher, student, logits, loss  # they hold logits that the next piece must not wait beside
    if processes > 1:
        total = sums.to(device)
        add_up(total)
        sums = total.cpu() / processes
    return sums


def _groups(parameters: dict[str, nn.Parameter], options: Training) -> list[dict[str, Any]]:
    """What the optimizer treats alike: norms and biases are not drawn to zero, and each rate is a group."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((parameter.ndim > 1, options.rates.get(name, 1.0)), []).append(parameter)
    return [
        {"params": members, "weight_decay": options.weight_decay if matrices else 0.0, "rate": rate}
        for (matrices, rate), members in groups.items()
    ]


def _check(loss: float, perplexity: float, run: Run, step: int) -> None:
    before = run.story["perplexity"]["converted"]
    if math.isfinite(loss) and perplexity <= DIVERGED * before:
        return
    raise Diverged(
        f"training diverged before step {step}: loss {loss:.4g}, perplexity {perplexity:.4g}, at first {before:.4g}",
        step,
    )
