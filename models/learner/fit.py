"""The one training loop all methods share, and the parameter groups it takes: whose rates differ, and who steps when.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.learner.base import Learner
from models.learner.groups import Group, Recipe, optimizer_for
from models.learner.phase import Phase, Stateful
from utils.data.batches import Batches
from utils.data.tasks import Task
from utils.process import interrupt, parallel, stopwatch

# images, labels -> loss, how many are right, and where the loss has further terms its cross-entropy alone
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]]


def fit(
    learner: Learner,
    task: Task,
    step: Step,
    parameters: Iterable[nn.Parameter] | Sequence[Group],
    *,
    phase: str,
    epochs: int,
    lr: float | None = None,
    batches: Callable[[int], Iterable[Any]] | None = None,
    after_step: Callable[[], None] | None = None,
    after_epoch: Callable[[], None] | None = None,
    stateful: Sequence[Stateful] = (),
    recipe: Recipe | None = None,
    counts: bool = True,
) -> list[float]:
    """Trains `parameters` for `epochs` passes over the task and returns the loss of every step.

    `parameters` are groups, or plain parameters that form one group with rate `lr`.
    `step(images [B,3,H,W], labels [B])` returns the loss and, where there are scores to judge, how many of the batch are
    right (a scalar tensor); a third value, the loss without what regularises it, is told as the epoch's `task_loss`.
    `recipe` replaces the settings' optimizer and schedule. `counts` false: `batches` gives features, which do not count as
    training images shown.
    `batches(epoch)` replaces the task's own augmented, shuffled batches; called again for an epoch it must give the same.
    In a run of several processes it gives this one's `parts`; gradients, loss and how many are right are then those of the
    whole batch, a loss that is no mean over samples the mean of the parts'. `after_step` runs in all processes alike.
    Writes one `epoch` row per epoch, then calls `after_epoch`, then saves the phase in the learner's journal, from which a
    resumed run takes it up. What `step`, `after_step` and `after_epoch` change beside parameters and buffers must be told as
    `stateful`. Raises ValueError before the optimizer steps if the loss or a gradient is not finite, and Interrupted, with
    the step done and saved, on SIGTERM and SIGINT. All methods share this one loop.
    """
    run, source, groups = _begin(learner, task, parameters, phase, lr, epochs, batches, stateful, recipe)
    device = next(learner.backbone.vit.parameters()).device
    trained = [group for group in groups if group.lr > 0]  # those the optimizer has, in its order
    journal, where = learner.journal, f"task {task.index + 1}, phase {phase}"
    if epochs and (saved := journal.recall(phase)) is not None:
        run.load_state_dict(saved)
    parallel.broadcast_rounding(run.moving(), f"before {where}")
    if run.epoch == epochs:
        return run.history
    with learner.log.bar(epochs, f"task {task.index + 1} {phase}", level=1, done=run.epoch) as bar, interrupt.defer():
        while run.epoch < epochs:
            if not run.step:
                run.begin_epoch()
            earlier, start, passed = run.spent, time.perf_counter(), run.step
            for images, labels, *index in skipped(source(run.epoch), passed):
                own = len(index[0]) if index and parallel.world() > 1 else len(labels)
                with stopwatch.section("data"):
                    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                with stopwatch.section("adapters", len(labels)):
                    loss, correct, *parts = step(images, labels)
                with stopwatch.section("backward", len(labels)):
                    run.optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    loss, correct, parts, stop = _together(learner, trained, own, loss, correct, parts)
                    value = _finite(loss, trained, f"{where}, epoch {run.epoch + 1}, step {run.step + 1}", journal.last)
                    run.steps += 1
                    for group in groups:
                        group.before_step(run.steps)
                    for slot, group, full in zip(run.optimizer.param_groups, trained, run.rates, strict=True):
                        slot["lr"] = full * min(1.0, run.steps / group.warmup) if group.warmup else full
                    run.optimizer.step()
                    if after_step is not None:
                        after_step()
                run.task_losses += [part.detach() for part in parts]
                run.losses.append(value)
                run.step += 1
                run.count += sum(learner.part_sizes)
                if correct is not None:
                    run.judged, run.right = True, run.right + float(correct)
                if stop or (stop is None and interrupt.stop_requested()):
                    run.spent = earlier + time.perf_counter() - start
                    at = f"{where}, epoch {run.epoch + 1}, step {run.step}"
                    journal.save(phase, run.state_dict, finished=False, where=at)
                    raise interrupt.Interrupted(at)
            for slot, full in zip(run.optimizer.param_groups, run.rates, strict=True):
                slot["lr"] = full  # the cosine goes on from here
            run.next_rates()
            run.spent = earlier + time.perf_counter() - start
            told = _tell_epoch(learner, task, run, phase, epochs)
            run.history += run.losses
            learner.images_shown += run.count if counts else 0
            run.epoch, run.step = run.epoch + 1, 0
            if after_epoch is not None:
                after_epoch()
            with stopwatch.section("checkpoint"):
                journal.save(phase, run.state_dict, finished=run.epoch == epochs, where=f"{where}, epoch {run.epoch}")
            bar.update(1, **told)
            if interrupt.stop_requested():
                raise interrupt.Interrupted(f"{where}, epoch {run.epoch}")
    run.optimizer.zero_grad(set_to_none=True)  # nothing of this phase is left in the next one's measurements
    return run.history


def _together(
    learner: Learner, groups: Sequence[Group], own: int, loss: Tensor, correct: Tensor | None, parts: list[Tensor]
) -> tuple[Tensor, Tensor | None, list[Tensor], bool | None]:
    """Gradients, loss, how many are right and further losses of the whole batch, of which this process had `own` samples;
    and whether any process was asked to stop. One process has them already, and None is not asked yet."""
    if parallel.world() == 1:
        learner.part_sizes = (own,)
        return loss, correct, parts, None
    parameters = [p for group in groups for p in group.parameters]
    right = [] if correct is None else [correct]
    found = parallel.average(parameters, own, [loss, *parts], right, interrupt.stop_requested_here())
    learner.part_sizes = found.sizes
    return found.means[0], found.sums[0] if found.sums else None, found.means[1:], found.flag


def _begin(
    learner: Learner,
    task: Task,
    parameters: Iterable[nn.Parameter] | Sequence[Group],
    phase: str,
    lr: float | None,
    epochs: int,
    batches: Callable[[int], Iterable[Any]] | None,
    stateful: Sequence[Stateful],
    recipe: Recipe | None,
) -> tuple[Phase, Callable[[int], Iterable[Any]], list[Group]]:
    """The phase before its first step, its batches by epoch, and its groups."""
    cfg, groups = learner.cfg, _grouped(parameters, phase, lr)
    _tell(learner, groups, task, phase)
    optimizer, scheduler = optimizer_for(learner, groups, cfg, epochs=epochs, recipe=recipe)
    source = batches or (lambda epoch: learner.parts(task.train, cfg.batch_size, epoch=epoch, draw=phase))
    return Phase(learner, optimizer, scheduler, groups, stateful), source, groups


def _finite(loss: Tensor, groups: Sequence[Group], where: str, last: str | None) -> float:
    """The loss as a number. Raises ValueError if it or a gradient is not finite; on a GPU the one wait of a step."""
    gradients = [[p.grad for p in group.parameters if p.grad is not None] for group in groups]
    norms = [nn.utils.get_total_norm(own) if own else loss.detach().new_zeros(()) for own in gradients]
    value, *sizes = torch.stack([loss.detach(), *norms]).tolist()
    bad = [group.name for group, size in zip(groups, sizes, strict=True) if not math.isfinite(size)]
    if math.isfinite(value) and not bad:
        return value
    what = f"the loss is {value}" if not math.isfinite(value) else f"the gradient of {', '.join(bad)} is not finite"
    raise ValueError(
        f"{what} at {where}; nothing was updated with it, and what was saved last is {last or 'the end of the task before'}. "
        f"Lower the learning rate ({', '.join(f'{g.lr:g}' for g in groups)}) or look at the input."
    )


def skipped(batches: Iterable[Any], count: int) -> Iterable[Any]:
    """The batches after the first `count`, which a data set's own batches need not load."""
    return batches.after(count) if isinstance(batches, Batches) else itertools.islice(batches, count, None)


