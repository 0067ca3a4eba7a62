"""Probes in runs: same bits as without, also after a stop, numbers in the logs, pictures, one sentence for mistakes."""

import csv
import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.stop_after import StopAfter
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import project.callbacks
from project.callbacks import (
    EMA,
    ActivationProbe,
    CurvatureProbe,
    GradientNormProbe,
    LandscapeProbe,
    SharpnessProbe,
)
from project.data import Digits
from project.frame.verbs import Trainer
from project.learning.whole_batch import WholeBatch
from project.metrics.probes import loss_landscape, sharpness, top_eigenvalue
from project.metrics.probes.figures import plot_gradient_norms, plot_landscape
from project.metrics.probes.objective import LossOnImages, fixed_images
from project.metrics.probes.probe import Probe
from project.models import Classifier
from project.models.layers import ConvNormAct


def make_net():
    return nn.Sequential(
        ConvNormAct(1, 8, 3), ConvNormAct(8, 8, 3, 2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10)
    )


def probes():
    return [
        LandscapeProbe([0.1, 0.3], every_n_steps=2, num_images=32),
        SharpnessProbe(num_images=32, iterations=2, every_n_epochs=1),
        SharpnessProbe([1e-3], subspace=3, num_images=32, iterations=2),
        CurvatureProbe(2, iterations=3, every_n_steps=3, num_images=32),
        GradientNormProbe(num_images=32),
        ActivationProbe(num_images=32, mode="train"),
    ]


def fit(logs, callbacks=(), *, seed=0, ckpt_path=None, model=None, **options):
    torch.manual_seed(seed)
    options = {"max_epochs": 2, "limit_train_batches": 4, "log_every_n_steps": 1, "accelerator": "cpu"} | options
    trainer = Trainer(
        logs_dir=str(logs),
        callbacks=[*callbacks],
        observe=False,
        enable_progress_bar=False,
        test_after_fit=False,
        **options,
    )
    model = model or Classifier(make_net(), 10, (1, 8, 8), base_batch_size=None)
    trainer.fit(model, datamodule=Digits(batch_size=32), ckpt_path=ckpt_path and str(ckpt_path))
    optimizer = trainer.optimizers[0].state_dict()["state"]
    return model, optimizer, trainer


def rows(trainer):
    with trainer.run.metrics.open(newline="") as file:
        return [row for row in csv.DictReader(file) if any(value for key, value in row.items() if "probe/" in key)]


def equal(one, other):
    """Whether two nested plain values have the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other


class Lines(logging.Handler):
    """Keeps the log lines of the probes."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with all probes, whose checkpoints are kept: classifier, state of the optimizer, trainer, log lines."""
    folder, log, handler = tmp_path_factory.mktemp("whole"), logging.getLogger("project.metrics.probes"), Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    keep = ModelCheckpoint(
        folder / "kept", "{step}", save_top_k=-1, every_n_train_steps=2, auto_insert_metric_name=False
    )
    result = fit(folder, [EMA(0.9), *probes(), keep])
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    return *result, handler.lines


def test_a_run_with_all_probes_ends_with_the_same_bits(whole, tmp_path):
    with_, without = whole[:3], fit(tmp_path, [EMA(0.9)])
    assert equal(dict(with_[0].state_dict()), dict(without[0].state_dict()))
    assert equal(with_[1], without[1])
    assert equal(*[dict(trainer.callback_metrics) for _, _, trainer in (with_, without)])


def check_resumed(whole, callbacks, again):
    assert equal(dict(again[0].state_dict()), dict(whole[0].state_dict())) and equal(again[1], whole[1])
    expected = [probe for probe in whole[2].callbacks if isinstance(probe, Probe)]
    found = [probe for probe in callbacks if isinstance(probe, Probe)]
    assert [probe.history for probe in found] == [probe.history for probe in expected]
    assert len(found) == 6 and found[0].history


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # not with the callback that kept them
@pytest.mark.parametrize("step", [4, 6], ids=["after an epoch", "within an epoch"])
def test_a_killed_run_goes_on_with_the_same_bits_and_numbers(whole, tmp_path, step):
    checkpoint = whole[2].run.folder.parent.parent / f"kept/{step}.ckpt"
    own = [EMA(0.9), *probes()]
    check_resumed(whole, own, fit(tmp_path, own, seed=1, ckpt_path=checkpoint))


def test_a_stopped_run_measures_its_end_and_goes_on_without_that(whole, tmp_path):
    own = [EMA(0.9), *probes()]
    _, _, first = fit(tmp_path, [*own, StopAfter(1)])
    assert list(own[3].history) == [4]  # in a subspace, at the end only
    again = [EMA(0.9), *probes()]
    check_resumed(whole, again, fit(tmp_path / "again", again, seed=1, ckpt_path=first.run.last_checkpoint))
    again[3].load_state_dict(own[3].state_dict())
    again[3].on_train_start(SimpleNamespace(global_step=4), None)
    assert again[3].history == {}


