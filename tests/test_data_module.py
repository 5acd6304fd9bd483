"""Batches: whole, shuffled per epoch, the same after a resume, shared out among processes."""

from types import SimpleNamespace

import pytest
import torch

from bayesdiff.checks import UserError
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.spaces import to_model_range, to_uint8


def images(count: int = 20, labels: bool = True, tests: int = 7) -> ImageData:
    """Image i holds the number i in every pixel but the last column, and has label i % 3."""

    def part(n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 4, 4)
        x[..., -1] = 255
        return x, torch.arange(n) % 3 if labels else None

    return ImageData.build("n", *part(count), *part(tests), ("a", "b", "c") if labels else ())


def trainer(
    epoch: int = 0, rank: int = 0, world: int = 1, overfit: float = 0, seen: int = 0
) -> SimpleNamespace:
    progress = SimpleNamespace(current=SimpleNamespace(ready=seen))
    return SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        current_epoch=epoch,
        global_rank=rank,
        world_size=world,
        overfit_batches=overfit,
    )


def epoch_of(module: ImageDataModule, **state: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    module.trainer = trainer(**state)
    return list(module.train_dataloader())


def numbers(batches) -> list[int]:
    return [int(n) for x, _ in batches for n in to_uint8(x)[:, 0, 0, 1]]


def test_range_and_back():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_model_range(every)
    assert (float(x.min()), float(x.max())) == (-1, 1)
    assert torch.equal(to_uint8(x), every)
    assert torch.equal(
        to_uint8(torch.tensor([-3.0, -1.0, 1.0, 9.0])).int(), torch.tensor([0, 0, 255, 255])
    )
    assert to_model_range(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_an_epoch_is_whole_batches_without_repeats():
    batches = epoch_of(ImageDataModule(images(), batch_size=6))
    assert [len(x) for x, _ in batches] == [6, 6, 6]
    seen = numbers(batches)
    assert len(set(seen)) == 18
    for x, y in batches:
        assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
        assert [int(n) % 3 for n in to_uint8(x)[:, 0, 0, 1]] == y.tolist()


def test_an_epoch_goes_on_behind_the_batches_that_were_seen():
    module = ImageDataModule(images(), 6, flip=True)
    whole, rest = epoch_of(module, epoch=2), epoch_of(module, epoch=2, seen=1)
    assert len(rest) == len(whole) - 1
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(whole[1:], rest, strict=True))


def test_the_order_depends_on_seed_and_epoch_alone():
    first, again = (numbers(epoch_of(ImageDataModule(images(), 6), epoch=3)) for _ in "ab")
    assert first == again
    assert first != numbers(epoch_of(ImageDataModule(images(), 6), epoch=4))
    assert first != numbers(epoch_of(ImageDataModule(images(), 6, seed=1), epoch=3))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert numbers(epoch_of(ImageDataModule(images(), 6), epoch=3)) == first
    assert torch.equal(torch.get_rng_state(), state)  # nor does it touch the global state


def test_every_epoch_leaves_out_other_images():
    module = ImageDataModule(images(), 6)
    missed = {frozenset(range(20)) - set(numbers(epoch_of(module, epoch=e))) for e in range(20)}
    assert len(missed) > 10


def test_one_batch_by_heart_is_the_same_batch_in_every_epoch():
    module = ImageDataModule(images(), 6)
    first, later = (numbers(epoch_of(module, epoch=e, overfit=1)) for e in (0, 7))
    assert first == later == numbers(epoch_of(module))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_batch(world):
    module = ImageDataModule(images(), batch_size=6, flip=True)
    whole = epoch_of(module, epoch=2)
    shares = [epoch_of(module, epoch=2, rank=rank, world=world) for rank in range(world)]
    for number, (x, y) in enumerate(whole):
        for rank in range(world):
            part, labels = shares[rank][number]
            assert torch.equal(part, x[rank::world]) and torch.equal(labels, y[rank::world])


def test_mirroring():
    def mirrored(batches) -> torch.Tensor:
        return torch.cat([to_uint8(x)[:, 0, 0, 0] == 255 for x, _ in batches])

    module = ImageDataModule(images(200), batch_size=50, flip=True)
    share = torch.cat([mirrored(epoch_of(module, epoch=e)) for e in range(5)]).float().mean()
    assert 0.4 < share < 0.6
    assert not mirrored(epoch_of(ImageDataModule(images(200), 50))).any()
    x, _ = epoch_of(module)[0]
    assert set(to_uint8(x)[:, 0, :, [0, -1]].flatten(1).max(1).values.tolist()) == {255}


def test_without_labels():
    module = ImageDataModule(images(labels=False), 6, flip=True)
    assert all(y is None for _, y in epoch_of(module))
    assert all(y is None for _, y in module.val_dataloader())


def test_validation_is_fixed_and_the_same_for_every_process():
    module = ImageDataModule(images(), batch_size=3)
    first, again = list(module.val_dataloader()), list(module.val_dataloader())
    assert [len(x) for x, _ in first] == [3, 3] == [len(x) for x, _ in again]
    assert numbers(first) == numbers(again)
    labels = torch.cat([y for _, y in first]).tolist()
    assert labels == [number % 3 for number in numbers(first)]  # each image kept its label
    assert numbers(first) != sorted(numbers(first))  # test images may come sorted by class
    assert len(module.val_dataloader()) == 2


def test_fewer_test_images_than_a_batch_are_one_batch():
    (batch,) = ImageDataModule(images(tests=7), batch_size=10).val_dataloader()
    assert len(batch[0]) == 7


def test_validation_reads_at_most_1024_images():
    module = ImageDataModule(images(tests=200), batch_size=16)
    module.data.__dict__["test_images"] = module.data.test_images.repeat(11, 1, 1, 1)
    module.data.__dict__["test_labels"] = module.data.test_labels.repeat(11)
    assert len(module.val_dataloader()) == 64


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", True])
def test_bad_batch_sizes(size):
    with pytest.raises(UserError, match="batch_size must be a whole number"):
        ImageDataModule(images(), batch_size=size)


def test_a_batch_larger_than_the_data():
    with pytest.raises(
        UserError, match="batch_size=21 is larger than the 20 training images of n"
    ):
        ImageDataModule(images(), batch_size=21)


def test_a_batch_that_processes_cannot_share():
    module = ImageDataModule(images(), batch_size=6)
    with pytest.raises(UserError, match="6 cannot be shared by 4 processes; choose a multiple"):
        epoch_of(module, world=4)
