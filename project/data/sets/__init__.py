"""Published data sets that are downloaded: MNIST, Fashion-MNIST, KMNIST, CIFAR-10 and CIFAR-100."""

from project.data.sets import cifar, mnist  # so that the command line finds the data sets by their names

__all__ = ["cifar", "mnist"]
