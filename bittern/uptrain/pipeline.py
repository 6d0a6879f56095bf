"""The whole job: a checkpoint in, the same architecture with fewer key-value heads out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from bittern import model as live
from bittern.calibration import SEQLEN, check_files, dataset_title, tokens_hash
from bittern.checkpoint import Checkpoint, open_checkpoint
from bittern.convert.cast import DTYPES, refuse_quantized
from bittern.errors import BitternError
from bittern.evaluate import check_fit, evaluate, text_windows
from bittern.formats.packing import check_name
from bittern.processes import together, world
from bittern.quantize.pipeline import DEFAULT_DATASET
from bittern.runtime import attention
from bittern.sampling import Sampled
from bittern.ties import refuse_untied
from bittern.tokenizer import wants_bos, window_length
from bittern.training.state import load_state, read_story, save_state
from bittern.training.text import HELD_OUT, Windows, find_windows, kept_apart, read_windows, write_windows
from bittern.training.train import Diverged, Run, Training, shard
from bittern.training.train import train as run_training
from bittern.uptrain.heads import Counts, attention_prefixes
from bittern.uptrain.output import check_dtype, make_manifest, write_output
from bittern.uptrain.regroup import Recipe, regroup
from bittern.uptrain.resume import STATE, WINDOWS, check_resumable, settings_of, training_folder
from bittern.uptrain.student import head_counts, make_student, trained_parameters
from bittern.writer import MAX_SHARD_SIZE, check_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[dict[str, Any]], None]


_LR, _LR_POOLED = 5e-5, 3e-4  # docs/log.md has what others gave


def uptrain(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    kv_heads: int,
    group: str | None = None,
    init: str = "aligned",
    passes: int | None = None,
    dataset: str | Sequence[str] = DEFAULT_DATASET,
    nsamples: int = 128,
    seqlen: int | None = None,
    tokens: int = 0,
    sampled: int = 0,
    text: str | os.PathLike[str] | None = None,
    train: str = "blocks",
    lr: float | None = None,
    batch_size: int = 8,
    micro_batch: int = 4,
    kl_weight: float = 0.9,
    hidden_weight: float = 10.0,
    weight_decay: float = 0.0,
    shortlist: int = 4096,
    eval_every: int | None = None,
    recompute: bool = False,
    dtype: str | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = True,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    revision: str | None = None,
    on_block: Report | None = None,
    on_progress: Report | None = None,
    on_sampled: Sampled | None = None,
) -> dict[str, Any] | None:
    """Turn multi-head or grouped-query attention into one with fewer key-value heads, and train the model back.

    Under torchrun, each process runs this; the first one converts and writes.

    Args:
        source: a folder, a GGUF file or a Hub id.
        output: the folder to write; it appears when it is whole.
        kv_heads: num_key_value_heads of the result, a divisor of the source's; 1 is multi-query attention.
        group: heads that share are ``similar`` or each other's ``neighbour``; by default similar, and neighbours where
            ``init`` only pools.
        init: ``aligned`` (merged in closed form, see :mod:`bittern.uptrain.merge`), ``mean`` or ``first``.
        passes: of layer-wise distillation over the calibration windows that do not judge it; by default 12, and 0 where
            ``init`` only pools.
        dataset: text to calibrate and train on, see :func:`bittern.calibration.load_tokens`.
        nsamples, seqlen: calibration windows, and tokens in every window: by default 512, or a shorter context.
        tokens: to train on, end to end; 0 only converts. Text that is shorter is shown again, in another order.
        sampled: of these, tokens of windows that the source writes on from beginnings of the dataset's.
        text: a file to measure perplexity on; without it, windows of the dataset that are not trained on.
        train: ``blocks``, ``all`` or ``attention``: the parameters to train.
        lr: the largest; by default 5e-5, and 3e-4 where ``init`` only pools: that starts farther away.
        batch_size, micro_batch, kl_weight, hidden_weight, weight_decay, shortlist, eval_every, recompute: see
            :class:`bittern.training.train.Training`.
        dtype: ``bf16``, ``fp16`` or ``fp32`` of the result; by default each tensor keeps its own.
        device: ``cpu``, ``cuda`` or ``auto``.
        seed: of the calibration windows and the order of training.
        resume: go on where a killed run with the same options stopped; otherwise start over.
        max_shard_size: bytes.
        overwrite: replace a checkpoint at ``output``.
        revision: of a Hub id.
        on_block: called with the record of each block, with ``index`` and ``total``.
        on_progress: called with each point of the curve.
        on_sampled: called with the windows that the source has written and their number.

    Returns:
        The manifest, which the output also holds; None in all processes of torchrun but the first.

    Raises:
        BitternError: for anything that a user can mend; before any work wherever it can be known.
    """
    given = {
        key: value for key, value in locals().items() if key not in ("source", "output") and not key.startswith("on_")
    }
    started = time.monotonic()
    if lr is None:
        given["lr"] = _LR if init == "aligned" else _LR_POOLED
    recipe = _recipe(init, group, passes, seed)
    _check_training(given)
    check_name(output, "safetensors")
    check_files(dataset)
    with together(device) as place, open_checkpoint(source, revision, headers_only=True) as checkpoint:
        rank = world()[0]
        refuse_quantized(checkpoint)
        check_output(Path(output), checkpoint.path, overwrite)
        model = live.build(checkpoint.config)
        counts = head_counts(model, kv_heads)
        given["seqlen"], shorter = window_length(model.config, seqlen, SEQLEN)
        options = _training(given)
        held_out = _held_out(text, checkpoint, model, given["seqlen"])
        checkpoint.fetch()
        refuse_untied(checkpoint)
        with training_folder(Path(output), rank) as folder:
            settings = settings_of(given, checkpoint, held_out, place)
            state = folder / STATE
            spent = float(read_story(state).get("seconds", 0)) if rank == 0 and resume and state.exists() else 0.0
            run = _prepare(
                folder,
                checkpoint,
                counts,
                kv_heads,
                recipe,
                options,
                given,
                settings,
                held_out,
                place,
                rank,
                on_block,
                on_sampled,
            )
            if options.steps > run.story["step"]:
                _train(run, options, on_progress if rank == 0 else None)
            if rank:
                return None
            manifest = make_manifest(run.story, checkpoint, counts, kv_heads, given, spent + time.monotonic() - started)
            manifest["notes"][:0] = shorter
            write_output(state, checkpoint, run, Path(output), manifest, dtype, max_shard_size, overwrite)
            state.unlink()  # nothing to go on from: the folder goes
    return manifest


def _recipe(init: str, group: str | None, passes: int | None, seed: int) -> Recipe:
    if init not in ("aligned", "mean", "first"):
        raise BitternError(f"init: expected aligned, mean or first, found {init!r}")
    if group not in (None, "similar", "neighbour"):
        raise BitternError(f"group: expected similar or neighbour, found {group!r}")
    if passes is not None and passes < 0:
        raise BitternError(f"passes: expected at least 0, found {passes}")
    plain = Recipe(init=init, seed=seed)
    pooled = init != "aligned"
    return Recipe(
        init,
        group or ("neighbour" if pooled else plain.group),
        (0 if pooled else plain.passes) if passes is None else passes,
        plain.lr,
        seed,
    )


def _check_training(given: dict[str, Any]) -> None:
    """Refuse what no training can be done with."""
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    for name, least in (
        ("tokens", 0),
        ("sampled", 0),
        ("batch_size", 1),
        ("micro_batch", 1),
        ("nsamples", 1),
        ("seqlen", 2),
        ("shortlist", 0),
    ):
        if given[name] is not None and given[name] < least:
            raise BitternError(f"{name}: expected at least {least}, found {given[name]}")
    if given["train"] not in ("blocks", "all", "attention"):
        raise BitternError(f"train: expected blocks, all or attention, found {given['train']!r}")
    if not 0 <= given["kl_weight"] <= 1 or not 0 < given["lr"] < math.inf:
        raise BitternError(
            f"kl_weight, lr: expected a share and more than 0, found {given['kl_weight']}, {given['lr']}"
        )
    for name in ("hidden_weight", "weight_decay"):
        if not 0 <= given[name] < math.inf:
            raise BitternError(f"{name}: expected a number of at least 0, found {given[name]}")
    if given["sampled"] > given["tokens"]:
        raise BitternError(
            f"sampled: expected at most {given['tokens']}, the tokens to train on, found {given['sampled']}"
        )
    if given["dtype"] is not None and given["dtype"] not in DTYPES:
        raise BitternError(f"dtype: expected bf16, fp16 or fp32, found {given['dtype']!r}")
    if given["batch_size"] % processes:
        raise BitternError(f"batch_size: expected a multiple of the {processes} processes, found {given['batch_size']}")


def _training(given: dict[str, Any]) -> Training:
    """The training options."""
    steps = -(-given["tokens"] // (given["batch_size"] * given["seqlen"]))
    every = given["eval_every"] or max(1, -(-steps // 10))
    return Training(
        steps,
        given["lr"],
        given["batch_size"],
        given["micro_batch"],
        given["kl_weight"],
        given["hidden_weight"],
        given["train"],
        every,
        weight_decay=given["weight_decay"],
        shortlist=given["shortlist"],
        recompute=given["recompute"],
    )


def _prepare(
    folder: Path,
    checkpoint: Checkpoint,
    counts: Counts,
    kv_heads: int,
    recipe: Recipe,
    options: Training,
    given: dict[str, Any],
    settings: dict[str, Any],
    text: Tensor | None,
    place: torch.device,
    rank: int,
    on_block: Report | None,
    on_sampled: Sampled | None,
) -> Run:
    """Windows and a converted student, from the state of an earlier run or made now by the first process."""
    began = time.monotonic()
    state = folder / STATE
    if rank == 0 and state.exists():
        check_resumable(state, settings, given["resume"])
    teacher = live.load_dense(checkpoint, device=place)
    student = make_student(teacher, checkpoint.config, kv_heads)
    for model in (teacher, student):
        attention.use(model)
    parameters = trained_parameters(student, options.trained if options.steps else "attention")
    write = partial(_write_text, folder, checkpoint, teacher, given, text, on_sampled)
    if rank == 0 and given["dtype"] is not None:
        check_dtype(checkpoint, teacher, set(parameters), given["dtype"])
    if rank == 0 and not state.exists():
        story = _convert(write, teacher, student, counts, recipe, given, text, on_block)
        # Frozen parameters are the teacher's own tensors; what is trained gets memory of its own.
        story |= {"settings": settings, "step": 0, "curve": [], "seconds": time.monotonic() - began}
        save_state(state, parameters, None, story)
    elif rank == 0:
        _renew_windows(folder, given["seed"], write)
    if world()[1] > 1:
        dist.barrier()
    windows, held_out = _split(read_windows(folder / WINDOWS, given["seed"]), text, given)
    for name, parameter in parameters.items():
        live.set_tensor(student, name, parameter.detach().clone())
    student.tie_weights()
    parameters = trained_parameters(student, options.trained if options.steps else "attention")
    load_state(state, parameters)
    return Run(student, teacher, parameters, windows, given["nsamples"], held_out, state, read_story(state))


def _convert(
    write: Callable[[], Windows],
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    counts: Counts,
    recipe: Recipe,
    given: dict[str, Any],
    text: Tensor | None,
    on_block: Report | None,
) -> dict[str, Any]:
    """Read the text, regroup the student's heads; what is to be known of both."""
    named, seqlen, wanted = dataset_title(given["dataset"]), given["seqlen"], _wanted(given)
    written = write()
    windows, held_out = _split(written, text, given)
    calibration = windows.take(0, min(given["nsamples"], len(windows.ids)))
    notes = []
    if len(windows.ids) < wanted:
        notes.append(
            f"{named}: {wanted} windows of {seqlen} tokens asked for, {len(windows.ids)} found"
            + (", which are shown more than once" if given["tokens"] else "")
        )
    if recipe.passes and len(calibration) == 1:
        why = "what they learn is judged by other calibration windows, and there is one"
        notes.append(f"passes: {recipe.passes} asked for, none done: {why}")
    before = evaluate(teacher, held_out).perplexity
    began = time.monotonic()
    records: list[dict[str, Any]] = []
    total = sum(1 for _ in attention_prefixes(teacher))
    batches = list(torch.split(calibration, _BATCH))
    for record in regroup(teacher, student, batches, recipe, counts):
        if on_block is not None:
            on_block({**record, "index": len(records), "total": total})
        records.append(record)
    return {
        "notes": notes,
        "conversion_seconds": time.monotonic() - began,
        "blocks": records,
        "calibration": {
            "source": named,
            "tokens_asked": given["nsamples"] * seqlen,
            "tokens_found": calibration.numel(),
            "sha256": tokens_hash(calibration),
        },
        "windows": written.sha256,
        "perplexity": {
            "text": Path(given["text"]).name if given["text"] is not None else f"held out of {named}",
            "tokens": held_out.shape[0] * (held_out.shape[1] - 1),
            "source": before,
            "converted": evaluate(student, held_out).perplexity,
        },
    }


