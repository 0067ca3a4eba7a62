import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import project.callbacks
from project.callbacks import EMA, HParams, LogGraph, LookAtBatch, StopOnNaN, TestReport, WeightHistograms, WriteSummary
from project.callbacks.observe.hparams import flatten
from project.models import SmallInception


def events(trainer, folder):
    trainer.logger.experiment.flush()
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def test_histograms_and_gradient_norms_appear_now_and_then(tiny):
    trainer = tiny.trainer([WeightHistograms(every_n_epochs=2)], tensorboard=True, max_epochs=3)
    trainer.fit(tiny.classifier(), tiny.data())
    found = events(trainer, tiny.run.folder)
    assert set(found.Tags()["histograms"]) == {"weights/net.0", "weights/net.5"}
    assert [event.step for event in found.Histograms("weights/net.0")] == [0, 12, 18]
    norms = found.Scalars("gradient_norm/net.5")
    assert [event.step for event in norms] == [0, 12] and all(event.value > 0 for event in norms)


def test_graph_is_written_and_training_goes_on_untouched(tiny):
    states = []
    for callbacks in ([], [LogGraph()]):
        trainer = tiny.trainer(callbacks, tensorboard=True, max_epochs=1)
        model = tiny.classifier()
        torch.manual_seed(5)
        trainer.fit(model, tiny.data())
        states.append(model.state_dict())
    assert events(trainer, tiny.run.folder).Tags()["graph"]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_graph_of_an_inception_net_is_written(tiny, caplog):
    """Whose pooling in the stem gave two traces different names."""
    model = tiny.classifier()
    model.net = SmallInception(model.num_classes, (1, 28, 28), width=0.25)
    trainer = tiny.trainer([], tensorboard=True, max_epochs=1)
    trainer.strategy.connect(model)
    model.image_shape = (1, 28, 28)
    with caplog.at_level(logging.WARNING):
        LogGraph().on_train_start(trainer, model)
    assert "not in TensorBoard" not in caplog.text
    assert events(trainer, tiny.run.folder).Tags()["graph"]


def test_a_net_that_cannot_be_traced_is_a_log_line(tiny, caplog, capsys):
    class Stubborn(torch.nn.Sequential):
        def forward(self, x):
            if torch.jit.is_tracing():
                raise RuntimeError("not me")
            return super().forward(x)

    model = tiny.classifier()
    model.net = Stubborn(*model.net)
    with caplog.at_level(logging.WARNING):
        tiny.trainer([LogGraph()], tensorboard=True, max_epochs=1).fit(model, tiny.data())
    assert "tracing Stubborn failed (not me)" in caplog.text
    assert "not me" not in capsys.readouterr().out


def test_hyperparameters_and_final_metrics_are_in_the_hparams_tab(tiny):
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import metadata

    trainer = tiny.trainer([HParams()], tensorboard=True)
    model = tiny.classifier(base_batch_size=None)
    trainer.fit(model, tiny.data())
    trainer.test(model, tiny.data(), verbose=False)
    trainer.logger.experiment.flush()
    assert [path.name for path in tiny.run.folder.iterdir() if path.is_dir()] == []
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tiny.run.folder.parent)).Reload()
    assert list(multiplexer.Runs()) == ["run"]

    def content(tag):
        return multiplexer.SummaryMetadata("run", tag).plugin_data.content

    start = metadata.parse_session_start_info_plugin_data(content(metadata.SESSION_START_INFO_TAG))
    experiment = metadata.parse_experiment_plugin_data(content(metadata.EXPERIMENT_TAG))
    assert metadata.parse_session_end_info_plugin_data(content(metadata.SESSION_END_INFO_TAG)).status == 1  # success
    values = start.hparams
    assert values["optimizer"].string_value == "SGD"
    assert values["lr"].number_value == pytest.approx(0.05)
    assert values["batch_size"].number_value == 16
    assert values["num_parameters"].number_value == sum(p.numel() for p in model.net.parameters())
    assert values["macs"].number_value == 9 * 8 * 9 + 720
    shown = {info.name.tag for info in experiment.metric_infos}
    scalars = set(events(trainer, tiny.run.folder).Tags()["scalars"])
    assert {"val/accuracy", "test/accuracy", "fit_seconds"} <= shown <= scalars
    last = events(trainer, tiny.run.folder).Scalars("test/accuracy")[-1]
    assert last.value == pytest.approx(trainer.callback_metrics["test/accuracy"].item())


def test_flatten_leaves_plain_values():
    nested = {"net": {"class_path": "Net", "init_args": {"width": 2, "stages": [1, 2]}}, "names": ["x"] * 9, "n": None}
    assert flatten(nested) == {"net.class_path": "Net", "net.init_args.width": 2, "net.init_args.stages": "[1, 2]"}


EVERY = [EMA, HParams, LogGraph, LookAtBatch, StopOnNaN, TestReport, WeightHistograms, WriteSummary]


def test_without_tensorboard_and_run_all_are_silent_and_change_nothing(tiny, tmp_path, capsys):
    states = []
    for kinds in ([], [kind for kind in EVERY if kind is not EMA]):
        model, trainer = tiny.classifier(), tiny.trainer([kind() for kind in kinds], with_run=False)
        torch.manual_seed(3)
        trainer.fit(model, tiny.data())
        trainer.test(model, tiny.data(), verbose=False)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_with_tensorboard_and_run_training_is_the_same(tiny):
    states = []
    for kinds in ([], [kind for kind in EVERY if kind is not EMA]):
        model, trainer = tiny.classifier(), tiny.trainer([kind() for kind in kinds], tensorboard=True)
        torch.manual_seed(3)
        trainer.fit(model, tiny.data())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_all_are_exported_and_need_no_argument():
    for kind in EVERY:
        assert kind.__name__ in project.callbacks.__all__ and kind()
