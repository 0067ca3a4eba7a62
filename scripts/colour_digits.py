"""Writes scikit-learn's digits as a folder of colour images of 32x32 pixels, one folder for each class.

It is a small data set for nets that take colour images, without a download: 1,797 images.

    python scripts/colour_digits.py
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from project.frame.paths import Paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Paths().data / "colour_digits", help="made if missing")
    folder = parser.parse_args().folder
    digits = load_digits()
    for number, (digit, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        small = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
        gray = np.asarray(small.resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
        colours = np.stack([gray, 255 - 0.5 * gray, 20 + 0.7 * gray], axis=-1)  # the three channels differ
        path = folder / f"digit {label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours.clip(0, 255).astype(np.uint8)).save(path)
    print(f"{len(digits.images)} images in {folder}")  # noqa: T201


if __name__ == "__main__":
    main()
