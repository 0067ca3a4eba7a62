"""Classic nets of papers: GoogLeNet, Inception v3, LeNet-300-100 and LeNet-5."""

from project.models.zoo import googlenet, inception_v3, lenet  # so that the command line finds the nets by their names

__all__ = ["googlenet", "inception_v3", "lenet"]
