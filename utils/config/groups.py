"""The keys that every method has, in groups: for docs/keys.md and for the settings of a report."""

from __future__ import annotations

# Keys that say where and how fast a run happens. They are in a separate section, with the keys of `Cluster`.
SPEED = (
    *("device", "precision", "compile", "prefix_cache", "prefix_cache_gb", "eval_batch_size", "batch_per_process"),
    *("num_workers", "tracker", "predictions"),
)
# The tables of the keys that every method has; a key that no other table names stands in the last one.
COMMON = {
    "The experiment": ("about", "expected", "tuned", "prefix", "model_name", "seed"),
    "Data": (
        *("dataset", "data_root", "data_path", "data_split", "test_ratio", "skip_broken", "grey_bits"),
        *("shots", "imbalance", "imbalance_order", "subset_seed"),
    ),
    "Tasks": ("init_cls", "increment", "shuffle", "class_order_seed", "class_order"),
    "Backbone": ("backbone_type", "backbone_weights", "backbone_depth", "image_size", "input_normalisation"),
    "Training and prediction": ("batch_size",),
}
