"""The keys of an experiment's JSON: typed and closed, so that a misspelt key or a value out of bounds is refused.

The file is flat and uses SEMA-CL's key names. `Experiment` has the keys of every method; the class `Settings` in
`models/<name>.py` extends it with those of one method. Settings are frozen, and no other code reads the raw values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from utils.config import common_names, forms, head_keys
from utils.config.split import Split, named
from utils.config.tuning import Tuned
from utils.text import shown

# Keys of SEMA-CL and LAMDA-PILOT files that have no effect in a method without rehearsal: accepted, and named in one note.
WITHOUT_EFFECT = frozenset({"memory_size", "memory_per_class", "fixed_memory", "vpt_type", "prompt_token_num"})
MOST_SEEDS = 1000
Precision = Literal["fp32", "tf32", "bf16"]


Settings = TypeVar("Settings", bound="Experiment")


class Experiment(BaseModel):
    """The keys of every method."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
    # Keys of other programs' files that have no effect for this method: accepted, and named in one note.
    ignored: ClassVar[frozenset[str]] = frozenset()
    # Keys of other programs' files of which this method implements one value: any other is refused. They are no fields, so
    # no key table and no config.json has them, but the settings hash includes them. A subclass extends its base's:
    # `only: ClassVar[dict[str, Any]] = PoolSettings.only | {"same_key_value": False}`.
    only: ClassVar[dict[str, Any]] = {}
    # Whether features still change after class statistics were gathered from them, so that these become stale.
    features_move: ClassVar[bool] = True

    about: str = Field(
        "", description="what the experiment is: source, what it shows, number to expect, time, hardware"
    )
    expected: forms.ExpectedNumbers | None = Field(
        None, description="numbers this experiment gave before; main.py --verify RUN compares a run with them"
    )
    tuned: Tuned | None = Field(None, description="how main.py --tune chose settings of this file; written by it")
    prefix: str = Field("", description="free label, shown in the banner")
    model_name: str = Field(description="method: a file name in models/")
    dataset: str = Field(description="data set, see --list")
    data_root: str = Field("data", description="folder with the data sets")
    data_path: str | Annotated[tuple[str, ...], Field(min_length=2, max_length=1000)] | None = Field(
        None,
        description="dataset 'folder' only: a folder of class folders, or of train/ and test/; or a list of such folders, the "
        "classes of each after those of the one before it",
    )
    test_ratio: float = Field(
        0.2, gt=0, lt=1, description="dataset 'folder' without test/: share of each class that is the test set"
    )
    data_split: str | None = Field(
        None,
        description="dataset 'folder' only: a CSV file with the columns path, label and perhaps split, a list of lines "
        "`path label`, or a folder with a train and a test file; paths are relative to data_path; null: class folders",
    )
    skip_broken: bool = Field(
        False,
        description="leave out image files that cannot be read, with their number in results.json; every start then decodes "
        "all images once. false: they are refused",
    )
    grey_bits: int | None = Field(
        None,
        ge=8,
        le=16,
        description="bits of grey that 16-bit image files hold: 12 if their values end at 4095; null: 16, and refused where "
        "that would make them black",
    )
    shots: int | None = Field(
        None,
        ge=1,
        description="training images of each class, drawn from subset_seed; a class with fewer keeps all; null: every image",
    )
    imbalance: float | None = Field(
        None,
        ge=1,
        le=100_000,
        description="long tail: how many times as many training images the first class has as the last one, exponentially "
        "fewer from class to class (Cao et al. 2019, arXiv 1906.07413); null: every image",
    )
    imbalance_order: Literal["index", "shuffled"] = Field(
        "index",
        description="with imbalance, which class has how many images: fewer with its number in the data set, or in an order "
        "drawn from subset_seed. With shuffle false and index the frequent classes arrive first",
    )
    subset_seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of the images that shots and imbalance keep, the same for every seed of the experiment",
    )
    num_workers: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = Field(
        0,
        description='processes that decode image files, or "auto": measured; no result depends on their number',
    )
    init_cls: int = Field(ge=1, description="classes in the first task")
    increment: Annotated[int | tuple[int, ...], BeforeValidator(forms.as_sizes)] = Field(
        description="classes in each later task; the last task may have fewer. Or a list such as [3, 3, 2]: the classes of "
        "the second task, the third and so on, which make up all classes together with init_cls"
    )
    shuffle: bool = Field(
        True, description="permute the classes (numpy legacy generator, as SEMA-CL); false: natural order"
    )
    class_order_seed: int | None = Field(
        None, ge=0, lt=2**32, description="seed of the class order; null: the run's seed, as SEMA-CL"
    )
    class_order: tuple[int, ...] | None = Field(
        None, description="the class order itself, original class numbers from 0; null: drawn from class_order_seed"
    )
    seed: Annotated[tuple[int, ...], BeforeValidator(forms.as_seeds)] = Field(
        (1993,), description="seeds; each is one run"
    )
    device: Annotated[str, BeforeValidator(forms.as_device)] = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='auto, cpu, cuda, cuda:N, or SEMA-CL\'s ["N"]'
    )
    backbone_type: str = Field(
        "embedded", description="embedded, a SEMA-CL backbone name, or any timm ViT, EVA or BEiT (name or name.tag)"
    )
    backbone_weights: str = Field(
        "pretrained", description="pretrained, random, or the path of a .safetensors/.pth file"
    )
    backbone_depth: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="how many of the backbone's blocks are used, the first ones; its final norm and pooling follow them, "
        "though they were trained behind the last block; null: all",
    )
    image_size: int | None = Field(
        None, ge=8, le=1024, description="side of the input in pixels; null: that of the backbone"
    )
    input_normalisation: Literal["auto", "none", "backbone"] = Field(
        "auto",
        description="none: images in [0, 1] as SEMA-CL; backbone: its mean and std; auto: none for SEMA-CL's names",
    )
    batch_size: int = Field(
        32, ge=1, description="training images per step; if torchrun starts several processes, of all together"
    )
    batch_per_process: bool = Field(
        False,
        description="batch_size is per process that torchrun starts: a step has batch_size x processes images; rates stay",
    )
    eval_batch_size: int = Field(256, ge=1, description="images per step in evaluation")
    precision: Precision = Field(
        "fp32",
        description="of the backbone's matrix products: bf16 by autocast, tf32 on CUDA GPUs alone. Weights, optimizer, "
        "routers, losses and class statistics stay in float32 or better",
    )
    compile: bool = Field(
        False,
        description="compile the frozen blocks with torch.compile, which takes a minute or more at the start of a run; numbers "
        "differ by rounding. If it fails, the run warns and continues without it",
    )
    prefix_cache: Literal["memory", "disk", "off"] = Field(
        "memory",
        description="where outputs of the frozen layers are stored, so that each image passes them once: in device memory, in "
        "files of the run folder, or off. Numbers differ by rounding alone",
    )
    prefix_cache_gb: float = Field(
        2.0,
        gt=0,
        description="most that prefix_cache stores, GiB: test images first, then training images, then train_views",
    )
    tracker: Literal["tensorboard", "wandb", "mlflow"] | None = Field(
        None,
        description="also sends every number of metrics.jsonl to TensorBoard (files in RUN/tensorboard), Weights & Biases "
        "(RUN/wandb, online or offline) or MLflow (its server, or mlflow.db beside the runs); the package must be installed",
    )
    predictions: Literal["last", "tasks"] | None = Field(
        None,
        description="also writes prediction and scores of every test image: last: RUN/predictions.npz after the last "
        "task; tasks: RUN/predictions/task_T.npz after each task; null: no file",
    )
    head: head_keys.HeadKind = head_keys.HEAD
    head_projection_dim: int | None = head_keys.PROJECTION_DIM
    head_lift: head_keys.Lift = head_keys.LIFT
    head_fourier_gamma: float | None = head_keys.GAMMA
    head_shrinkage: float | None = head_keys.SHRINKAGE
    head_align_covariance: head_keys.Covariance = head_keys.COVARIANCE
    head_align_rank: int = head_keys.RANK
    head_align_epochs: int = head_keys.EPOCHS
    head_align_samples: int = head_keys.SAMPLES
    head_align_lr: float = head_keys.LR
    head_align_logit_norm: float = head_keys.LOGIT_NORM
    head_align_local: float = head_keys.LOCAL
    head_align_shrink: bool = head_keys.SHRINK
    head_drift: bool = head_keys.DRIFT
    head_drift_repair: head_keys.Repair = head_keys.REPAIR
    compare_heads: bool = head_keys.COMPARE

    @model_validator(mode="before")
    @classmethod
    def _without_only(cls, values: Any) -> Any:
        """Drops each key of `only` that has its one legal value; with another value it stays, and is refused as unknown."""
        if not isinstance(values, dict):
            return values
        return {
            key: value for key, value in values.items() if key not in cls.only or not forms.same(value, cls.only[key])
        }

    @classmethod
    def accepted_keys(cls) -> frozenset[str]:
        """Every key that a file of this method may have, without those in `ignored`."""
        return frozenset(cls.model_fields) | cls.only.keys() | common_names.of(cls.model_fields).keys()

    @field_validator("*", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        """A list of the JSON file becomes a tuple, since settings are frozen."""
        return tuple(value) if isinstance(value, list) else value

    def descriptions(self) -> dict[str, str]:
        """What each key means, with unit and source."""
        return {key: field.description or "" for key, field in type(self).model_fields.items()}

    def is_set(self, key: str) -> bool:
        """Whether a key has another value than its default. A config.json has every key, so presence alone says nothing."""
        return getattr(self, key) != type(self).model_fields[key].default

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """{key: its default}, with lists as in JSON; required keys are left out."""
        defaults = {key: field.default for key, field in cls.model_fields.items() if not field.is_required()}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}

    def for_ranks(self: Settings, ranks: int) -> Settings:
        """These settings for a run in so many processes: with `batch_per_process` the whole batch is that many times larger."""
        if not self.batch_per_process:
            return self
        return self.model_copy(update={"batch_size": self.batch_size * ranks})

    def remarks(self) -> Iterator[str]:
        """Yields notes on keys that are set but have no effect beside the others: not an error, but the user should know."""
        yield from head_keys.idle(self)

    def remarks_on(self, split: Split) -> Iterator[str]:
        """Yields notes on keys that will not do what they say in a run with these tasks, each with the way out.

        --check and the start of a run show them. What counts steps waits until the images of the tasks are counted."""
        yield from ()

    def has_no_effect(self, why: str, holds: bool, *keys: str) -> Iterator[str]:
        """For `remarks`: if `holds`, one note that names those of `keys` that are set; `why` is the cause, such as
        "num_experts 1"."""
        if holds and (idle := [key for key in keys if self.is_set(key)]):
            yield f"these keys have no effect with {why}: {', '.join(idle)}"

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yields (keys involved, fault) for rules over several keys. A fault is dropped if one of its keys has one already."""
        if len(self.seed) > MOST_SEEDS:
            yield (
                ("seed",),
                f"seed: each of the {len(self.seed)} seeds is a separate run; at most {MOST_SEEDS} are allowed",
            )
        elif len(set(self.seed)) != len(self.seed) or not self.seed:
            yield (
                ("seed",),
                f"seed: a list of different whole numbers is expected, such as [1993, 1994]; got {shown(self.seed)}",
            )
        elif not all(0 <= s < 2**32 for s in self.seed):
            yield ("seed",), f"seed: every seed must lie in 0..{2**32 - 1}; got {shown(self.seed)}"
        if self.class_order is not None:
            if sorted(self.class_order) != list(range(len(self.class_order))):
                yield (
                    ("class_order",),
                    f"class_order: each class number 0..n-1 is expected once; got {shown(list(self.class_order))}",
                )
            for key in ("class_order_seed", "shuffle"):
                if self.is_set(key):
                    yield (
                        ("class_order", key),
                        f"{key}: has no effect beside class_order, which is the order; leave one out",
                    )
        elif not self.shuffle and self.class_order_seed is not None:
            yield (
                ("class_order_seed", "shuffle"),
                "class_order_seed: has no effect beside shuffle false, the natural order; leave one out",
            )
        if (self.data_path is not None) != (self.dataset == "folder"):
            yield ("data_path", "dataset"), "data_path: dataset 'folder' needs it, and no other dataset has it"
        if self.shots is not None and self.imbalance is not None:
            yield ("shots", "imbalance"), "imbalance: shots sets the number of images of every class; leave one out"
        if self.is_set("imbalance_order") and self.imbalance is None:
            yield ("imbalance_order", "imbalance"), "imbalance_order: has no effect without imbalance; leave it out"
        if self.is_set("subset_seed") and self.shots is None and self.imbalance is None:
            yield (
                ("subset_seed", "shots", "imbalance"),
                "subset_seed: has no effect without shots or imbalance; leave it out",
            )
        if self.data_split is not None and isinstance(self.data_path, tuple):
            yield ("data_split", "data_path"), "data_split: goes with one folder in data_path, not with a list"
        if self.data_split is not None and self.dataset != "folder":
            yield (
                ("data_split", "dataset"),
                "data_split: says where labels are for dataset 'folder', no other dataset has it",
            )
        yield from head_keys.faults(self, self.features_move)


class Trained(Experiment):
    """The keys of every method that trains by gradient steps."""

    optimizer: Literal["sgd", "adam"] = Field(
        "sgd", description="sgd (momentum 0.9) or adam, which means AdamW as in SEMA-CL"
    )
    init_lr: float = Field(0.01, gt=0, le=100, description="learning rate at the start of each phase")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the per-epoch cosine")
    weight_decay: float = Field(0.0005, ge=0, le=10, description="L2 penalty (sgd) or decoupled decay (adam)")
    train_views: int = Field(
        0,
        ge=0,
        le=1000,
        description="augmented views of an image in a task: epoch e shows view e mod n, and prefix_cache stores them; 0: a "
        "new one in every epoch, as the originals",
    )

    def classes_in_loss(self, classes: Sequence[int]) -> Sequence[int]:
        """How many classes the cross-entropy of each task that trains chooses among, of tasks with so many `classes`.

        A method that does not say gives none: the loss that is 0 is then noticed when it was measured."""
        return ()

    def remarks_on(self, split: Split) -> Iterator[str]:
        """One class in a task: the cross-entropy among one class is 0 whatever the scores, and so is its gradient."""
        yield from super().remarks_on(split)
        trained = self.classes_in_loss(split.classes)
        alone = [task for task, among in enumerate(trained) if among == 1]
        if not alone or sum(split.classes) == 1:
            return
        zero = f"{named(alone, len(trained))} {'have' if len(alone) > 1 and len(alone) < len(trained) else 'has'} one class"
        zero += ", and a cross-entropy among one class is 0: "
        larger = "larger init_cls and increment"
        if self.head == "linear":
            yield (
                f"{zero}the linear head learns nothing there and does not know these classes; "
                f'set head to "ncm", "ridge" or "lda", or take {larger}'
            )
        elif len(alone) == len(trained):
            yield f"{zero}nothing is learned before head {self.head} predicts, as simplecil does at once; take {larger}"

    def cross_checks(self) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().cross_checks()
        if self.min_lr > self.init_lr:
            yield ("min_lr", "init_lr"), f"min_lr: {self.min_lr} is above init_lr {self.init_lr}"

    def must_not_rise(self, key: str, rate: float | None, what: str = "") -> Iterator[tuple[tuple[str, ...], str]]:
        """For `cross_checks`: a fault if `rate`, set by `key`, would rise to min_lr. Null and 0 mean that there is no rate.
        `what` describes the rate in the message."""
        if rate is not None and 0 < rate < self.min_lr:
            yield ("min_lr", key), f"min_lr: {self.min_lr} is above {what or f'{key} {rate}'}"
