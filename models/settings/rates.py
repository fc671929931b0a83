"""JSON keys that several methods share: of layers that are adapted, and of slow and fast adapters in them (Nested LoRA).

Imports nothing heavy, so that bad input is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from utils.config.schema import Trained


class TaskRateSettings(Trained):
    """Epochs and rates of the first task. They may differ from those of later tasks; names of LAMDA-PILOT."""

    epochs: int = Field(20, ge=0, description="passes over each task")
    init_epoch: int | None = Field(None, ge=0, description="passes over the first task; null: epochs")
    lrate: float | None = Field(None, gt=0, le=100, description="learning rate in later tasks; null: init_lr")

    def passes(self, task: int) -> int:
        return self.epochs if task or self.init_epoch is None else self.init_epoch

    def rate(self, task: int) -> float:
        return self.init_lr if not task or self.lrate is None else self.lrate

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        yield from self.must_not_rise("lrate", self.lrate)


class SteppedSettings(Trained):
    """Rates that fall in steps. Names of LAMDA-PILOT."""

    milestones: tuple[int, ...] | None = Field(
        None,
        description="epochs, counted from 0, from which on the rate is lrate_decay times lower; null: cosine to min_lr",
    )
    lrate_decay: float = Field(0.1, ge=0, le=1, description="what the rate is multiplied by at each of milestones")

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        if self.milestones is not None and self.is_set("min_lr"):
            yield "min_lr does not act with milestones: the rate falls in steps"
        yield from self.has_no_effect("milestones null", self.milestones is None, "lrate_decay")


class LayerSettings(Trained):
    """Adapted layers. The method trains something in a range of layers, shared by all tasks."""

    epochs: int = Field(20, ge=0, description="passes over each task")
    adapt_start_layer: int | None = Field(
        None, ge=0, description="first layer that is adapted, counted from 0; null: the last three"
    )
    adapt_end_layer: int | None = Field(None, ge=0, description="last layer that is adapted; null: the backbone's last")
    decay_other_rows: bool = Field(
        False, description="weight decay also shrinks the head rows of other tasks, as in the originals"
    )


class RoutedSettings(LayerSettings):
    """Learned routers. A router gates the experts of each layer."""

    routing_controls: bool = Field(
        True,
        description="after the last task, score the same model with uniform and random routing and with each expert alone: "
        "E + 2 more passes over the test images, which the learner never sees; not with one expert or no learned router",
    )
