"""utils/data/workers.py: what lives on a GPU, and how many processes decode; fakes stand for the GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import main
from tests.helpers.batches import gather
from tests.helpers.batches import stream as task_stream
from tests.helpers.runs import tiny_experiment
from tests.helpers.toy import toy_dataset, toy_stream
from utils.data import batches, transforms, workers

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_what_takes_a_tenth_of_a_gpu_lives_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 1000))  # little is free: the whole counts
    assert workers.fits(100, GPU) and not workers.fits(101, GPU)
    assert not workers.fits(1, CPU) and not workers.fits(1, None)


def test_images_that_live_on_the_device_are_transformed_there(monkeypatch):
    """`meta` is a device of its own: a tensor of another one in the same operation is an error."""
    monkeypatch.setattr(workers, "fits", lambda size, device: device is not None)
    data = toy_stream(toy_dataset(), device=torch.device("meta")).task(0).train
    assert data.source.pixels.device.type == "meta" and data.source.pixels is data.source.pixels  # copied once
    for augment in (True, False):
        images, labels, index = next(iter(data.batches(5, augment=augment)))
        assert images.device.type == "meta" and images.shape == (5, 3, 8, 8)
        assert labels.device.type == index.device.type == "cpu"
    assert data.source.digest == toy_stream(toy_dataset()).task(0).train.source.digest


def test_images_that_are_transformed_one_by_one_stay(monkeypatch):
    monkeypatch.setattr(workers, "fits", lambda size, device: device is not None)
    dataset = toy_dataset()
    dataset = type(dataset)(dataset.name, dataset.class_names, dataset.train, dataset.test, "imagenet")
    there, here = (toy_stream(dataset, device=d).task(0).train for d in (torch.device("meta"), None))
    assert torch.equal(next(iter(there.batches(5)))[0], next(iter(here.batches(5)))[0])


def test_the_draws_of_an_augmentation_are_made_on_the_cpu(monkeypatch):
    grids, real = [], transforms._affine_grid
    monkeypatch.setattr(transforms, "_affine_grid", lambda *a: grids.append(real(*a)) or grids[-1])
    images, seeds = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), transforms.sample_seeds(1, np.arange(3))
    for device in ("cpu", "meta"):
        assert transforms.BatchAffine(8)(images.to(device), seeds).device.type == device
    assert grids[0].device.type == "cpu" and torch.equal(*grids)


@pytest.mark.parametrize(("device", "pinned"), [(GPU, True), (CPU, False), (None, False)])
def test_memory_is_pinned_for_a_gpu_alone(device, pinned, on_disk, monkeypatch):
    asked = {}
    monkeypatch.setattr(batches, "DataLoader", lambda fetch, **options: asked.update(options) or [])
    given = list(task_stream(on_disk, num_workers=1, device=device).task(0).train.batches(4))
    assert given == [] and asked["pin_memory"] is pinned


@pytest.mark.parametrize(
    ("decode", "step", "most", "wanted"),
    [(0.04, 1, 8, 0), (0.06, 1, 8, 1), (1, 1, 8, 1), (3.1, 1, 8, 4), (100, 1, 8, 8), (1, 0, 2, 2), (0, 0, 2, 0)],
)
def test_workers_keep_up_with_the_step(decode, step, most, wanted):
    assert workers.workers_for(decode, step, most) == wanted


def test_files_are_measured_and_arrays_are_not(on_disk, monkeypatch):
    now = iter([0.0, 0.6, 10.0, 10.3])  # a batch decoded in 0.6 s, a pass in 0.3 s
    monkeypatch.setattr(workers, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(workers, "cores", lambda: 16)
    passes, cfg = [], SimpleNamespace(num_workers="auto", batch_size=4)
    stream = task_stream(on_disk)
    before = gather(stream.task(0).train.batches(4))
    text = stream.measure_workers(cfg, lambda images: passes.append(images.shape), CPU)
    assert text == (
        "num_workers auto: 2 of 16 cores; a batch of 4 takes 600.0 ms to decode, 300.0 ms in a forward pass"
    )
    assert passes == [(4, 3, 32, 32)] * 2
    assert stream.task(0).train.source.num_workers == stream.test(0).source.num_workers == 2
    assert all(torch.equal(a, b) for a, b in zip(before, gather(stream.task(0).train.batches(4)), strict=True))
    text = task_stream().measure_workers(cfg, None, CPU)
    assert text is not None and text.startswith("num_workers auto: 0, the images are in memory")
    assert stream.measure_workers(SimpleNamespace(num_workers=2), None, CPU) is None


def test_a_run_tells_the_number_it_took(tmp_path, monkeypatch, capsys):
    run = tiny_experiment("simplecil", tmp_path, monkeypatch, num_workers="auto")
    assert main.main([*run, "--out", str(tmp_path / "logs")]) == 0
    (folder,) = (tmp_path / "logs").glob("*/*/seed_3")
    assert "num_workers auto: 0, the images are in memory" in (folder / "run.log").read_text()
    assert main.main(["--evaluate", str(folder)]) == 0
