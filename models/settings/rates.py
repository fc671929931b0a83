"""Keys that several methods share: epochs, learning rates and their schedule, the layers that are adapted, learned routers.

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from utils.config.schema import Trained


class TaskRateSettings(Trained):
    """Epochs and rates of the first task. They may differ from those of later tasks. The names are LAMDA-PILOT's."""

    epochs: int = Field(20, ge=0, description="epochs: passes over the training images of each task")
    init_epoch: int | None = Field(None, ge=0, description="epochs of the first task; null: as epochs")
    lrate: float | None = Field(None, gt=0, le=100, description="learning rate of later tasks; null: init_lr")

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """The cross-entropy is among a task's classes alone."""
        return classes

    def passes(self, task: int) -> int:
        """Epochs of task `task`, counted from 0."""
        return self.epochs if task or self.init_epoch is None else self.init_epoch

    def rate(self, task: int) -> float:
        """Learning rate at the start of task `task`, counted from 0."""
        return self.init_lr if not task or self.lrate is None else self.lrate

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        yield from self.must_not_rise("lrate", self.lrate)


class SteppedSettings(Trained):
    """Rates that fall in steps. The names are LAMDA-PILOT's."""

    milestones: tuple[int, ...] | None = Field(
        None,
        description="epochs, counted from 0, at which the learning rate is multiplied by lrate_decay; null: a cosine to min_lr",
    )
    lrate_decay: float = Field(0.1, ge=0, le=1, description="factor on the learning rate at each of milestones")

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect(
            "milestones, where the rate falls in steps", self.milestones is not None, "min_lr"
        )
        yield from self.has_no_effect("milestones null", self.milestones is None, "lrate_decay")

    def never_reached(self, key: str, milestones: Sequence[int] | None, epochs: int) -> Iterator[str]:
        """For `remarks`: a note on those `milestones`, set by `key`, that training of so many `epochs` never reaches."""
        if milestones and (late := [m for m in milestones if m >= epochs]):
            what = f"milestone{'s' * (len(late) > 1)} {', '.join(map(str, late))}"
            yield f"{key}: the rate never falls at {what}, since {epochs} epochs are numbered 0 to {epochs - 1}"


class FirstTaskSettings(TaskRateSettings, SteppedSettings):
    """A recipe of the first task. Rates that fall in steps may do so otherwise in the first task. The names are
    LAMDA-PILOT's."""

    init_milestones: tuple[int, ...] | None = Field(None, description="milestones of the first task; null: milestones")
    init_lr_decay: float | None = Field(
        None, ge=0, le=1, description="lrate_decay of the first task; null: lrate_decay"
    )

    def steps_of(self, task: int) -> tuple[tuple[int, ...] | None, float]:
        """(milestones, factor at each) of task `task`, counted from 0."""
        if task:
            return self.milestones, self.lrate_decay
        milestones = self.milestones if self.init_milestones is None else self.init_milestones
        return milestones, self.lrate_decay if self.init_lr_decay is None else self.init_lr_decay

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.has_no_effect("no milestones in the first task", self.steps_of(0)[0] is None, "init_lr_decay")
        yield from self.never_reached("milestones", self.milestones, self.epochs)
        yield from self.never_reached("init_milestones", self.init_milestones, self.passes(0))


class LayerSettings(Trained):
    """Adapted layers. The method trains adapters in a range of layers, which all tasks share."""

    epochs: int = Field(20, ge=0, description="epochs: passes over the training images of each task")
    adapt_start_layer: int | None = Field(
        None, ge=0, description="first layer with adapters, counted from 0; null: only the last three layers have any"
    )
    adapt_end_layer: int | None = Field(None, ge=0, description="last layer with adapters; null: the backbone's last")
    decay_other_rows: bool = Field(
        False, description="weight decay also shrinks the head's rows of other tasks, as in the originals"
    )

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """The cross-entropy is among a task's classes alone."""
        return classes


class RoutedSettings(LayerSettings):
    """Learned routers. A router gates the experts of each layer."""

    routing_controls: bool = Field(
        True,
        description="after the last task, score the same model with uniform and random routing and with each of E experts "
        "alone, in E + 2 more passes over the test images, from which nothing is learned; skipped with one expert or without "
        "a learned router",
    )
