"""APER's and EASE's features in several spaces are computed once for each image, and are those of passes from images."""

import pytest
import torch

from backbone import vit
from tests.helpers.methods import images_of, run
from tests.helpers.toy import toy_settings, toy_stream
from utils.evaluation import scores as evaluation

FRESH = {"ffn_adapter_dropout": 0.0, "ffn_num": 3}
CPU = torch.device("cpu")
METHODS = [("aper_adapter", {}, 2), ("ease", {}, 3), ("ease", {"use_init_ptm": True, "beta": 0.5}, 4)]
IDS = ["aper", "ease", "ease, plain too"]


@pytest.fixture
def computed(monkeypatch):
    """Images of each pass through the blocks for a space that is kept."""
    counts, real = [], vit.SlottedViT.prefix

    def counting(self, images, layer, *args, **kwargs):
        if layer == self.depth:
            counts.append(len(images))
        return real(self, images, layer, *args, **kwargs)

    monkeypatch.setattr(vit.SlottedViT, "prefix", counting)
    return counts


def test_toy_runs_keep_features_by_default():
    assert toy_settings("ease").prefix_cache == "memory"


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize(("method", "keys", "spaces"), METHODS, ids=IDS)
def test_numbers_are_those_of_passes_from_images(method, keys, spaces, place, toy_learner):
    stream = toy_stream()
    ours, plain = (run(toy_learner(method, **FRESH, **keys, prefix_cache=p), stream) for p in (place, "off"))
    data = stream.test(1)
    for (kept, labels), (fresh, truth) in zip(
        *(learner.outputs(learner.features, data, 3, augment=False, shuffle=False) for learner in (ours, plain)),
        strict=True,
    ):
        assert kept.shape[1] == spaces * 16 and torch.equal(labels, truth)
        torch.testing.assert_close(kept, fresh, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.logits(images_of(stream)), plain.logits(images_of(stream)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "keys", "spaces"), METHODS, ids=IDS)
def test_an_image_passes_each_space_once(method, keys, spaces, toy_learner, computed):
    stream, learner = toy_stream(), toy_learner(method, **FRESH, **keys)
    run(learner, stream)
    images = [len(stream.test(task)) for task in range(3)]
    computed.clear()
    for _ in range(2):
        scores, _ = evaluation.evaluate(learner, stream, 2, CPU)
    assert [s.samples for s in scores] == images
    assert sum(computed) == spaces * sum(images)


def test_a_later_task_adds_its_own_space_alone(toy_learner, computed):
    stream, learner = toy_stream(), toy_learner("ease", **FRESH)
    sizes = [len(stream.test(task)) for task in range(3)]
    for index in range(3):
        learner.begin_task()
        learner.learn(stream.task(index))
        learner.consolidate(stream.task(index))
        computed.clear()
        evaluation.evaluate(learner, stream, index, CPU)
        # older images in the new space, the new ones in all
        assert sum(computed) == sum(sizes[:index]) + (index + 1) * sizes[index]


def test_spaces_share_the_limit_and_what_does_not_fit_is_computed_in_every_pass(toy_learner):
    stream = toy_stream()
    learner = run(toy_learner("ease", **FRESH), stream)
    alone, cache = learner._space(0)
    assert (cache.limit, cache.shared_by) == (2 * 2**30, 3)
    assert all(alone.slots[str(n)] is slot.adapters[0] for n, slot in enumerate(learner.slots()))
    tight = run(toy_learner("ease", **FRESH, prefix_cache_gb=1e-9), stream)
    for kept, small in zip(
        *(one.outputs(one.features, stream.test(0), 4, augment=False, shuffle=False) for one in (learner, tight)),
        strict=True,
    ):
        torch.testing.assert_close(small[0], kept[0], rtol=0, atol=1e-5)
    told = (tight.log.folder / "run.log").read_text(encoding="utf-8")
    assert "are not stored" in told and "above prefix_cache_gb 1e-09;" in told  # the key's own value, and what all need