def test_the_numbers_are_logged_and_the_pictures_drawn(whole):
    model, _, trainer, lines = whole
    found = rows(trainer)
    assert {int(row["step"]) for row in found} == {0, 2, 3, 4, 6, 8}
    last = {key: float(value) for row in found if row["step"] == "8" for key, value in row.items() if value}
    first = {key for row in found if row["step"] == "0" for key, value in row.items() if value}
    for name in ("landscape/loss_max", "landscape/smoothness", "top_eigenvalue", "top_eigenvalue_2", "sharpness/0.001"):
        assert f"probe/{name}" in last and f"probe/{name}" in first, name
    assert last["probe/sharpness_of_3/0.001"] > 0 and "probe/sharpness_of_3/0.001" not in first
    assert 0 < last["probe/train/zeros/0.act"] < 1 and last["probe/gradient_norm/4"] > 0

    objective = LossOnImages(model.net, model.loss, *fixed_images(trainer.datamodule, 32))
    with objective.measuring("train"):
        landscape = loss_landscape(objective, objective.parameters, [0.1, 0.3])
        assert last["probe/landscape/loss"] == pytest.approx(landscape.loss)
        assert last["probe/landscape/loss_max"] == pytest.approx(landscape.losses.max().item())
        assert last["probe/landscape/smoothness"] == pytest.approx(landscape.smoothness, rel=1e-4)
        top = top_eigenvalue(objective, objective.parameters, 3)
        assert last["probe/top_eigenvalue"] == pytest.approx(top, rel=1e-3)
    with objective.measuring("eval"):
        rise = sharpness(objective, objective.parameters, 1e-3, iterations=2)
        assert last["probe/sharpness/0.001"] == pytest.approx(rise, rel=1e-3)

    assert len(lines) == 6
    assert "LandscapeProbe: a measurement takes 3 forward and 3 backward passes of 32 images" in lines[0]
    assert any("CurvatureProbe: a measurement takes 1 forward and 4 backward passes" in line for line in lines)
    for name in ("landscape", "gradient_norms"):
        assert (trainer.run.folder / f"{name}.png").is_file()
    events = EventAccumulator(str(trainer.run.folder)).Reload()
    assert {"landscape", "gradient_norms"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Scalars("probe/landscape/smoothness")] == [0, 2, 4, 6, 8]


def test_batches_of_one_step_are_measured_once(tmp_path):
    probe = GradientNormProbe(every_n_steps=1, every_n_epochs=None, num_images=8)
    fit(tmp_path, [probe], max_epochs=1, accumulate_grad_batches=2)
    assert list(probe.history) == [0, 1, 2]


def test_the_images_do_not_change_with_the_epoch():
    class Cropped:
        random_crop = "drawn for each epoch"

    class Data:
        train_data = Cropped()

        def sample(self, count):
            assert self.train_data.random_crop is None
            return torch.ones(count), torch.zeros(count)

    data = Data()
    fixed_images(data, 3)
    assert data.train_data.random_crop == "drawn for each epoch"


def test_a_compiled_net_is_measured_plain():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def compiled(_images):
        raise AssertionError("the compiled net was called")

    net._compiled_call_impl = compiled
    objective = LossOnImages(net, nn.CrossEntropyLoss(), torch.ones(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))
    with objective.measuring("train"):
        assert top_eigenvalue(objective, objective.parameters) > 0
    assert net._compiled_call_impl is compiled


def test_processes_do_not_wait_for_each_other():
    """With sync_batchnorm the layers of all processes work together, but not in a measurement: it may be a search."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 2))
    WholeBatch().apply(net)
    shared = net[1].forward, net[2].forward
    objective = LossOnImages(net, nn.CrossEntropyLoss(), torch.randn(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))
    with objective.measuring("train"):
        assert sharpness(objective, objective.parameters) > 0  # there is no process group here
    assert (net[1].forward, net[2].forward) == shared


def test_the_names_of_the_callbacks_are_public():
    for name in ("ActivationProbe", "CurvatureProbe", "GradientNormProbe", "LandscapeProbe", "SharpnessProbe"):
        assert name in dir(project.callbacks)
        assert getattr(project.callbacks, name) is getattr(project.metrics.probes, name)


def test_pictures_of_one_measurement_and_of_broken_ones():
    names = ("loss", "loss_min", "loss_max", "gradient_change_min", "gradient_change_max", "smoothness")
    values = {f"landscape/{name}": value for name, value in zip(names, [1, 0.5, 2, 0, 3, 4], strict=True)}
    broken = dict.fromkeys(values, float("inf"))
    for history in ({0: values}, {0: values, 5: broken, 9: values}, {0: broken}):
        assert len(plot_landscape(history).axes) == 3
    norms = {step: {"gradient_norm/a": 0.0, "gradient_norm/b": 1.0} for step in range(30)}
    assert len(plot_gradient_norms(norms).axes[0].lines) == 8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LandscapeProbe(every_n_steps=0), "every_n_steps is 0"),
        (lambda: LandscapeProbe([]), "distances is empty"),
        (lambda: GradientNormProbe(every_n_epochs=-1), "every_n_epochs is -1"),
        (lambda: ActivationProbe(num_images=0), "num_images is 0"),
        (lambda: ActivationProbe(mode="test"), "mode is 'test'"),
        (lambda: SharpnessProbe([]), "epsilons is empty"),
        (lambda: SharpnessProbe([0.0]), "epsilon is 0.0"),
        (lambda: SharpnessProbe(subspace=0), "subspace is 0"),
        (lambda: CurvatureProbe(0), "count is 0"),
        (lambda: CurvatureProbe(30), "iterations is 20"),
        (lambda: CurvatureProbe(tolerance=-1), "tolerance is -1"),
    ],
)
def test_a_bad_argument_is_one_sentence(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_data_without_images_to_measure_on_are_refused(tiny):
    with pytest.raises(ValueError, match="LandscapeProbe measures on training images, but TinyDigits gives none"):
        tiny.trainer([LandscapeProbe()]).fit(tiny.classifier(), tiny.data())
