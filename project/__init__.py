"""Train, shrink, measure and deploy image classifiers with PyTorch Lightning."""

__version__ = "0.1.0"
