"""What a method's settings say of the tasks before a run: one class in a task, and intervals that are never due."""

import json
from types import SimpleNamespace

import pytest

import models
from commands import check, load
from tests.helpers.toy import toy_settings
from utils import data
from utils.config.split import Split

DIGITS = Split((2, 2, 2, 2, 2), (286, 290, 280, 284, 298))
MASKED = ["coda_prompt", "dualprompt", "dylora_moe", "inflora", "l2p", "moe_parallel", "nested_lora", "sd_lora"]
MASKED += ["sema", "sparse_moe"]
ZERO = "and a cross-entropy among one class is 0: "


def said(method, split, **keys):
    return list(toy_settings(method, **keys).remarks_on(split))


@pytest.mark.parametrize("method", models.available())
def test_no_word_where_tasks_have_several_classes_and_many_images(method):
    assert not said(method, DIGITS, size=10) and not said(method, Split((4, 3, 3)), size=10)


@pytest.mark.parametrize("method", MASKED)
def test_one_class_in_a_task_is_learned_by_no_masked_cross_entropy(method):
    (text,) = said(method, Split((4, 3, 1)), size=10)
    way_out = 'set head to "ncm", "ridge" or "lda", or take larger init_cls and increment'
    learned = "the linear head learns nothing there and does not know these classes"
    assert text == f"task 3 has one class, {ZERO}{learned}; {way_out}"
    (text,) = said(method, Split((1,) * 6), size=10)
    assert text.startswith(f"every task has one class, {ZERO}the linear head")
    assert said(method, Split((1, 1, 4, 1)), size=10)[0].startswith(f"tasks 1, 2 and 4 have one class, {ZERO}")
    # class statistics need no loss: a last task of one class is theirs all the same
    assert not said(method, Split((4, 3, 1)), head="ncm", size=10)
    (text,) = said(method, Split((1,) * 6), head="ridge", size=10)
    assert text.startswith(
        f"every task has one class, {ZERO}nothing is learned before head ridge predicts, as simplecil"
    )


def test_methods_with_another_loss():
    last, first = Split((2, 2, 1)), Split((1, 2, 2))
    assert not said("finetune", last) and said("finetune", first)[0].startswith("task 1 has one class")
    assert said("finetune", last, mask_old_classes=True)
    assert not said("joint", first) and not said("joint", last)  # every task trains on all classes seen
    assert not said("slca", last) and said("slca", last, ca_epochs=0)  # the alignment is on all classes seen
    assert said("dylora_moe", last) and not said("dylora_moe", last, replay_per_class=2)
    for method in ("aper_adapter", "ranpac"):
        assert not said(method, last) and said(method, first)[0].startswith("task 1 has one class")
        assert not said(method, first, tuned_epoch=0)
    assert not said("ease", last) and said("ease", Split((1, 1)))
    assert not said("simplecil", Split((1, 1))) and not said("nested_lora", Split((1,)))


def test_an_interval_longer_than_the_steps_of_a_task():
    keys = {"batch_size": 32, "epochs": 2, "nested_lora_update_interval_slow": 19}
    (text,) = said("nested_lora", DIGITS, **keys)  # 9 or 10 batches an epoch
    assert text == (
        "nested_lora_update_interval_slow: 19 is more than the 18 training steps of tasks 1, 3 and 4: the slow adapter is "
        "never updated there; set it to at most 18"
    )
    assert not said("nested_lora", DIGITS, **keys | {"nested_lora_update_interval_slow": 18})
    assert not said("nested_lora", Split((2, 2)), **keys)  # images were not counted
    (text,) = said("nested_lora", DIGITS, **keys | {"nested_lora_update_interval_slow": 50})
    assert "50 is more than the 18 to 20 training steps of every task" in text
    # a tenth is held out to select the winner: 258 of 286 images are trained on
    steps = {"batch_size": 26, "epochs": 1, "nested_lora_update_interval_slow": 11}
    assert "10 training steps of every task" in said("moe_parallel", Split((2, 2), (286, 286)), **steps)[0]
    assert not said("moe_parallel", Split((2, 2), (286, 286)), **steps, moe_mode="task")
    nested = {"ffn_adapter_type": "nested_lora", "func_epoch": 2}
    assert said("sema", DIGITS, **keys | nested) and not said("sema", DIGITS, batch_size=32, **nested)


def test_levels_between_have_intervals_too():
    keys = {"nested_lora_levels": 3, "nested_lora_level_intervals": (30,), "batch_size": 32, "epochs": 2}
    (text,) = said("nested_lora", DIGITS, **keys)
    assert text.startswith(
        "nested_lora_level_intervals: 30 is more than the 18 to 20 training steps of every task: an adapter"
    )


