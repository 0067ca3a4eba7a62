"""Image files of any size and mode become one shape; a bad file is named."""

import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from project.data import ImageFiles, RandomResizedCrop, decode_image, find_images
from project.data.image_files import CorruptImageError
from project.data.random_resized_crop import centre_box


def write_image(path: Path, size: tuple[int, int] = (20, 30), mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_find_images(tmp_path: Path) -> None:
    written = [write_image(tmp_path / name) for name in ("b/2.png", "a.JPG", "b/1.bmp")]
    (tmp_path / "notes.txt").write_text("none")
    assert find_images(tmp_path) == sorted(written)
    assert find_images(str(written[0])) == [written[0]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        find_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12), (3, 50, 50)], ids=str)
def test_every_mode_and_size_becomes_one_shape(tmp_path: Path, mode: str, shape: tuple[int, int, int]) -> None:
    path = write_image(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), mode=mode)
    image = decode_image(path, shape)
    assert image.shape == shape and image.dtype == torch.uint8 and image.is_contiguous()


def test_same_size_is_exact(tmp_path: Path) -> None:
    path = write_image(tmp_path / "x.png", (7, 5))
    assert np.array_equal(decode_image(path, (3, 5, 7)).permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_centre_is_kept_and_proportions_too(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (decode_image(tmp_path / "wide.png", (1, 10, 10)) == 255).all()
    assert centre_box((30, 10), (20, 10)) == (5, 0, 25, 10) and centre_box((10, 40), (5, 5)) == (0, 15, 10, 25)


@pytest.mark.parametrize("target", [(8, 8), (28, 28), (32, 32), (224, 224), (299, 299), (224, 160)], ids=str)
def test_the_centre_lies_within_images_of_every_size(target: tuple[int, int]) -> None:
    for side in range(1, 1000):
        for size in ((side, side), (side, 2 * side), (side + 1, side)):
            left, top, right, bottom = centre_box(size, target)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1], (size, target)


def test_photos_of_450_pixels_are_decoded(tmp_path: Path) -> None:
    assert decode_image(write_image(tmp_path / "x.png", (600, 450)), (3, 224, 224)).shape == (3, 224, 224)


def test_sixteen_bits_keep_the_upper_eight(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 200 * 256 + 7, dtype=np.uint16)).save(tmp_path / "x.png")
    assert decode_image(tmp_path / "x.png", (1, 4, 4)).unique().tolist() == [200]


def test_rotated_as_the_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8), dtype=np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert decode_image(tmp_path / "x.png", (1, 8, 4))[0, :4].min() == 255


def test_transparent_palette_gives_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4))
    image.save(tmp_path / "x.png", transparency=b"\x00\x80")
    assert decode_image(tmp_path / "x.png", (3, 4, 4)).shape == (3, 4, 4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)], ids=str)
def test_bad_files_are_named(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    path = write_image(tmp_path / "cut.png", (64, 64))
    path.write_bytes(path.read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.png", "text.png", "empty.jpg"):
        with pytest.raises(ValueError, match=f"{name} is truncated or no image") as error:
            decode_image(tmp_path / name, shape)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"none.png does not exist"):
        decode_image(tmp_path / "none.png", shape)
    with pytest.raises(ValueError, match=r"1 \(gray\) or 3 \(RGB\) channels"):
        decode_image(path, (2, 8, 8))


def test_a_workers_exception_is_one_sentence_again() -> None:
    text = "Caught CorruptImageError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\n"
    text += "project.data.image_files.CorruptImageError: a.png is truncated"
    assert str(CorruptImageError(text)) == "a.png is truncated"


def test_data_set_decodes_batches_and_skips_what_it_cannot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_image(tmp_path / f"{k}.png", (10 + k, 20), seed=k) for k in range(4)]
    paths[1].write_text("no image")
    files = ImageFiles(paths, (3, 8, 8), on_corrupt="skip")
    images, labels, indices = files.__getitems__([3, 1, 0])
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [-1, -1] and indices.tolist() == [3, 0]
    assert "1.png" in caplog.text
    assert torch.equal(images[1], decode_image(paths[0], (3, 8, 8)))
    assert files.__getitems__([1])[0].shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match=r"1.png is truncated or no image"):
        ImageFiles(paths, (3, 8, 8)).__getitems__([0, 1])


def test_random_crops_depend_on_seed_epoch_and_file_alone(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / f"{k}.png", (40, 50), seed=0) for k in range(4)]
    files = ImageFiles(paths, (3, 8, 8), random_crop=RandomResizedCrop((0.1, 0.5)))
    images = files.__getitems__([0, 1, 2, 3])[0]
    assert len(images.flatten(1).unique(dim=0)) == 4
    assert torch.equal(files.subset(torch.tensor([2])).__getitems__([0])[0][0], images[2])
    files.set_epoch(1)
    assert not torch.equal(files.__getitems__([0, 1, 2, 3])[0], images)
    files.set_epoch(0)
    assert torch.equal(files.__getitems__([0, 1, 2, 3])[0], images)


def test_random_crop_has_the_stated_areas_and_proportions() -> None:
    from project.data import BatchRandom

    crops = list(RandomResizedCrop((0.1, 0.6), (0.5, 2.0)).draw(BatchRandom(0, 0, torch.arange(500))))
    for left, top, right, bottom in (box for crop in crops if (box := crop.box((200, 100)))):
        assert 0 <= left < right <= 200 and 0 <= top < bottom <= 100
        assert 0.09 < (right - left) * (bottom - top) / 20000 < 0.61
        assert 0.48 < (right - left) / (bottom - top) < 2.1
    assert RandomResizedCrop().box((10, 10)) is None
    with pytest.raises(ValueError, match="random_crop is"):
        RandomResizedCrop((0.5, 1.5))


