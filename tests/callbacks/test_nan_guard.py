import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from project.callbacks import StopOnNaN


class Break(Callback):
    """Makes one batch's images NaN or infinite."""

    def __init__(self, epoch, batch, value=float("nan")):
        self.at, self.value = (epoch, batch), value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            batch[0].mul_(self.value)


@pytest.mark.parametrize("every_n_steps", [1, 4, 50])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (0, 5), (1, 2)])
def test_names_the_first_bad_step(tiny, every_n_steps, epoch, batch):
    trainer = tiny.trainer([Break(epoch, batch), StopOnNaN(every_n_steps)])
    message = rf"the loss is nan at step {epoch * 6 + batch} \(epoch {epoch}, batch {batch}\) with learning rate 0.05"
    with pytest.raises(ValueError, match=message):
        trainer.fit(tiny.classifier(), tiny.data())
    late = every_n_steps - 1 if every_n_steps < 6 else 6
    assert trainer.global_step <= epoch * 6 + batch + 1 + late


def test_names_the_rate_of_that_step_not_of_the_next(tiny):
    from project.learning.schedules import Cosine

    rates = []

    class Rate(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    with pytest.raises(ValueError) as caught:
        model = tiny.classifier(schedule=Cosine())
        tiny.trainer([Break(0, 3), StopOnNaN(), Rate()]).fit(model, tiny.data())
    assert rates[3] != rates[4]
    assert f"learning rate {rates[3]:.3g}:" in str(caught.value)


def test_no_checkpoint_of_a_broken_net_is_written(tiny, tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1, save_last=True
    )
    with pytest.raises(ValueError, match="the loss is"):
        trainer = tiny.trainer([StopOnNaN(), Break(0, 4), checkpoint], enable_checkpointing=True)
        trainer.fit(tiny.classifier(), tiny.data())
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(weight.isfinite().all() for weight in weights), path


def test_a_sound_run_is_left_alone(tiny):
    trainer = tiny.trainer([StopOnNaN(4)])
    trainer.fit(tiny.classifier(), tiny.data())
    assert trainer.global_step == 12


def test_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        StopOnNaN(0)
