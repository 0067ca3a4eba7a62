"""Whole batches from one tensor; the order is a pure function of (seed, epoch), on one process and on many."""

import itertools
import pickle

import torch
from torch.utils.data import DataLoader, RandomSampler

from project.data import ArrayDataset, EpochSampler, pass_through
from project.data.array_dataset import PartSampler


def dataset(num: int = 100) -> ArrayDataset:
    images = torch.arange(num, dtype=torch.uint8).view(-1, 1, 1, 1).expand(num, 1, 4, 4).contiguous()
    return ArrayDataset(images, torch.arange(num) % 10)


def order(num: int = 100, **kwargs: int) -> list[int]:
    return list(EpochSampler(dataset(num), **kwargs))


def test_batches_and_subsets_keep_the_number_of_the_image() -> None:
    part = dataset().subset(torch.tensor([30, 10, 20])).subset(torch.tensor([2, 0]))
    images, labels, indices = part.__getitems__([0, 1])
    assert indices.tolist() == [20, 30] and images[:, 0, 0, 0].tolist() == [20, 30] and labels.tolist() == [0, 0]
    assert len(part) == 2 and part.labels.tolist() == [0, 0]
    assert part[1][0].shape == (1, 1, 4, 4) and images.dtype == torch.uint8
    assert part.images is part.subset(torch.tensor([0])).images


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert sorted(order()) == list(range(100))
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert len({tuple(order(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}) == 9
    sampler = EpochSampler(dataset(), 5)
    list(sampler)
    sampler.set_epoch(7)
    assert list(sampler) == order(seed=5, epoch=7)


def test_processes_share_one_order() -> None:
    whole = order(101, seed=3)
    parts = [order(101, seed=3, num_replicas=4, rank=rank) for rank in range(4)]
    assert [len(part) for part in parts] == [25] * 4
    assert [parts[k % 4][k // 4] for k in range(100)] == whole[:100]


def test_processes_measure_each_image_once() -> None:
    parts = [list(PartSampler(dataset(101), num_replicas=4, rank=rank)) for rank in range(4)]
    assert [len(part) for part in parts] == [26, 25, 25, 25] and sorted(itertools.chain(*parts)) == list(range(101))
    assert [len(PartSampler(dataset(101), num_replicas=4, rank=rank)) for rank in range(4)] == [26, 25, 25, 25]


def test_loader_reads_whole_batches_with_and_without_workers() -> None:
    for num_workers in (0, 1):
        data = dataset()
        loader = DataLoader(
            data, 32, sampler=EpochSampler(data, 1, 2), collate_fn=pass_through, num_workers=num_workers, drop_last=True
        )
        batches = list(loader)
        assert len(batches) == 3 and all(images.shape == (32, 1, 4, 4) for images, _, _ in batches)
        assert torch.cat([indices for _, _, indices in batches]).tolist() == order(seed=1, epoch=2)[:96]


def test_pass_through_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(pass_through)) is pass_through


def test_shuffling_differs_from_a_random_sampler_only_in_its_source() -> None:
    assert sorted(order()) == sorted(RandomSampler(range(100)))