def _tell_epoch(learner: Learner, task: Task, run: Phase, phase: str, epochs: int) -> dict[str, str]:
    """Writes the row of the epoch that ended; returns what the bar shows."""
    mean = sum(run.losses) / max(len(run.losses), 1)
    accuracy = run.right / max(run.count, 1) if run.judged else None
    learner.log.row(
        "epoch",
        task=task.index,
        phase=phase,
        epoch=run.epoch + 1,
        epochs=epochs,
        loss=mean,
        **({"task_loss": float(torch.stack(run.task_losses).mean())} if run.task_losses else {}),
        accuracy=accuracy,
        lr=run.rates[0] if len(set(run.rates)) == 1 else run.rates,
        images=run.count,
        seconds=run.spent,
    )
    return {"loss": f"{mean:.4f}", **({"acc": f"{100 * accuracy:.1f}"} if accuracy is not None else {})}


def _grouped(parameters: Iterable[nn.Parameter] | Sequence[Group], phase: str, lr: float | None) -> list[Group]:
    chosen = list(parameters)
    if all(isinstance(item, Group) for item in chosen):
        return [g for g in chosen if isinstance(g, Group)]
    assert lr is not None, "plain parameters need a rate"
    return [Group(phase, [p for p in chosen if isinstance(p, nn.Parameter)], lr)]


def _tell(learner: Learner, groups: Sequence[Group], task: Task, phase: str) -> None:
    """Logs each group with its rate and size; the console hears of them in the first task."""
    if len(groups) < 2:
        return
    facts: list[dict[str, Any]] = [
        {"group": g.name, "lr": g.lr, "parameters": sum(p.numel() for p in g.parameters), "interval": g.interval}
        for g in groups
    ]
    learner.log.row("groups", task=task.index, phase=phase, groups=facts)
    if task.index == 0:
        parts = [
            f"{f['group']} {f['parameters']:,} at rate {f['lr']:g}"
            + (f" every {f['interval']} steps" if f["interval"] > 1 else "")
            for f in facts
        ]
        learner.log.info(f"parameter groups of phase {phase}: {', '.join(parts)}")
