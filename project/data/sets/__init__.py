"""Published data sets that are downloaded: MNIST, Fashion-MNIST, KMNIST, CIFAR-10 and CIFAR-100."""
