import logging
import sys

import pytest
import torch

from project.callbacks.observe.plots import plot_curves, plot_images, read_curves
from project.frame.plots import (
    figure_to_image,
)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_images", [1, 5, 16])
def test_every_image_is_drawn_with_its_title(channels, num_images):
    images = torch.linspace(0, 1, num_images * channels * 64).view(num_images, channels, 8, 8)
    titles = [f"image {index}" for index in range(num_images)]
    axes = plot_images(images, titles, columns=4).axes
    assert [axis.get_title() for axis in axes if axis.images] == titles
    drawn = torch.as_tensor(axes[0].images[0].get_array())
    wanted = (images[0] * 255).round().to(torch.uint8).movedim(0, -1)
    assert torch.equal(drawn, wanted[..., 0] if channels == 1 else wanted)


def test_bytes_and_floats_give_the_same_picture():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) * 4
    assert (figure_to_image(plot_images(images)) == figure_to_image(plot_images(images / 255))).all()


def test_picture_is_what_tensorboard_takes():
    image = figure_to_image(plot_images(torch.zeros(2, 1, 8, 8)))
    assert image.dtype == "uint8" and image.shape[2] == 3 and image.min() == 0 and image.max() == 255


def test_curves_of_a_metrics_file(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,train/loss,val/loss,test/loss,probe/loss\n0,9,,0.9,,2\n0,9,1.0,,\n1,19,,0.7,\n1,19,0.5,,\n2,20,,,0.6\n"
    )
    assert read_curves(path) == {"val/loss": ([0, 1], [0.9, 0.7]), "train/loss": ([0, 1], [1.0, 0.5])}
    (panel,) = plot_curves(path).axes
    assert panel.get_title() == "loss" and {line.get_label() for line in panel.lines} == {"train", "val"}


def test_curves_of_nothing_are_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step\n")
    with pytest.raises(ValueError, match=r"holds no curve such as train/loss"):
        plot_curves(path)


def test_no_global_state_of_pyplot_is_touched():
    plot_images(torch.zeros(1, 1, 8, 8))
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_characters_take_a_font_that_has_them(caplog, monkeypatch):
    """The character is in STIX alone, which comes with matplotlib. Warnings of missing glyphs would be errors here."""
    monkeypatch.setattr(logging.getLogger("project"), "propagate", True)
    images = torch.zeros(1, 1, 8, 8)
    pictures = [figure_to_image(plot_images(images, [title])) for title in ("\u1d8d", "\u1d84", "a")]
    assert not caplog.messages
    assert (pictures[0] != pictures[1]).any()


def test_characters_without_a_font_are_told_once_for_a_picture(caplog, monkeypatch):
    from matplotlib import font_manager

    monkeypatch.setattr(logging.getLogger("project"), "propagate", True)
    dejavu = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", dejavu)
    figure_to_image(plot_images(torch.zeros(1, 1, 8, 8), ["\u732b \u72ac"]))
    assert caplog.messages == ["No font has all characters of a picture: install one, such as Debian's fonts-noto-cjk."]
