"""A recipe describes the test transform of a kind: it goes through JSON, and `read` makes from a file what it says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from utils.data import new_images, recipe, transforms


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_a_recipe_comes_back_from_json_and_gives_the_test_transform(kind):
    how = recipe.of(kind, 48, 12)
    again = recipe.of_plain(json.loads(json.dumps(how.plain())))
    assert again == how and again.grey_bits == 12
    images = torch.randint(0, 256, (2, 3, 40, 60), dtype=torch.uint8)
    seeds = np.zeros(2, dtype=np.uint64)
    assert torch.equal(transforms.follow(again)(images, seeds), transforms.build(kind, 48)[1](images, seeds))


def test_files_of_different_sizes_are_read_as_the_recipe_says(tmp_path):
    paths = [tmp_path / "wide.png", tmp_path / "deep.png"]
    pixels = np.random.default_rng(0).integers(0, 256, (30, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(paths[0])
    Image.fromarray(np.full((40, 40), 1023, dtype=np.uint16)).save(paths[1])
    small, imagenet = (new_images.read(paths, recipe.of(kind, 32, 10)) for kind in ("small", "imagenet"))
    assert small.shape == imagenet.shape == (2, 3, 32, 32)
    assert min(small[1].min(), imagenet[1].min()) > 0.9999  # 10 bits: 1023 is white
    wide = torch.from_numpy(pixels).permute(2, 0, 1)
    squeezed = torch.nn.functional.interpolate(wide[None] / 255, size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(small[0], squeezed[0])
    shorter = v2.functional.resize(wide, [36, 84], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(imagenet[0], shorter[:, 2:34, 26:58] / 255)
    assert new_images.read([], recipe.of("small", 32)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": "32"},
        {"crop": True},
        {"resize": "longer"},
        {"interpolation": None},
        {"more": 1},
        {"size": None},
    ],
)
def test_other_recipes_are_refused(change):
    with pytest.raises(ValueError, match="the recipe of the input has"):
        recipe.of_plain(recipe.of("imagenet", 224).plain() | change)
    with pytest.raises(ValueError, match="no test transform combines these steps"):
        transforms.follow(recipe.of_plain(recipe.of("small", 32).plain() | {"crop": 16}))


def test_broken_images_are_left_out_and_counted_where_that_is_asked_for(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 5000, dtype=np.uint16)).save(tmp_path / "bright.png")
    (tmp_path / "b.jpg").write_text("no")
    found = new_images.find([tmp_path, tmp_path / "a.png"], grey_bits=12, skip_broken=True)
    assert found.files == [str(tmp_path / "a.png")] and found.notes[0].startswith("2 images left out: ")
    assert "bright.png" in found.notes[0] and "is above 4095" in found.notes[0]
    with pytest.raises(ValueError, match="no image to predict; 1 file skipped"):
        (tmp_path / "x.txt").touch()
        new_images.find([tmp_path / "x.txt"])
