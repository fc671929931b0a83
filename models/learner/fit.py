"""The one training loop that all methods share.

Shapes: B batch, b shard of a batch on one rank, W ranks.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.learner.base import Learner
from models.learner.groups import Group, Recipe, grouped, log_groups, optimizer_for
from models.learner.losses import Loss
from models.learner.phase import Phase, Stateful
from models.learner.table import Table
from utils.data.batches import Batches, TaskData
from utils.data.tasks import Task
from utils.process import interrupt, parallel, stopwatch
from utils.process.seeds import named_generator

Step = Callable[[Tensor, Tensor], Loss]  # images [B, 3, H, W] or features [B, ...], labels [B]
Data = TaskData | Table
COLUMNS = ("kind", "time", "task", "phase", "epoch", "epochs", "loss", "accuracy", "lr", "images", "seconds")


class Fitted(NamedTuple):
    """The loss of every step, and by name what every step asked to remember [B, ...]."""

    losses: list[float]
    remembered: dict[str, list[Tensor]]


def fit(
    learner: Learner,
    task: Task,
    step: Step,
    parameters: Sequence[nn.Parameter] | Sequence[Group],
    *,
    phase: str,
    epochs: int,
    lr: float | None = None,
    data: Data | Callable[[int], Data] | None = None,
    rows: Sequence[tuple[nn.Parameter, range]] = (),
    drop_last: bool = False,
    recipe: Recipe | None = None,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[], None] | None = None,
    stateful: Sequence[Stateful] = (),
) -> Fitted:
    """Trains `parameters` for `epochs` passes over the data.

    `parameters` are groups, or plain parameters that form one group with rate `lr`. `step(images, labels)` returns a Loss.
    `phase` names the training in the log and in checkpoints, and its random draws.
    `data`: None for the task's images; other TaskData, augmented and shuffled alike; a Table of features; or a function
    of the epoch that gives one of them, the same whenever it is called. `drop_last` leaves an incomplete last batch out.
    `rows`: pairs (parameter, its rows that learn); after each step all its other rows get their old values back, which
    momentum and weight decay would change. `recipe` replaces the settings' optimizer and schedule.
    `after_step` runs after each step, in all ranks alike; `after_epoch` after the epoch's row is logged. What both change
    beside parameters and buffers is handed over as `stateful`, so that it is saved.

    With several processes gradients, loss and counts are those of the whole batch; a loss that is no mean over samples is
    the mean of the shards'. One `epoch` row an epoch; then the phase is saved in the learner's journal, from which a resumed
    run continues. Raises ValueError before the optimizer steps if the loss or a gradient is not finite, TypeError if `step`
    returns no Loss, and Interrupted on SIGTERM and SIGINT, with the step done and saved.
    """
    groups = grouped(parameters, phase, lr)
    log_groups(learner, groups, task, phase)
    optimizer, scheduler = optimizer_for(learner, groups, learner.cfg, epochs=epochs, recipe=recipe)
    run = Phase(learner, optimizer, scheduler, groups, stateful)
    fixed = [(parameter, span, parameter.detach().clone()) for parameter, span in rows]
    trained = [group for group in groups if group.lr > 0]  # those the optimizer has, in its order
    journal, where = learner.journal, f"task {task.index + 1}, phase {phase}"
    if epochs and (saved := journal.recall(phase)) is not None:
        run.load_state_dict(saved)
    parallel.broadcast_rounding(run.moving(), f"before {where}")
    if run.epoch == epochs:
        return Fitted(run.history, run.remembered)
    with learner.log.bar(epochs, f"task {task.index + 1} {phase}", level=1, done=run.epoch) as bar, interrupt.defer():
        while run.epoch < epochs:
            if not run.step:
                run.begin_epoch()
            spent, start, passed = run.spent, time.perf_counter(), run.step
            shown = data(run.epoch) if callable(data) else task.train if data is None else data
            for batch in _after(passed, _batches(learner, task, shown, run.epoch, phase, drop_last)):
                stop = _take_step(learner, run, groups, trained, step, batch, where, fixed)
                if after_step is not None:
                    with stopwatch.section("backward"):
                        after_step()
                journal.check_folder()
                bar.within(run.count / max(len(shown), 1))
                if stop or (stop is None and interrupt.stop_requested()):
                    run.spent = spent + time.perf_counter() - start
                    at = f"{where}, epoch {run.epoch + 1}, step {run.step}"
                    journal.save(phase, run.state_dict, finished=False, where=at)
                    raise interrupt.Interrupted(at)
            for slot, full in zip(run.optimizer.param_groups, run.rates, strict=True):
                slot["lr"] = full  # the cosine goes on from here
            run.next_rates()
            run.spent = spent + time.perf_counter() - start
            texts = _log_epoch(learner, task, run, phase, epochs)
            run.history += run.losses
            learner.images_shown += run.count if not isinstance(shown, Table) or shown.are_images else 0
            run.epoch, run.step = run.epoch + 1, 0
            if after_epoch is not None:
                after_epoch()
            with stopwatch.section("checkpoint"):
                journal.save(phase, run.state_dict, finished=run.epoch == epochs, where=f"{where}, epoch {run.epoch}")
            bar.update(1, **texts)
            if interrupt.stop_requested():
                raise interrupt.Interrupted(f"{where}, epoch {run.epoch}")
    run.optimizer.zero_grad(set_to_none=True)  # nothing of this phase is left in the next one's measurements
    return Fitted(run.history, run.remembered)


def _take_step(
    learner: Learner,
    run: Phase,
    groups: Sequence[Group],
    trained: Sequence[Group],
    step: Step,
    batch: tuple[Any, Tensor, Tensor],
    where: str,
    fixed: Sequence[tuple[nn.Parameter, range, Tensor]],
) -> bool | None:
    """One step of the optimizer on this rank's shard of a batch; whether any rank was asked to stop, None if unknown."""
    images, labels, positions = batch
    size = len(positions) if parallel.world() > 1 else len(labels)
    at = f"{where}, epoch {run.epoch + 1}, step {run.step + 1}"
    with stopwatch.section("data"):
        images, labels = images.to(learner.device, non_blocking=True), labels.to(learner.device, non_blocking=True)
    with stopwatch.section("adapters", len(labels)):
        loss = _checked(step(images, labels), run, at)
    with stopwatch.section("backward", len(labels)):
        run.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        total, correct, terms, stop = _over_ranks(learner, trained, size, loss)
        value = _finite(total, trained, at, learner.journal.last)
        run.steps += 1
        for group in groups:
            group.before_step(run.steps)
        for slot, group, full in zip(run.optimizer.param_groups, trained, run.rates, strict=True):
            slot["lr"] = full * min(1.0, run.steps / group.warmup) if group.warmup else full
        run.optimizer.step()
        _put_back(fixed)
    for name, term in zip(loss.terms, terms, strict=True):
        run.terms.setdefault(name, []).append(term.detach())
    for name, rows in parallel.gather(dict(loss.remember), learner.shard_sizes).items():
        run.remembered.setdefault(name, []).append(rows.detach())
    run.losses.append(value)
    run.step += 1
    run.count += sum(learner.shard_sizes)
    if correct is not None:
        run.judged, run.right = True, run.right + float(correct)
    return stop