def test_merges_that_are_never_due():
    (text,) = said("nested_lora", DIGITS, nested_lora_consolidation_interval=6)
    assert text == (
        "nested_lora_consolidation_interval: 6 tasks lie between two merges, and there are 5 tasks: fast is never merged; "
        "lower it, or set nested_lora_use_consolidation to false"
    )
    (text,) = said("nested_lora", DIGITS, nested_lora_consolidation_interval=3, nested_lora_levels=3)
    assert "and into slow 3^2, and there are 5 tasks: nothing is ever merged into slow" in text
    assert not said("nested_lora", DIGITS, nested_lora_consolidation_interval=5)
    never = {"nested_lora_consolidation_interval": 6, "nested_lora_use_consolidation": False}
    assert not said("nested_lora", DIGITS, **never)


def test_a_warm_up_longer_than_a_task():
    keys = {"batch_size": 32, "epochs": 1}
    (text,) = said("sparse_moe", DIGITS, router_warmup=12, **keys)
    assert text.startswith(
        "router_warmup: 12 is more than the 10 training steps of every task: the router's rate never"
    )
    assert not said("sparse_moe", DIGITS, router_warmup=9, **keys)


def test_experts_that_can_never_be_added_or_mature():
    def routed(**keys):
        return said("dylora_moe", DIGITS, **{"num_experts": 8, "batch_size": 32, "epochs": 2} | keys)

    assert "only 4 follow: no expert is ever added" in routed(novelty_cooldown=4)[0]
    assert not routed(novelty_cooldown=3)
    assert "no task after the first has more than 298: no expert" in routed(novelty_min_samples=299)[0]
    assert not routed(novelty_min_samples=298) and not routed(novelty_min_samples=299, grow_experts=False)
    assert "maturity_tasks: an expert needs 5, and the run has 5 tasks" in routed(maturity_tasks=5)[0]
    assert not routed(maturity_tasks=4)
    assert "maturity_steps: an expert needs 99, and the run" in routed(maturity_tasks=None, maturity_steps=99)[0]
    assert not routed(maturity_tasks=None, maturity_steps=90)
    assert "top_k_experts: 5 never chooses, since 5 tasks add up to 5 experts at most" in routed(top_k_experts=5)[0]
    assert not routed(top_k_experts=4)


def test_a_pool_without_prompts_for_every_task():
    (text,) = said("dualprompt", DIGITS, size=4)
    assert text == (
        "size: 4 prompts are enough for 4 tasks of top_k 1, and there are 5: from task 5 on a task trains prompts of earlier "
        "tasks; set size to 5"
    )
    assert not said("l2p", DIGITS, size=5) and said("l2p", DIGITS, size=10, use_prompt_mask=True)


def test_batches_that_drop_last_leaves_out():
    keys = {"drop_last": True, "batch_size": 285}
    (text,) = said("coda_prompt", DIGITS, **keys)
    assert text.startswith("drop_last: tasks 3 and 4 have no full batch of 285 images, and nothing is trained there")
    assert not said("coda_prompt", DIGITS, **keys | {"batch_size": 280})


def test_milestones_after_the_last_epoch():
    def told(method, **keys):
        return [text for text in toy_settings(method, **keys).remarks() if "milestone" in text]

    late = "the rate never falls at milestones 20, 40, since 20 epochs are numbered 0 to 19"
    assert told("slca", epochs=20, milestones=(9, 20, 40)) == [f"milestones: {late}"]
    assert told("sd_lora", epochs=5, init_epoch=20, init_milestones=(20, 40)) == [f"init_milestones: {late}"]
    assert not told("slca", epochs=20, milestones=(19,))


def test_check_counts_the_images_of_an_embedded_set_where_a_key_depends_on_them(monkeypatch, tmp_path):
    path = tmp_path / "x.json"
    keys = {
        "model_name": "nested_lora",
        "dataset": "digits",
        "init_cls": 4,
        "increment": 5,
        "epochs": 2,
        "head": "linear",
    }

    def told(**more):
        path.write_text(json.dumps(keys | more))
        arguments = SimpleNamespace(config=path, set=[], data_root=None, device=None)
        return check.foreseen(load.load(arguments).cells[0].resolved)

    interval, one_class = told(nested_lora_update_interval_slow=20)[::-1]
    assert "20 is more than the 10 training steps of task 3" in interval and one_class.startswith(
        "task 3 has one class"
    )
    monkeypatch.setattr(data, "load", None)
    assert told() == [one_class]  # the images need not be read
