"""utils/data/images.py: every kind of image file becomes the right RGB pixels, or is refused with its path."""

import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from utils.data import formats
from utils.data.images import ImageArray, ImageFiles, decode
from utils.data.listing import IMAGE_SUFFIXES

RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]


def pixels(path):
    """[H, W, 3] as nested lists."""
    image = decode(path)
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.is_contiguous()
    return image.permute(1, 2, 0).tolist()


def save(path, image, **options):
    image.save(path, **options)
    return path


def test_rgb_keeps_channel_and_axis_order(tmp_path):
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 0), (255, 0, 0))
    image.putpixel((0, 1), (0, 0, 255))
    black = [0, 0, 0]
    assert pixels(save(tmp_path / "a.png", image)) == [[black, black, RED], [BLUE, black, black]]


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 7, "png", [7, 7, 7]),
        ("1", 1, "png", WHITE),
        ("CMYK", (0, 255, 255, 0), "tif", RED),
        ("LA", (10, 255), "png", [10, 10, 10]),
        ("LA", (10, 0), "png", WHITE),
        ("RGBA", (0, 255, 0, 255), "png", GREEN),
        ("RGBA", (0, 0, 0, 0), "png", WHITE),
        ("I;16", 65535, "png", WHITE),
        ("I;16", 32768, "tif", [128, 128, 128]),
        ("I;16", 385, "png", [1, 1, 1]),  # 385 / 257 = 1.498
        ("I;16", 386, "png", [2, 2, 2]),  # 386 / 257 = 1.502
        ("I;16B", 0x0101, "tif", [1, 1, 1]),
        ("I", 65535, "tif", WHITE),
    ],
)
def test_modes(tmp_path, mode, colour, suffix, expected):
    assert pixels(save(tmp_path / f"a.{suffix}", Image.new(mode, (1, 1), colour))) == [[expected]]


def test_cmyk_jpeg(tmp_path):
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert np.abs(np.array(pixels(path)) - RED).max() <= 3


def test_16_bit_pgm(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 0, 65535))
    assert pixels(path) == [[[0, 0, 0], WHITE]]


def test_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    path = save(tmp_path / "a.png", image, transparency=0)
    assert pixels(path) == [[WHITE, BLUE]]


def test_rgb_with_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (2, 1), (255, 0, 0))
    image.putpixel((0, 0), (0, 0, 0))
    assert pixels(save(tmp_path / "a.png", image, transparency=(0, 0, 0))) == [[WHITE, RED]]


def test_exif_rotation_is_applied(tmp_path):
    """Orientation 6: the camera was held so that the stored picture must turn a quarter clockwise."""
    image = Image.new("RGB", (2, 1), (0, 0, 255))
    image.putpixel((0, 0), (255, 0, 0))  # left, hence on top once upright
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(save(tmp_path / "a.png", image, exif=exif)) == [[RED], [BLUE]]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert pixels(save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]))[0][0] == RED


def broken_files(folder):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "tif"):
        whole = save(folder / f"whole.{suffix}", Image.fromarray(noise)).read_bytes()
        yield f"truncated.{suffix}", whole[: len(whole) // 2]
        yield f"header.{suffix}", whole[:20]
    huge = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge))
    yield "bomb.png", b"\x89PNG\r\n\x1a\n" + chunk
    yield "empty.png", b""
    yield "text.jpg", b"no image at all"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_files_are_refused_with_their_path(tmp_path):
    for name, content in broken_files(tmp_path):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a readable image .+; replace or remove the file") as caught:
            decode(path)
        assert str(path) in str(caught.value), name


def test_values_without_a_range_are_refused(tmp_path):
    for mode, value in (("F", 0.5), ("I", 70000), ("I", -1)):
        path = save(tmp_path / f"{mode}{value}.tif", Image.new(mode, (1, 1), value))
        with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
            decode(path)


def test_vanished_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: the image is gone"):
        decode(tmp_path / "gone.png")


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        decode(tmp_path)


def test_sets_agree(tmp_path):
    values = np.random.RandomState(0).randint(0, 256, (3, 3, 5, 4), dtype=np.uint8)
    paths = [save(tmp_path / f"{k}.png", Image.fromarray(v.transpose(1, 2, 0))) for k, v in enumerate(values)]
    memory, disk = ImageArray(values, [2, 0, 1]), ImageFiles(paths, [2, 0, 1])
    assert len(memory) == len(disk) == 3
    assert memory.labels.dtype == disk.labels.dtype == np.int64
    assert all(torch.equal(memory.image(k), disk.image(k)) for k in range(3))


# ---------------------------------------------------------------- what is not read


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", r"PostScript \(EPS\)"),
        (b"\n <!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        (b"\0\0\0\x1cftypheic\0\0\0\0", r"HEIC or video \(heic\)"),
        (b"%PDF-1.4", "PDF"),
        (b"\0" * 99, "zero bytes"),
        (b"hello", "unknown"),
    ],
)
def test_other_content_is_named_and_no_program_started(content, what, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # what Pillow starts Ghostscript with
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (lambda: decode(path), lambda: decode(path, content)):
        with pytest.raises(ValueError, match=rf"a\.png: .+its content is {what}.*, read are PNG, JPEG") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jp2", "tga", "ico", "webp", "tiff", "pnm", "avif"])
def test_formats_beside_the_usual_ones(suffix, tmp_path):
    if suffix == "avif" and "AVIF" not in formats.known():
        pytest.skip("this Pillow reads no AVIF")
    assert f".{suffix}" in IMAGE_SUFFIXES
    form = {"jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000", "pnm": "PPM"}.get(suffix, suffix.upper())
    path = save(tmp_path / f"a.{suffix}", Image.new("RGB", (16, 16), (255, 0, 0)), format=form)
    assert np.abs(np.array(pixels(path)) - RED).max() <= 8
    if suffix == "tga":  # it has no signature: any bytes might be one
        with pytest.raises(ValueError, match="unknown"):
            decode(path.rename(tmp_path / "a.png"))


def test_too_many_pixels_are_refused_by_the_header(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.new("L", (40, 30)))
    monkeypatch.setattr(formats, "MOST_PIXELS", 1199)
    with pytest.raises(ValueError, match=r"a\.png: .+40 x 30 pixels are more than"):
        decode(path)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_grey_of_fewer_bits_in_16_bit_files(bits, tmp_path):
    most = 2**bits - 1
    image = Image.new("I;16", (2, 1), most)
    image.putpixel((0, 0), round(most / 3))
    path = save(tmp_path / "a.png", image)
    assert decode(path, grey_bits=bits)[0].tolist() == [[85, 255]]
    if bits < 16:
        image.putpixel((0, 0), most + 1)
        with pytest.raises(ValueError, match=f"grey value {most + 1} is above {most}, the most that grey_bits {bits}"):
            decode(save(path, image), grey_bits=bits)


def test_a_name_that_is_not_utf_8_is_readable_in_the_refusal(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"caf\\xe9\.png: the image is gone"):
        decode(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