def _checked(loss: Any, run: Phase, where: str) -> Loss:
    """Raises TypeError or ValueError, in a sentence, for what no step may return."""
    if not isinstance(loss, Loss) or not isinstance(loss.total, Tensor) or loss.total.dim():
        kind = f"a Loss whose total is {type(loss.total).__name__}" if isinstance(loss, Loss) else type(loss).__name__
        raise TypeError(
            f"step returned {kind} at {where}: expected is Loss(total, correct, terms, remember) with a scalar tensor as "
            "total, as cross_entropy_among returns it"
        )
    if taken := [name for name in loss.terms if name in COLUMNS]:
        raise ValueError(f"the loss term '{taken[0]}' at {where} has the name of another column: call it otherwise")
    if run.losses and loss.terms.keys() != run.terms.keys():
        raise ValueError(
            f"step returned the loss terms {list(loss.terms)} at {where} and {list(run.terms)} before: expected are the "
            "same names at every step of a phase, with a zero where a term has no effect"
        )
    return loss


@torch.no_grad()
def _put_back(fixed: Sequence[tuple[nn.Parameter, range, Tensor]]) -> None:
    for parameter, learns, old in fixed:
        parameter[: learns.start] = old[: learns.start]
        parameter[learns.stop :] = old[learns.stop :]


