"""Kept prefixes: the same numbers, shared by row, dropped when anything below changes, whole on disk or not there."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from backbone import prefix_cache, vit
from backbone.adapters.adapter import Adapter
from backbone.adapters.nested import NestedLoRAAdapter
from backbone.blocks import Slot
from backbone.prefix_cache import PrefixCache
from backbone.rowstore import RowStore
from backbone.vit import Activations
from tests.helpers.toy import toy_backbone, toy_dataset, toy_stream

ROW = 5 * 16 * 4  # bytes of one toy stream: 5 tokens, width 16, float32
PLENTY = 10**6


def backbone_with(layers=(1, 2), slot=lambda: Adapter(16, 2)):
    backbone = toy_backbone()
    for layer in layers:
        backbone.fill(layer, slot())
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone.requires_grad_(False)


@pytest.fixture
def computed(monkeypatch):
    """Images whose prefix was computed, call by call."""
    counts, real = [], vit.SlottedViT.prefix

    def counting(self, images, *args, **kwargs):
        counts.append(len(images))
        return real(self, images, *args, **kwargs)

    monkeypatch.setattr(vit.SlottedViT, "prefix", counting)
    return counts


def features(backbone, batches):
    with torch.no_grad():
        found = [(backbone(images), labels, index) for images, labels, index in batches]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


PASS = {"augment": False, "shuffle": False}


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("limit", [PLENTY, 24 * ROW + 60 * ROW, 24 * ROW, 0], ids=["inside", "input", "test", "none"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_numbers_are_those_of_a_pass_from_the_images(place, limit, shuffle, tmp_path):
    backbone, stream = backbone_with(), toy_stream()
    cache = PrefixCache(backbone, place, limit, tmp_path / "cache")
    for data in (stream.test(1), stream.task(1).train, stream.test(0).join(stream.test(2))):
        plain = features(backbone, data.batches(3, augment=False, shuffle=shuffle, epoch=2))
        for size in (3, 7):
            ours = features(backbone, cache.batches(data, size, 1, augment=False, shuffle=shuffle, epoch=2))
            torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=2e-6)
            assert torch.equal(ours[1], plain[1]) and torch.equal(ours[2], plain[2])


def kinds(cache, data, layer=1, **how):
    """(whether Streams came, whether inside the block) of a pass."""
    batches = list(cache.batches(data, 4, layer, **(PASS | how)))
    streams = [images for images, *_ in batches if isinstance(images, Activations)]
    assert len(streams) in (0, len(batches))
    return bool(streams), any(s.after is not None for s in streams)


@pytest.mark.parametrize(
    ("limit", "test", "train", "views"),
    [
        (2 * (24 + 60 + 2 * 20), (True, True), (True, True), (True, True)),
        (2 * (24 + 60 + 2 * 20) - 1, (True, True), (True, True), (True, False)),
        (2 * (24 + 60), (True, True), (True, True), (False, False)),
        (2 * 24 + 60, (True, True), (True, False), (False, False)),
        (2 * 24 - 1, (True, False), (False, False), (False, False)),
        (23, (False, False), (False, False), (False, False)),
    ],
)
def test_the_limit_decides_by_sizes_alone_test_images_first(limit, test, train, views):
    """24 test images, 60 training images, 20 of them in a task, in rows of a stream."""
    said = []
    for order in (0, 1):  # whatever is asked for first
        cache, stream = PrefixCache(backbone_with(), "memory", limit * ROW, say=said.append), toy_stream()
        asked = [(stream.test(0), test, {}), (stream.task(0).train, train, {})]
        for data, wanted, how in asked if order else asked[::-1]:
            assert kinds(cache, data, **how) == wanted
        assert kinds(cache, stream.task(0).train, augment=True, views=2) == views
        assert kinds(cache, stream.task(0).train, augment=True) == (False, False)  # fresh views are never kept
    assert len(said) == 2 * [test, train, views].count((False, False))
    assert all("above prefix_cache_gb" in text for text in said)


def test_off_and_layer_0_give_images():
    data = toy_stream().test(0)
    assert kinds(PrefixCache(backbone_with(), "off", PLENTY), data) == (False, False)
    assert kinds(PrefixCache(backbone_with(), "memory", PLENTY), data, layer=0) == (False, False)


def test_finished_features_are_kept_for_a_backbone_that_learns_nothing():
    backbone, data = toy_backbone(), toy_stream().test(0)
    cache = PrefixCache(backbone, "memory", 100 * 16 * 4)
    (stream, labels, _), *_ = cache.batches(data, 100, 3, **PASS)
    assert stream.x.shape == (8, 1, 16) and torch.equal(labels, data.labels)
    torch.testing.assert_close(backbone(stream), features(backbone, data.batches(9, **PASS))[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_each_image_is_computed_once_for_all_subsets_and_batch_sizes(place, tmp_path, computed):
    stream, cache = toy_stream(), PrefixCache(backbone_with(), place, PLENTY, tmp_path)
    train = stream.task(0).train
    kept, held = train.split(0.2, draw="x")
    for data in (held, kept, train, train.subset([3, 1]), stream.task(1, with_past=True).past[0]):
        assert kinds(cache, data) == (True, True)
    assert computed == [10, 10]  # one group for each of the task's two classes
    assert kinds(cache, stream.task(1).train.join(train)) == (True, True)
    assert computed == [10] * 4


def test_values_do_not_depend_on_what_was_asked_for_before():
    stream, found = toy_stream(), []
    train = stream.task(0).train
    for first in (train.split(0.2, draw="x")[1], train, train.subset([7])):
        cache = PrefixCache(backbone_with_seed(), "memory", PLENTY)
        list(cache.batches(first, 1, 1, **PASS))
        found.append(next(iter(cache.batches(train, 100, 1, **PASS)))[0].x)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def backbone_with_seed():
    torch.manual_seed(7)
    return backbone_with()


def test_large_classes_are_computed_in_groups(computed, monkeypatch):
    monkeypatch.setattr(prefix_cache, "CHUNK", 4)
    cache, data = PrefixCache(backbone_with(), "memory", PLENTY), toy_stream().task(0).train
    assert kinds(cache, data.subset([0])) == (True, True) and computed == [4]  # only the group it is in
    assert kinds(cache, data) == (True, True) and computed == [4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize(
    "change",
    {
        "weights": lambda b: b.vit.blocks[0].mlp.fc1.weight.mul_(1.5),
        "weights above too": lambda b: b.vit.blocks[2].mlp.fc1.weight.mul_(1.5),
        "slot below": lambda b: b.slots["0"].slow.up_proj.weight.mul_(3),
        "what acts below": lambda b: b.slots["0"].use("slow"),
        "another slot below": lambda b: b.fill(0, Adapter(16, 3).requires_grad_(False)),
        "normalisation": lambda b: b.mean.add_(0.3) and setattr(b, "normalises", True),
        "precision": lambda b: b.double(),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_change_below_drops_what_was_kept(place, change, tmp_path, computed):
    backbone = backbone_with((0, 1), lambda: NestedLoRAAdapter(16, 2))
    cache, data = PrefixCache(backbone, place, PLENTY, tmp_path / "c"), toy_stream().test(0)
    features(backbone, cache.batches(data, 4, 1, **PASS))
    features(backbone, cache.batches(data, 4, 1, **PASS))
    with torch.no_grad():
        backbone.slots["1"].slow.up_proj.weight.mul_(3)  # what is above may change
    features(backbone, cache.batches(data, 4, 1, **PASS))
    assert sum(computed) == 8
    with torch.no_grad():
        change[1](backbone)
    ours = features(backbone, cache.batches(data, 4, 1, **PASS))[0]
    assert sum(computed) == 16
    torch.testing.assert_close(ours, features(backbone, data.batches(4, **PASS))[0], rtol=0, atol=2e-6)
    if place == "disk":
        assert len(list((tmp_path / "c").iterdir())) == 1  # the old files are gone


def test_other_images_and_other_transforms_are_kept_apart(computed):
    cache = PrefixCache(backbone_with(), "memory", PLENTY)
    for stream in (toy_stream(), toy_stream(toy_dataset(seed=1)), toy_stream(class_order_seed=3), toy_stream()):
        for task in range(3):
            ours = features(cache.backbone, cache.batches(stream.test(task), 9, 1, **PASS))[0]
            plain = features(cache.backbone, stream.test(task).batches(9, **PASS))[0]
            torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)
    assert sum(computed) == 2 * 24  # another order of classes has the same images


def test_dropout_below_is_random_so_nothing_is_kept():
    backbone = backbone_with((0, 1), lambda: Adapter(16, 2, dropout=0.1)).eval()
    cache, data = PrefixCache(backbone, "memory", PLENTY), toy_stream().test(0)
    assert kinds(cache, data) == (True, True)
    backbone.train()
    assert kinds(cache, data) == (False, False)


def test_a_slot_below_that_still_learns_is_an_error():
    backbone = backbone_with((0, 1)).requires_grad_(True)
    with pytest.raises(AssertionError, match="below 1 still learns"):
        kinds(PrefixCache(backbone, "memory", PLENTY), toy_stream().test(0))


def test_what_was_kept_in_inference_mode_can_be_trained_on():
    backbone, data = backbone_with(), toy_stream().test(0)
    cache = PrefixCache(backbone, "memory", PLENTY)
    with torch.inference_mode():
        list(cache.batches(data, 4, 1, **PASS))
    backbone.slots.requires_grad_(True)
    (stream, *_), *_ = cache.batches(data, 100, 1, **PASS)
    backbone(stream).sum().backward()
    ours = backbone.slots["1"].up_proj.weight.grad.clone()
    backbone.zero_grad()
    backbone(next(iter(data.batches(100, **PASS)))[0]).sum().backward()
    torch.testing.assert_close(ours, backbone.slots["1"].up_proj.weight.grad, rtol=1e-4, atol=1e-5)


# Augmented views -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_epoch_e_shows_view_e_mod_n_of_each_image(layer, computed):
    backbone, data = backbone_with(), toy_stream().task(0).train
    cache = PrefixCache(backbone, "memory", PLENTY)

    def shown(epoch, stream="func", views=2):
        found = cache.batches(data, 6, layer, epoch=epoch, draw=stream, views=views)
        values, labels, index = features(backbone, found)
        assert torch.equal(index, data.order(epoch, stream)) and torch.equal(labels, data.labels[index])
        return values[index.argsort()]

    first, second = shown(0), shown(1)
    assert (first - second).abs().max() > 1e-3
    for epoch, stream, wanted in [(2, "func", first), (3, "func", second), (4, "rd", first)]:
        torch.testing.assert_close(shown(epoch, stream), wanted, rtol=0, atol=2e-6)
    of_view = features(backbone, data.batches(20, epoch=1, draw="views", shuffle=False))[0]
    torch.testing.assert_close(second, of_view, rtol=0, atol=2e-6)
    assert (shown(2, views=0) - first).abs().max() > 1e-3  # without views each epoch draws anew
    assert sum(computed) == (2 * 20 if layer else 0)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_views_of_a_task_are_dropped_at_its_end(place, tmp_path, computed):
    cache, stream = PrefixCache(backbone_with(), place, PLENTY, tmp_path), toy_stream()
    data = stream.task(0).train
    kinds(cache, data), kinds(cache, data, augment=True, views=1)
    assert sum(computed) == 40
    cache.forget_views()
    kinds(cache, data)
    assert sum(computed) == 40
    kinds(cache, data, augment=True, views=1)
    assert sum(computed) == 60


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_are_found_again_by_the_next_process(tmp_path, computed):
    torch.manual_seed(3)
    backbone, data = backbone_with(), toy_stream().test(0)
    first = features(backbone, PrefixCache(backbone, "disk", PLENTY, tmp_path).batches(data, 4, 1, **PASS))[0]
    torch.manual_seed(3)
    twin = backbone_with()
    again = features(twin, PrefixCache(twin, "disk", PLENTY, tmp_path).batches(data, 4, 1, **PASS))[0]
    assert torch.equal(first, again) and sum(computed) == 8


def test_the_folder_may_be_deleted_at_any_time(tmp_path, computed):
    backbone, stream = backbone_with(), toy_stream()
    cache = PrefixCache(backbone, "disk", PLENTY, tmp_path / "cache")
    first = features(backbone, cache.batches(stream.test(0), 4, 1, **PASS))[0]
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(features(backbone, cache.batches(stream.test(0), 4, 1, **PASS))[0], first)
    features(backbone, cache.batches(stream.test(1), 4, 1, **PASS))
    assert sum(computed) == 16


def test_a_disk_that_cannot_be_written_is_told_once_and_costs_no_number(tmp_path):
    (tmp_path / "file").write_text("no folder")
    said, backbone, stream = [], backbone_with(), toy_stream()
    cache = PrefixCache(backbone, "disk", PLENTY, tmp_path / "file" / "cache", said.append)
    for task in (0, 1):
        ours = features(backbone, cache.batches(stream.test(task), 4, 1, **PASS))[0]
        assert torch.equal(ours, features(backbone, stream.test(task).batches(4, **PASS))[0])
    assert len(said) == 1 and "cannot be written" in said[0]


def stored(folder, rows=(4, 2, 9)):
    store = RowStore(10, (3, 2), torch.bfloat16, folder)
    values = torch.arange(len(rows) * 6.0).view(-1, 3, 2).bfloat16()
    store.put(np.array(rows), iter(values.split(2)))
    return store, values


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_rows_come_back_from_any_blocks_in_any_order(place, tmp_path):
    folder = tmp_path if place == "disk" else None
    store, values = stored(folder)
    more = -torch.ones(2, 3, 2).bfloat16()
    store.put(np.array([0, 7]), [more])
    store.put(np.array([], dtype=np.int64), [])
    for opened in (store, RowStore(10, (3, 2), torch.bfloat16, folder)) if folder else (store,):
        assert opened.has(np.arange(10)).tolist() == [n in (4, 2, 9, 0, 7) for n in range(10)]
        assert torch.equal(opened.get(np.array([2, 0, 4, 2])), torch.stack([values[1], more[0], values[0], values[1]]))
        opened.get(np.array([2])).zero_()  # a copy
        assert torch.equal(opened.get(np.array([2]))[0], values[1])
    with pytest.raises(AssertionError, match="not stored"):
        store.get(np.array([1]))


@pytest.mark.parametrize("when", ["data half written", "before the rows", "rows half written"])
def test_what_a_killed_process_left_is_never_used(when, tmp_path, monkeypatch):
    """The process dies in the middle: no clean-up runs, and what is on the disk is what was written until then."""
    store, values = stored(tmp_path)

    def dying(self=None, *args, **kwargs):
        if when == "rows half written":
            self.write(b"\x93NUMPY")
        raise KeyboardInterrupt

    def parts():
        yield torch.ones(1, 3, 2).bfloat16()
        if when == "data half written":
            raise KeyboardInterrupt
        yield torch.ones(1, 3, 2).bfloat16()

    with monkeypatch.context() as patch:
        patch.setattr("backbone.rowstore.np.save", dying)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            store.put(np.array([0, 1]), parts())
    assert len(list(tmp_path.iterdir())) > 2  # something was left
    after = RowStore(10, (3, 2), torch.bfloat16, tmp_path)
    assert after.has(np.arange(10)).tolist() == [n in (4, 2, 9) for n in range(10)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.data", "00000.rows.npy"]
    after.put(np.array([0, 1]), [torch.ones(2, 3, 2).bfloat16()])
    again = RowStore(10, (3, 2), torch.bfloat16, tmp_path)
    assert torch.equal(again.get(np.array([1, 4])), torch.stack([torch.ones(3, 2).bfloat16(), values[0]]))


@pytest.mark.parametrize("harm", ["shorter data", "foreign rows", "rows beyond the set", "no data"])
def test_files_that_do_not_fit_together_are_not_read(harm, tmp_path):
    stored(tmp_path)
    data, rows = tmp_path / "00000.data", tmp_path / "00000.rows.npy"
    if harm == "shorter data":
        data.write_bytes(data.read_bytes()[:-1])
    elif harm == "foreign rows":
        rows.write_bytes(b"not numpy")
    elif harm == "no data":
        data.unlink()
    else:
        np.save(rows, np.array([4, 2, 10]))
    assert not RowStore(10, (3, 2), torch.bfloat16, tmp_path).has(np.arange(10)).any()


@pytest.mark.parametrize("name", ["00000.data", "00000.rows.npy"])
def test_a_turned_bit_in_a_block_is_told_and_the_block_computed_again(name, tmp_path):
    for place in (0, 7, -1):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        stored(tmp_path / "s")
        content = bytearray((tmp_path / "s" / name).read_bytes())
        content[place] ^= 16
        (tmp_path / "s" / name).write_bytes(content)
        (tmp_path / "s" / "notes.txt").write_text("foreign")
        again = RowStore(10, (3, 2), torch.bfloat16, tmp_path / "s")
        assert not again.has(np.arange(10)).any()
        assert "notes.txt" in again.complaints[-1] and "is removed and computed again" in again.complaints[0]
        _, values = stored(tmp_path / "s")
        twin = RowStore(10, (3, 2), torch.bfloat16, tmp_path / "s")
        assert torch.equal(twin.get(np.array([4, 2, 9])), values) and len(twin.complaints) == 1


def test_turned_bits_cost_no_number(tmp_path):
    backbone, data, said = backbone_with(), toy_stream().test(0), []
    first = features(backbone, PrefixCache(backbone, "disk", PLENTY, tmp_path).batches(data, 4, 1, **PASS))[0]
    (block,) = tmp_path.rglob("*.data")
    content = bytearray(block.read_bytes())
    content[11::16] = bytes(b ^ 1 for b in content[11::16])
    block.write_bytes(content)
    again = PrefixCache(backbone, "disk", PLENTY, tmp_path, said.append)
    assert torch.equal(features(backbone, again.batches(data, 4, 1, **PASS))[0], first)
    assert len(said) == 1 and str(block) in said[0]


class Linear(Slot):
    """A slot of a class that the cache does not know."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x, gates):
        return self.inner(x)


def test_slots_may_have_any_parameters():
    backbone = backbone_with((0, 1), Linear)
    cache, data = PrefixCache(backbone, "memory", PLENTY), toy_stream().test(0)
    ours = features(backbone, cache.batches(data, 4, 1, **PASS))[0]
    torch.testing.assert_close(ours, features(backbone, data.batches(4, **PASS))[0], rtol=0, atol=2e-6)
