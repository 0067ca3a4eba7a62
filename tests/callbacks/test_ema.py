import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from project.callbacks import EMA
from project.models import Classifier


class Watch(Callback):
    """Keeps the raw weights after every step and the weights that validation saw."""

    def __init__(self):
        self.raw, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.raw.append(state(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.append(state(pl_module))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def reference(raw, decay, warmup):
    """The module's formula, one tensor at a time, in double precision."""
    average = {name: value.double() for name, value in raw[0].items() if value.is_floating_point()}
    for t, weights in enumerate(raw[1:], 1):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        average = {name: d * value + (1 - d) * weights[name] for name, value in average.items()}
    return average


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("start_step", [0, 5])
def test_validation_and_the_end_see_the_formula(tiny, warmup, start_step):
    watch, model = Watch(), tiny.classifier()
    tiny.trainer([EMA(0.8, warmup, start_step), watch], num_sanity_val_steps=0).fit(model, tiny.data())
    steps = len(watch.raw) // 2
    for epoch, found in enumerate(watch.validated):
        expected = reference(watch.raw[start_step : steps * (epoch + 1)], 0.8, warmup)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.float(), msg=name)
    assert equal(watch.validated[-1], state(model))
    assert not equal(watch.validated[-1], watch.raw[-1])


def test_training_goes_as_without_it(tiny):
    runs = []
    for callbacks in ([], [EMA()]):
        runs.append(Watch())
        tiny.trainer([*callbacks, runs[-1]]).fit(tiny.classifier(), tiny.data())
    assert all(map(equal, runs[0].raw, runs[1].raw))


def test_before_it_starts_the_raw_weights_are_validated(tiny):
    watch, model = Watch(), tiny.classifier()
    tiny.trainer([EMA(start_step=1000), watch], num_sanity_val_steps=0).fit(model, tiny.data())
    assert equal(watch.validated[-1], watch.raw[-1])
    assert equal(state(model), watch.raw[-1])


def test_accumulated_gradients_make_one_update_for_each_step(tiny):
    ema = EMA()
    trainer = tiny.trainer([ema], accumulate_grad_batches=3)
    trainer.fit(tiny.classifier(), tiny.data())
    assert ema.num_updates == trainer.global_step == 4


@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 6, "save_on_train_epoch_end": False}])
def test_checkpoint_holds_the_average_and_resumes_bit_exactly(tiny, tmp_path, every):
    def fit(name, ckpt_path=None, seed=0):
        checkpoint = ModelCheckpoint(tmp_path / name, "{epoch}-{step}", save_top_k=-1, **every)
        watch, model = Watch(), tiny.classifier(seed)
        for module in model.modules():  # dropout's random numbers are not resumed here; see the classifier's tests
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = tiny.trainer([EMA(0.9), watch, checkpoint], enable_checkpointing=True, max_epochs=3)
        trainer.fit(model, tiny.data(), ckpt_path=ckpt_path)
        return watch, state(model), sorted((tmp_path / name).glob("*.ckpt"))

    whole, end, checkpoints = fit("whole")
    first = torch.load(checkpoints[0], weights_only=True)
    assert equal(first["state_dict"], whole.validated[1])  # number 0 is the sanity check
    loaded = Classifier.load_from_checkpoint(checkpoints[0], net=tiny.classifier(1).net, weights_only=True)
    assert equal(state(loaded), first["state_dict"])
    resumed, resumed_end, _ = fit("resumed", checkpoints[0], seed=1)
    assert equal(resumed.raw[-1], whole.raw[-1])
    assert equal(resumed_end, end)


def test_a_mask_can_hold_against_the_average(tiny):
    class Mask(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            (ema,) = (callback for callback in trainer.callbacks if isinstance(callback, EMA))
            for weight in (pl_module.net[0].weight.data, ema.averages["net.0.weight"]):
                weight[:, :, 1] = 0

    model = tiny.classifier()
    tiny.trainer([EMA(), Mask()]).fit(model, tiny.data())
    assert model.net[0].weight[:, :, 1].count_nonzero() == 0
    assert model.net[0].weight[:, :, 0].count_nonzero() > 0


def test_a_layer_replaced_between_epochs_starts_a_new_average(tiny):
    class Replace(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[5] = torch.nn.Sequential(torch.nn.Linear(72, 4), torch.nn.Linear(4, 10))

    watch, model = Watch(), tiny.classifier()
    tiny.trainer([EMA(0.5), Replace(), watch], num_sanity_val_steps=0).fit(model, tiny.data())
    assert watch.validated[-1]["net.5.0.weight"].shape == (4, 72)
    assert equal(watch.validated[-1], state(model))


def test_weights_are_raw_again_after_an_exception_in_validation(tiny):
    class Fail(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                raise RuntimeError("fails")

    watch, model = Watch(), tiny.classifier()
    with pytest.raises(RuntimeError, match="fails"):
        tiny.trainer([EMA(), watch, Fail()]).fit(model, tiny.data())
    assert equal(state(model), watch.raw[-1])


def test_shared_weight_is_swapped_once(tiny):
    model, watch = tiny.classifier(), Watch()
    model.twin = model.net[5]
    tiny.trainer([EMA(0.5), watch], num_sanity_val_steps=0).fit(model, tiny.data())
    assert torch.equal(watch.validated[-1]["twin.weight"], watch.validated[-1]["net.5.weight"])
    assert not torch.equal(watch.validated[-1]["twin.weight"], watch.raw[-1]["twin.weight"])


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"start_step": -1}])
def test_bad_numbers_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        EMA(**options)


def test_weights_only_checkpoints_are_refused(tiny, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ValueError, match="save_weights_only is true"):
        tiny.trainer([EMA(), checkpoint], enable_checkpointing=True).fit(tiny.classifier(), tiny.data())
