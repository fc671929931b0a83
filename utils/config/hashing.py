"""Which keys decide a run's numbers, and their hash, which names the run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Keys that say where and how a run happens, not what it computes: they are left out of the hash.
NOT_HASHED = frozenset(
    {"about", "expected", "tuned", "prefix", "seed", "device", "num_workers", "data_root", "eval_batch_size"}
    | {"prefix_cache", "prefix_cache_gb", "tracker", "predictions"}
    # those of a cluster, utils/engines/settings.py: in config.json of older versions
    | {"slurm_cluster", "slurm_partition", "slurm_time", "slurm_gpus", "slurm_cpus", "slurm_mem_gb", "slurm_account"}
    | {"slurm_qos", "slurm_array_parallelism", "slurm_setup", "slurm_extra", "ray_address", "ray_gpus", "ray_cpus"}
)
# Keys added later. At these values they are left out of the hash, so older run folders keep their name.
ADDED_LATER: dict[str, Any] = {
    "batch_per_process": False,
    "data_split": None,
    "skip_broken": False,
    "grey_bits": None,
    "backbone_depth": None,
    "max_rounds": 1,
    "held_out_ratio": 0.1,
    "head_lift": "relu",
    "head_fourier_gamma": None,
    "head_shrinkage": None,
    "head_drift_repair": "none",
    "head_align_covariance": "auto",
    "head_align_rank": 16,
    "head_align_epochs": 5,
    "head_align_samples": 256,
    "head_align_lr": 0.01,
    "head_align_logit_norm": 0.1,
    "head_align_local": 0.0,
    "head_align_shrink": False,
    "compare_heads": False,
    "shots": None,
    "imbalance": None,
    "imbalance_order": "index",
    "subset_seed": 0,
}
# The same for keys that a method got later and others always had.
ADDED_TO = {
    "finetune": {"init_epoch": None, "lrate": None, "milestones": None, "lrate_decay": 0.1}
    | {"init_milestones": None, "init_lr_decay": None, "init_weight_decay": None},
}


def settings_hash(values: Mapping[str, Any]) -> str:
    """12 hex digits of SHA-256 over all settings that decide a run's numbers, the seed apart. Values as JSON has them."""
    added = ADDED_LATER | ADDED_TO.get(str(values.get("model_name")), {})
    deciding = {k: v for k, v in values.items() if k not in NOT_HASHED and added.get(k, ...) != v}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:12]


def departing_digest(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """12 hex digits over the settings that decide numbers and differ from their default, so that a new key ages no expected
    numbers: `expected.settings` of an experiment file."""
    departing = {k: v for k, v in settings.items() if k not in NOT_HASHED and v != defaults.get(k, ...)}
    return hashlib.sha256(json.dumps(departing, sort_keys=True).encode()).hexdigest()[:12]
