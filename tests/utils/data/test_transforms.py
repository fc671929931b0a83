"""utils/data/transforms.py: ranges and sizes, agreement with torchvision, and draws that depend on the sample alone."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from utils.data import recipe, transforms

KINDS = [(kind, size) for kind in recipe.KINDS for size in (32, 48)]


def noise(count, height=32, width=32):
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (count, 3, height, width), dtype=np.uint8))


def seeds(count, base=5):
    return transforms.sample_seeds(base, np.arange(count))


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_output_is_float_in_the_unit_range(kind, size):
    for transform in transforms.build(kind, size):
        result = transform(noise(4), seeds(4))
        assert result.dtype == torch.float32 and result.shape == (4, 3, size, size)
        assert result.min() >= 0 and 0.5 < result.max() <= 1


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_a_sample_does_not_depend_on_its_batch(kind, size):
    images = noise(7)
    for transform in transforms.build(kind, size):
        together = transform(images, seeds(7))
        alone = torch.cat([transform(images[k : k + 1], seeds(7)[k : k + 1]) for k in range(7)])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_training_draws_differ_by_seed_and_tests_do_not(kind):
    same = noise(1).expand(6, -1, -1, -1)
    train, test = transforms.build(kind, 32)
    assert len({tuple(image.flatten().tolist()) for image in train(same, seeds(6))}) == 6
    assert all(torch.equal(image, test(same, seeds(6, base=9))[0]) for image in test(same, seeds(6)))


@pytest.mark.parametrize("kind", recipe.KINDS)
def test_global_generators_are_left_alone(kind):
    torch.manual_seed(3)
    np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    transforms.build(kind, 32)[0](noise(3), seeds(3))
    assert torch.equal(before, torch.get_rng_state())
    assert (np.random.get_state()[1] == numpy_before).all()


def test_generator_is_put_back_after_an_error():
    def fail(image):
        raise RuntimeError("broken")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        transforms.PerSample(fail)(noise(1), seeds(1))
    assert torch.equal(before, torch.get_rng_state())


def test_small_and_cifar_test_images_are_untouched():
    images = noise(2)
    for kind in ("small", "cifar"):
        assert torch.equal(transforms.build(kind, 32)[1](images, seeds(2)), images.float() / 255)


def test_cifar_is_the_stock_recipe():
    """Torchvision's transforms under the sample's own seed, to the last bit of the division by 255."""
    stock = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.ColorJitter(brightness=63 / 255)])
    ours = transforms.build("cifar", 32)[0](noise(5), seeds(5))
    for image, seed, result in zip(noise(5), seeds(5), ours, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed) >> 1)
            assert torch.allclose(stock(image).float() / 255, result, rtol=0, atol=1e-7)


def test_imagenet_test_cuts_the_centre_of_the_enlarged_image():
    image = torch.zeros(3, 320, 640, dtype=torch.uint8)
    image[:, :, 320:] = 255
    result = transforms.build("imagenet", 224)[1]([image], seeds(1))[0]
    assert result.shape == (3, 224, 224)
    assert (result[:, :, :108] == 0).all() and (result[:, :, 116:] == 1).all()


def test_a_strip_is_cut_before_it_is_enlarged_and_the_middle_stays(monkeypatch):
    strip = torch.zeros(3, 4, 400, dtype=torch.uint8)
    strip[..., 200:] = 255
    test = transforms.build("imagenet", 56)[1]
    result = test([strip], seeds(1))[0]
    monkeypatch.setattr(recipe, "LONGEST", 1000)
    test = transforms.build("imagenet", 56)[1]
    assert torch.equal(result, test([strip], seeds(1))[0])
    monkeypatch.undo()
    assert transforms._middle(torch.zeros(3, 20_000, 1), 16).shape == (3, 16, 1)
    assert transforms._middle(torch.zeros(3, 16, 1), 16).shape == (3, 16, 1)
    assert transforms.build("imagenet", 56)[0]([torch.zeros(3, 1, 20_000, dtype=torch.uint8)], seeds(1)).shape[-1] == 56


def test_imagenet_test_is_close_to_pillow():
    from PIL import Image

    smooth = v2.functional.resize(noise(1, 8, 8)[0], [75, 100], antialias=True)
    pillow = v2.functional.to_pil_image(smooth).resize((85, 64), Image.Resampling.BICUBIC)
    expected = v2.functional.center_crop(v2.functional.pil_to_tensor(pillow), [56, 56]).float() / 255
    result = transforms.build("imagenet", 56)[1]([smooth], seeds(1))[0]
    assert (result - expected).abs().max() <= 1.01 / 255


def test_affine_without_a_move_is_the_identity():
    grid = transforms._affine_grid(np.zeros((1, 4)), 32, 32)
    image = noise(1).float() / 255
    moved = torch.nn.functional.grid_sample(image, grid, align_corners=False)
    assert torch.allclose(moved, image, atol=1e-5)


def test_affine_moves_the_way_it_says():
    """Full shift: 2 pixels right and down. Full scale: 1.1 times. Full turn: 10 degrees, clockwise on the screen."""
    point = torch.zeros(1, 1, 32, 32)
    point[0, 0, 10, 20] = 1

    def centre(*draw):
        moved = torch.nn.functional.grid_sample(
            point, transforms._affine_grid(np.array([draw], dtype=float), 32, 32), align_corners=False
        )[0, 0]
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        return float((moved * x).sum() / moved.sum()), float((moved * y).sum() / moved.sum())

    assert centre(0, 0, 1, 1) == pytest.approx((22, 12), abs=1e-4)
    assert centre(0, 1, 0, 0) == pytest.approx((15.5 + 4.5 * 1.1, 15.5 - 5.5 * 1.1), abs=0.1)
    cos, sin = np.cos(np.radians(10)), np.sin(np.radians(10))
    assert centre(1, 0, 0, 0) == pytest.approx((15.5 + cos * 4.5 + sin * 5.5, 15.5 + sin * 4.5 - cos * 5.5), abs=0.1)


def test_uniforms_are_fixed_and_uniform():
    values = transforms.uniforms(transforms.sample_seeds(1993, np.arange(20_000)), 4)
    assert values.shape == (20_000, 4) and values.min() >= 0 and values.max() < 1
    assert np.abs(values.mean(0) - 0.5).max() < 0.01 and np.abs(values.std(0) - 12**-0.5).max() < 0.01
    assert np.abs(np.corrcoef(values.T) - np.eye(4)).max() < 0.03
    # splitmix64 from state 0, as in its authors' reference program
    first = transforms._mix(np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    assert first.tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_seeds_of_rows_and_bases_differ():
    both = np.concatenate([transforms.sample_seeds(base, np.arange(1000)) for base in (0, 1, 2**63 - 1)])
    assert len(np.unique(both)) == 3000


def test_unknown_kind():
    with pytest.raises(ValueError, match="'large' are not known; known are small, cifar, imagenet"):
        transforms.build("large", 32)