@pytest.mark.parametrize(
    ("suffix", "package", "register"),
    [("heic", "pillow_heif", "register_heif_opener"), ("jxl", "pillow_jxl", None)],
)
def test_formats_with_a_plugin_name_it_or_use_it(
    suffix: str, package: str, register: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x.{suffix}"
    write_image(tmp_path / "x.png", (8, 8)).rename(path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"x\.{suffix} .*{package}"):
        decode_image(path, (3, 8, 8))
    calls: list[str] = []
    plugin = SimpleNamespace(**({register: lambda: calls.append(register)} if register else {}))
    monkeypatch.setitem(sys.modules, package, plugin)
    assert decode_image(path, (3, 8, 8)).shape == (3, 8, 8)
    assert calls == ([register] if register else [])


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 1, 3)], ids=str)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_is_laid_on_gray(mode: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """A white pixel is transparent; of two black ones, the second is transparent to four fifths if it can be."""
    path = tmp_path / "x.png"
    if mode in ("RGBA", "LA"):
        pixels = np.zeros((1, 3, len(mode)), dtype=np.uint8)
        pixels[0, 0], pixels[0, :, -1] = 255, (0, 255, 51)
        Image.fromarray(pixels).save(path)
        expected = [128, 0, 102]
    else:
        image = Image.new(mode, (3, 1))
        if mode == "P":
            image.putpalette([gray for gray in range(256) for _ in "RGB"])
        image.putpixel((0, 0), 255)
        image.save(path, transparency=255)
        expected = [128, 0, 0]
    assert decode_image(path, shape).flatten(1).tolist() == [expected] * shape[0]


def test_an_opaque_alpha_channel_changes_no_bit(tmp_path: Path) -> None:
    path = write_image(tmp_path / "x.png", (16, 16))
    Image.open(path).convert("RGBA").save(tmp_path / "y.png")
    assert torch.equal(decode_image(path, (3, 16, 16)), decode_image(tmp_path / "y.png", (3, 16, 16)))


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([0, 16, 2048, 4095], np.uint16), [0, 1, 128, 255]),
        (np.array([0, 3, 128, 255], np.uint16), [0, 3, 128, 255]),
        (np.array([0, 256, 32768, 65535], np.uint16), [0, 1, 128, 255]),
        (np.array([0, 5, 100, 255], np.int32), [0, 5, 100, 255]),
        (np.array([0, 50000, 100000], np.int32), [0, 127, 255]),
        (np.array([-100, 0, 100], np.int32), [0, 127, 255]),
        (np.array([0, 0.25, 0.5, 1], np.float32), [0, 63, 127, 255]),
        (np.array([0, 64, 255], np.float32), [0, 64, 255]),
        (np.array([0, 25700, 65535], np.float32), [0, 100, 255]),
        (np.array([-1, 0, 1], np.float32), [0, 127, 255]),
        (np.array([7e5, 7e5], np.float32), [0, 0]),
    ],
)
def test_deep_pixels_are_scaled(pixels: np.ndarray, expected: list[int], tmp_path: Path) -> None:
    for suffix in ("tif", "png") if pixels.dtype == np.uint16 else ("tif",):
        Image.fromarray(pixels[None]).save(tmp_path / f"x.{suffix}")
        decoded = decode_image(tmp_path / f"x.{suffix}", (3, 1, len(pixels)))
        assert decoded[:, 0].tolist() == [expected] * 3


def test_a_dark_image_stays_dark_where_the_file_declares_white(tmp_path: Path) -> None:
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 1000\n" + np.array([0, 50], ">u2").tobytes())
    assert decode_image(tmp_path / "x.pgm", (1, 1, 2)).flatten().tolist() == [0, 12]
    (tmp_path / "y.pgm").write_bytes(b"P5 2 1 4095\n" + np.array([2048, 4095], ">u2").tobytes())
    assert decode_image(tmp_path / "y.pgm", (1, 1, 2)).flatten().tolist() == [128, 255]


def test_pixels_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    for name, value in (("nan.tif", np.nan), ("inf.tif", np.inf)):
        Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / name)
        with pytest.raises(CorruptImageError, match=rf"{name} .*pixels that are not finite"):
            decode_image(tmp_path / name, (1, 1, 2))


def png_of(width: int, height: int) -> bytes:
    """The beginning of a PNG file of any size."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    parts = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(png_of(12_000, 12_000), "12000 x 12000 pixels", id="a bomb that Pillow only warns of"),
        pytest.param(png_of(2**31 - 1, 2**31 - 1), "no image", id="a larger one"),
        pytest.param(b"P6 50000 50000 255 ", "no image", id="PPM"),
        pytest.param(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>', "no image", id="SVG"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", "EPS", id="EPS"),
        pytest.param(b"", "no image", id="empty"),
    ],
)
def test_files_that_want_to_do_harm_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(CorruptImageError, match=words) as error:
        decode_image(path, (3, 8, 8))
    assert "x.png is truncated or no image" in str(error.value) and "\n" not in str(error.value)


def test_a_loop_of_links_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "folder").symlink_to(tmp_path)
    good = write_image(tmp_path / "c.png")
    assert find_images(tmp_path) == [tmp_path / "a.png", tmp_path / "b.png", good]  # decoding names the broken ones
    with pytest.raises(ValueError, match=r"a\.png"):
        decode_image(tmp_path / "a.png", (3, 8, 8))
    with pytest.raises(ValueError, match=r"a\.png does not exist"):
        find_images(tmp_path / "a.png")