_BATCH = 8  # calibration windows at a time


def _wanted(given: dict[str, Any]) -> int:
    """Windows to calibrate and to train on."""
    return int(given["nsamples"]) + -(-int(given["tokens"]) // int(given["seqlen"]))


def _write_text(
    folder: Path,
    checkpoint: Checkpoint,
    teacher: PreTrainedModel,
    given: dict[str, Any],
    text: Tensor | None,
    on_sampled: Sampled | None,
) -> Windows:
    """The windows of a run, written into its folder."""
    write_windows(
        folder / WINDOWS,
        given["dataset"],
        checkpoint.tokenizer(),
        seqlen=given["seqlen"],
        count=_wanted(given) + (HELD_OUT if text is None else 0),
        vocab_size=teacher.config.get_text_config(decoder=True).vocab_size,
        sampled=-(-given["sampled"] // given["seqlen"]),
        model=teacher,
        seed=given["seed"],
        on_sampled=on_sampled,
    )
    return read_windows(folder / WINDOWS, given["seed"])


def _renew_windows(folder: Path, seed: int, write: Callable[[], Windows]) -> None:
    """Write windows again that are not those of the state.

    Raises:
        BitternError: when the dataset gives others by now.
    """
    path, expected = folder / WINDOWS, read_story(folder / STATE)["windows"]
    found = find_windows(path, seed) or write()
    if found.sha256 != expected:
        raise BitternError(
            f"{path}: expected the windows that this run began with, found others; --no-resume starts over"
        )


def _held_out(
    text: str | os.PathLike[str] | None, checkpoint: Checkpoint, model: PreTrainedModel, seqlen: int
) -> Tensor | None:
    """Windows of the text that a user names to measure on, int64 (windows, seqlen); with BOS for Gemma."""
    if text is None:
        return None
    tokenizer = checkpoint.tokenizer()
    bos = wants_bos(model.config, tokenizer)
    windows = text_windows(text, tokenizer, seqlen=seqlen, windows=2 * HELD_OUT, bos=bos)
    check_fit(model, tokenizer, windows)
    return windows


def _split(windows: Windows, text: Tensor | None, given: dict[str, Any]) -> tuple[Windows, Tensor]:
    """The windows to train on, and those to measure on: of another text, or spread evenly over the dataset's."""
    if text is not None:
        return windows, text
    count = len(windows.ids) - -(-given["sampled"] // given["seqlen"])  # what goes on with the dataset comes last
    if count < 2:
        named = dataset_title(given["dataset"])
        raise BitternError(f"{named}: expected two windows of {given['seqlen']} tokens at least, found {count}")
    held = kept_apart(count)
    others = sorted(set(range(len(windows.ids))) - set(held))
    own = int(windows.is_own(torch.tensor(others)).sum())
    return Windows(windows.ids[others], windows.seed, own), torch.from_numpy(windows.ids[held]).long()


def _train(run: Run, options: Training, on_progress: Report | None) -> None:
    if world()[1] > 1:
        shard(run.teacher)
        shard(run.student)
        run.parameters = trained_parameters(run.student, options.trained)
    try:
        run_training(run, options, on_progress)
    except Diverged as error:
        message = f"{error}; a smaller --lr than {options.lr:g} may help, with --no-resume"
        raise Diverged(message, error.step) from error
