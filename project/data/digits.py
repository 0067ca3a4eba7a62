"""Handwritten digits: 1797 images of 8x8 pixels that come inside scikit-learn, so nothing is downloaded.

Optical recognition of handwritten digits, Alpaydin & Kaynak 1998, UCI Machine Learning Repository
(https://doi.org/10.24432/C50P49); scikit-learn has the test part of this set, by 13 writers. It has no split of its
own. A fifth of the images, stratified by class, is held out as test set. The seed of this split is constant, so the
test set is the same in every run. The split is by image, not by writer: the accuracy tells how well digits of known
writers are read.
"""

import torch
from torch import Tensor

from project.data.datamodule import ImageDataModule
from project.data.split import stratified_split


class Digits(ImageDataModule):
    """8x8 gray digits: 1438 images for training and validation, 359 for test.

    Example::

        data:
          class_path: project.data.Digits
          init_args:
            batch_size: 64
            augment:
              - class_path: project.data.RandomAffine
                init_args: {degrees: 10, translate: 0.08}
    """

    class_names = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    image_shape = (1, 8, 8)
    mean = (0.3049,)
    std = (0.3757,)

    test_fraction = 0.2
    test_seed = 1797

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """The images ``[N, 1, 8, 8]`` uint8 and labels ``[N]`` int64 of one part of the data set.

        Args:
            train: whether to load the training images (with validation) or the test images.
        """
        from sklearn.datasets import load_digits  # here, because its import takes a second

        digits = load_digits()
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)[:, None]  # [N, 1, 8, 8]
        labels = torch.from_numpy(digits.target).long()
        chosen = stratified_split(labels, self.test_fraction, self.test_seed)[0 if train else 1]
        return images[chosen], labels[chosen]
