"""Rank growth: where the loss on held-out training images plateaus, the target expert gets neurons and further epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.families.experts import plateau
from models.families.population import Population
from models.learner.base import Learner
from models.learner.held_out import hold_out
from models.settings.experts import LifeSettings
from utils.data.batches import TaskData
from utils.data.tasks import Task

Train = Callable[
    [str, int, list[float]], list[float]
]  # (phase, epochs, held-out losses to append to) -> loss per epoch


def divide(learner: Learner, task: Task, cfg: LifeSettings) -> tuple[TaskData, TaskData | None]:
    """(what is trained on, what is held out); nothing is held out unless `expert_rank_max` is set."""
    if cfg.expert_rank_max is None:
        return task.train, None
    ratio, key = cfg.rank_growth_val_ratio, "rank_growth_val_ratio"
    return hold_out(learner, task, ratio, key=key, draw="rank growth", purpose="rank growth")


def grow_while_it_helps(
    learner: Learner,
    task: Task,
    population: Population,
    cfg: LifeSettings,
    measured: Sequence[float],
    train: Train,
) -> list[float]:
    """After a training phase with held-out losses `measured`: if they plateaued, the target grows and trains for further
    epochs, and again as long as that helps and `expert_rank_max` allows. Returns the loss of each further epoch."""
    losses: list[float] = []
    grows = plateau(measured, cfg.plateau_epochs, cfg.plateau_tolerance)
    rounds = 0
    while grows and (by := population.room(cfg.expert_rank_max, cfg.rank_growth_step)):
        rounds, best = rounds + 1, min(measured)
        for parameter in population.grow_rank(by, f"task{task.index}.{rounds}", learner.initialise):
            learner.trained.pop(id(parameter), None)  # its successor is counted instead
        after: list[float] = []
        losses += train(f"grow {rounds}", cfg.rank_growth_epochs, after)
        grows = min(after) < (1 - cfg.plateau_tolerance) * best
        rank = population.ranks()[0][population.target]
        facts = {"expert": population.target, "rank": rank, "before": best, "after": min(after), "helped": grows}
        learner.log.row("rank", task=task.index, **facts)
        measured = [*after, best]  # the next growth must improve on the best so far
    return losses
