"""Training images for the report: which they are, and that nothing else notices."""

import base64
import io
import json

import numpy as np
import torch
from PIL import Image

from tests.helpers.toy import toy_dataset, toy_stream
from utils.report import page
from utils.run import sample_images
from utils.run.record import RunRecord, results_json


def test_a_sheet_holds_the_first_images_of_each_new_class(tmp_path):
    stream = toy_stream(init_cls=4)
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    sample_images.write(tmp_path, stream, 0)
    sample_images.write(tmp_path, stream, 1)
    assert before == (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    (first, second) = sample_images.read(tmp_path, tasks=2)
    assert (first.task, first.width, first.height) == (1, 4 * 8 + 3 * 2, 2 * 8 + 2)
    assert first.classes == tuple(stream.class_names[:4]) and second.classes == tuple(stream.class_names[4:])
    sheet = np.asarray(Image.open(tmp_path / "samples" / "task_1.png"))
    images, labels = toy_dataset().train.images, toy_dataset().train.labels
    for column, original in enumerate(stream.order[:4]):
        rows = np.flatnonzero(labels == original)[:2]
        for line, row in enumerate(rows):
            seen = sheet[line * 10 : line * 10 + 8, column * 10 : column * 10 + 8]
            assert (seen[..., :3] == images[row].permute(1, 2, 0).numpy()).all() and (seen[..., 3] == 255).all()
    assert (sheet[8:10, :, 3] == 0).all()  # the gap is transparent, so that it fits a dark page too


def test_no_test_image_is_read_and_what_is_there_stays(tmp_path, monkeypatch):
    stream = toy_stream()
    monkeypatch.setattr(stream, "test", None)
    monkeypatch.setattr(stream, "_test", None)
    sample_images.write(tmp_path, stream, 0)
    path = tmp_path / "samples" / "task_1.png"
    path.write_bytes(b"kept")
    sample_images.write(tmp_path, stream, 0)
    assert path.read_bytes() == b"kept" and sample_images.read(tmp_path, 3) == []  # a damaged one is left out


def test_large_images_and_many_classes_stay_small(tmp_path):
    noise = torch.rand(2 * sample_images.CLASSES, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    data = sample_images._png(noise, [2] * sample_images.CLASSES, ["é<b>"] * sample_images.CLASSES)
    image = Image.open(io.BytesIO(data))
    assert image.size == (8 * 48 + 7 * 2, 2 * 48 + 2) and json.loads(image.info["classes"]) == ["é<b>"] * 8
    assert len(data) < 150_000  # noise does not compress: no sheet is larger
    stream = toy_stream(toy_dataset(classes=12), init_cls=12)
    sample_images.write(tmp_path, stream, 0)
    assert len(sample_images.read(tmp_path, 1)[0].classes) == sample_images.CLASSES


def test_the_page_shows_them_with_escaped_names(tmp_path):
    sheet = sample_images.Sheet(3, "data:image/png;base64," + base64.b64encode(b"x").decode(), 10, 20, ("<b>", "c"))
    tasks = sample_images.MOST_SHOWN + 1
    results = results_json(RunRecord("sema", "digits", 7, list(range(tasks)), [[t] for t in range(tasks)]))
    html = page.page(results, {}, {}, {}, [], [sheet])
    assert "<figcaption>task 3: &lt;b&gt;, c</figcaption>" in html and 'width="10" height="20"' in html
    assert f"The first {sample_images.MOST_SHOWN} of {sample_images.MOST_SHOWN + 1} tasks" in html
    assert "Training images" in html and "Training images" not in page.page(results, {}, {}, {}, [])