def _over_ranks(
    learner: Learner, groups: Sequence[Group], size: int, loss: Loss
) -> tuple[Tensor, Tensor | None, list[Tensor], bool | None]:
    """Gradients, loss, how many are right and terms of the whole batch, of which this rank had `size` samples; and whether
    any rank was asked to stop. A single process has them already and is not asked here: None."""
    if parallel.world() == 1:
        learner.shard_sizes = (size,)
        return loss.total, loss.correct, list(loss.terms.values()), None
    parameters = [p for group in groups for p in group.parameters]
    right = [] if loss.correct is None else [loss.correct]
    means = [loss.total, *loss.terms.values()]
    totals = parallel.average(parameters, size, means, right, interrupt.stop_requested_here())
    learner.shard_sizes = totals.sizes
    return totals.means[0], totals.sums[0] if totals.sums else None, totals.means[1:], totals.flag


def _finite(loss: Tensor, groups: Sequence[Group], where: str, last: str | None) -> float:
    """The loss as a number. Raises ValueError if it or a gradient is not finite; on a GPU the one wait of a step."""
    gradients = [[p.grad for p in group.parameters if p.grad is not None] for group in groups]
    norms = [nn.utils.get_total_norm(grads) if grads else loss.detach().new_zeros(()) for grads in gradients]
    value, *sizes = torch.stack([loss.detach(), *norms]).tolist()
    bad = [group.name for group, size in zip(groups, sizes, strict=True) if not math.isfinite(size)]
    if math.isfinite(value) and not bad:
        return value
    what = f"the loss is {value}" if not math.isfinite(value) else f"the gradient of {', '.join(bad)} is not finite"
    raise ValueError(
        f"{what} at {where}; nothing was updated with it, and what was saved last is {last or 'the end of the task before'}. "
        f"Lower the learning rate ({', '.join(f'{g.lr:g}' for g in groups)}) or look at the input."
    )


def _batches(
    learner: Learner, task: Task, data: Data, epoch: int, phase: str, drop_last: bool
) -> Iterable[tuple[Any, Tensor, Tensor]]:
    """This rank's shard of every batch of an epoch: (images or features, labels, positions), no positions for padding."""
    size = learner.cfg.batch_size
    if isinstance(data, Table):
        order = data.order
        if order is None:
            generator = named_generator(task.train.source.seed, "order", task.index, phase, epoch)
            order = torch.randperm(len(data), generator=generator)
        return data.batches(order, data.batch_size or size)
    batches = learner._batches(data, size, epoch=epoch, draw=phase, shard=True)
    return itertools.islice(batches, len(data) // size) if drop_last else batches


def _after(count: int, batches: Iterable[Any]) -> Iterable[Any]:
    """The batches after the first `count`; a data set's batches are not even loaded."""
    return batches.after(count) if isinstance(batches, Batches) else itertools.islice(batches, count, None)


def _log_epoch(learner: Learner, task: Task, run: Phase, phase: str, epochs: int) -> dict[str, str]:
    """Writes the row of the epoch that ended; returns what the progress bar shows."""
    mean = sum(run.losses) / max(len(run.losses), 1)
    accuracy = run.right / max(run.count, 1) if run.judged else None
    learner.log.row(
        "epoch",
        task=task.index,
        phase=phase,
        epoch=run.epoch + 1,
        epochs=epochs,
        loss=mean,
        **{name: float(torch.stack(values).mean()) for name, values in run.terms.items()},
        accuracy=accuracy,
        lr=run.rates[0] if len(set(run.rates)) == 1 else run.rates,
        images=run.count,
        seconds=run.spent,
    )
    return {"loss": f"{mean:.4f}", **({"acc": f"{100 * accuracy:.1f}"} if accuracy is not None else {})}
