import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project.callbacks import LookAtBatch
from project.callbacks.observe.look_at_batch import denormalize, describe_targets


def test_draws_the_first_batch_once(tiny):
    trainer = tiny.trainer([LookAtBatch(num_images=10)], tensorboard=True)
    trainer.fit(tiny.classifier(), tiny.data())
    trainer.logger.experiment.flush()
    (event,) = EventAccumulator(str(tiny.run.folder)).Reload().Images("training_batch")
    assert event.step == 0
    assert (tiny.run.folder / "training_batch.png").is_file()


def test_denormalize_gives_the_pixels_back(tiny):
    pixels = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(denormalize((pixels - 0.3) / 0.4, tiny.classifier()), pixels)


def test_titles_are_class_names_and_shares_of_mixtures():
    names = ("cat", "dog", "eel")
    assert describe_targets(torch.tensor([1, 0]), names) == ["dog", "cat"]
    mixed = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    assert describe_targets(mixed, names) == ["eel 75%\ncat 25%", "dog"]


def test_mixed_batches_are_drawn(tiny):
    class Mix(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch[1] = torch.nn.functional.one_hot(batch[1], 10).float() * 0.9 + 0.01

    tiny.trainer([Mix(), LookAtBatch()]).fit(tiny.classifier(), tiny.data())
    assert (tiny.run.folder / "training_batch.png").is_file()


def test_a_number_below_one_is_refused():
    with pytest.raises(ValueError, match="num_images is 0"):
        LookAtBatch(0)
