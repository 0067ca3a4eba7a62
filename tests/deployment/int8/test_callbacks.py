"""After a fit: an int8 file, measured as what it is; and training that gets used to rounding."""

import itertools
from pathlib import Path

import onnx
import pytest
import torch
from helpers.pruning_run import STEPS, DigitsOnce, differences, fit, state_of, weights_of
from helpers.stop_after import StopAfter
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from project.callbacks import IterativeMagnitudePruning, PostTrainingQuantization, QuantizationAwareTraining
from project.compression import OneShot, Pruner, Quantizer
from project.compression.qat.fake_quantization import fake_weight
from project.compression.report import accuracy
from project.compression.report_rows import read_report
from project.deployment import fastest_file
from project.deployment.fastest_file import read_result
from project.deployment.int8 import callback as quantization
from project.deployment.latency import Latency
from project.deployment.model_file import ModelFile
from project.frame.environment import cpu_abilities


def int8(**options: object) -> PostTrainingQuantization:
    return PostTrainingQuantization(**{"latency": False, "max_drop": 1.0, **options})  # type: ignore[arg-type]


def test_a_fit_ends_with_a_measured_int8_file(tmp_path: Path) -> None:
    run = fit(tmp_path, PostTrainingQuantization(max_drop=1.0)).run
    dense, row = read_report(run.report)
    path = run.model_file("onnx-int8")
    assert (dense.step, row.step, row.file, row.file_bytes) == ("dense", "int8", path.name, path.stat().st_size)
    data = DigitsOnce(batch_size=64, seed=0)
    assert row.test_accuracy == accuracy(ModelFile(path).logits, data, "test")
    assert row.val_accuracy == accuracy(ModelFile(path).logits, data, "val")
    assert abs(row.test_accuracy - (dense.test_accuracy or 0)) < 0.05
    assert row.engine == "onnxruntime int8" and row.speedup_batch64 and row.latency_ms_batch1
    assert path.stat().st_size < 0.8 * run.model_file("onnx").stat().st_size  # of 1.5 k weights much is the graph


@pytest.mark.parametrize(
    ("int8_ms", "reached", "expected"),
    [
        (1.0, 1.0, "model_int8.onnx"),
        pytest.param(3.0, 1.0, "model.onnx", marks=pytest.mark.slow),
        pytest.param(1.0, 0.9, "model.onnx", marks=pytest.mark.slow),
    ],
)
def test_the_result_is_the_fastest_file_that_is_accurate_enough(
    int8_ms: float, reached: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Int8 where it is faster; fp32 where int8 is slower, as it may be without VNNI, and where it loses too much."""

    def measure(engines: dict, shape: object, **_: object) -> dict:
        return {(name, 64): Latency(int8_ms if "int8" in name else 2.0, 0, 9, 30, 1) for name in engines}

    accuracies = itertools.chain([1.0], itertools.repeat(reached))  # of the fp32 file, then of each int8 file
    monkeypatch.setattr(fastest_file, "measure", measure)
    monkeypatch.setattr(quantization, "accuracy", lambda logits, data, split: next(accuracies))
    run = fit(tmp_path, PostTrainingQuantization(max_drop=0.02), epochs=1).run
    result = read_result(run)
    assert result is not None and result.file == expected
    assert result.latency_ms == min(result.latencies_ms.values()) and result.processor == cpu_abilities()
    report = (run.folder / "report.md").read_text()
    assert f"The result of this run is {expected}" in report and "another processor" in report
    assert result.engine in report and result.processor in report


def test_the_file_is_of_the_thinned_net_and_the_report_goes_on(tmp_path: Path) -> None:
    pruning = IterativeMagnitudePruning(
        schedule=OneShot(0.5), pruner=Pruner(structure="units", scope="layer"), epochs_per_round=1, latency=False
    )
    run = fit(tmp_path, pruning, int8()).run
    steps = [row.step for row in read_report(run.report)]
    assert steps[0] == "dense" and steps[1].startswith("pruned") and steps[2:] == ["int8"]
    names = {tensor.name: tensor for tensor in onnx.load(run.model_file("onnx-int8")).graph.initializer}
    (name,) = [name for name in names if name.startswith("conv2") and name.endswith("_q")]
    assert names[name].dims[0] == 8  # of 16
    assert [row.num_parameters for row in read_report(run.report)[-2:]] == [
        read_report(run.report)[-1].num_parameters
    ] * 2


@pytest.mark.slow
def test_a_resumed_run_writes_its_row_once(tmp_path: Path) -> None:
    run = fit(tmp_path, int8()).run
    fit(tmp_path, int8(), resume=run)
    assert [row.step for row in read_report(run.report)] == ["dense", "int8"]


def test_layers_stay_float_while_too_much_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A net of three layers: at most one stays, and the user is told what to do."""
    from project.deployment.int8 import callback as quantization

    def lossy(logits_of: object, data: object, split: str) -> float:
        return 0.9 if str(getattr(logits_of, "path", "")).endswith("int8.onnx") else 1.0

    class Marked(ModelFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            engine = self.logits
            self.logits = lambda images: engine(images)
            self.logits.path = str(path)  # type: ignore[attr-defined]

    monkeypatch.setattr(quantization, "accuracy", lossy)
    monkeypatch.setattr(quantization, "ModelFile", Marked)
    warnings: list[str] = []
    monkeypatch.setattr(quantization.log, "warning", lambda text, *args: warnings.append(text % args))
    run = fit(tmp_path, int8(max_drop=0.02)).run
    assert len(warnings) == 1 and "10.00 points" in warnings[0] and "QuantizationAwareTraining" in warnings[0]
    assert run.model_file("onnx-int8").is_file()


def test_excluded_layers_are_named_in_the_report(tmp_path: Path) -> None:
    run = fit(tmp_path, int8(quantizer=Quantizer(exclude=["fc"]))).run
    assert read_report(run.report)[-1].step == "int8, 1 layers fp32"


@pytest.mark.parametrize("ends", ["early", "by a time limit"])
def test_a_fit_that_stops_early_is_over_and_one_that_runs_out_of_time_is_not(tmp_path: Path, ends: str) -> None:
    stop = EarlyStopping("val/accuracy", mode="min", patience=1) if ends == "early" else StopAfter(1)
    out = fit(tmp_path, int8(), stop, epochs=9)
    assert out.trainer.current_epoch < 9
    assert out.run.model_file("onnx-int8").is_file() == (ends == "early")


def test_weights_alone_are_called_so(tmp_path: Path) -> None:
    run = fit(tmp_path, int8(quantizer=Quantizer(weight_bits=4, activations=False)), epochs=1).run
    assert read_report(run.report)[-1].step == "4-bit weights"


def test_without_a_checkpoint_nothing_is_written(tmp_path: Path) -> None:
    run = fit(tmp_path, int8(), enable_checkpointing=False).run
    assert not list(run.folder.glob("*.onnx")) and not run.report.exists()


def test_a_negative_drop_is_refused() -> None:
    with pytest.raises(ValueError, match="max_drop is -1"):
        PostTrainingQuantization(max_drop=-1)


# -- quantization-aware training -------------------------------------------------------------------------------------


class Weights(Callback):
    """The weights after each epoch, and what the net says of fixed images when it is validated."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, torch.Tensor]] = []
        self.replaced: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.replaced.append((self._is_replaced(pl_module), False))

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.replaced.append((self._is_replaced(pl_module), True))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(state_of(pl_module.net))  # type: ignore[arg-type]

    @staticmethod
    def _is_replaced(module: LightningModule) -> bool:
        return "forward" in vars(module.net.conv2.conv)  # type: ignore[union-attr]


def test_rounding_begins_where_it_should_and_ends_with_the_fit(tmp_path: Path) -> None:
    plain, watch = Weights(), Weights()
    fit(tmp_path / "plain", plain, epochs=3)
    model = fit(tmp_path / "aware", QuantizationAwareTraining(begin_epoch=1), watch, epochs=3).model
    assert not differences(plain.epochs[0], watch.epochs[0])
    assert differences(plain.epochs[1], watch.epochs[1])
    training = [replaced for replaced, validating in watch.replaced if not validating]
    assert training == [False] * STEPS + [True] * 2 * STEPS
    assert "forward" not in vars(model.net.conv2.conv)


def test_the_best_net_is_chosen_among_the_rounded_epochs_as_it_will_be_rounded(tmp_path: Path) -> None:
    """At two bits the first epochs are worse than those before them: still, the file is made of one of them."""

    class Scores(Callback):
        def __init__(self) -> None:
            self.of: list[float] = []

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if not trainer.sanity_checking:
                self.of.append(float(trainer.callback_metrics["val/accuracy"]))

    scores = Scores()
    aware = QuantizationAwareTraining(begin_epoch=6, weight_bits=2, activations=False)
    out = fit(tmp_path, aware, scores, epochs=8)
    assert max(scores.of[6:]) < max(scores.of[:6])
    checkpoint = torch.load(out.run.best_checkpoint, weights_only=True)
    assert checkpoint["epoch"] in (6, 7)
    out.model.load_state_dict(checkpoint["state_dict"])
    for module in out.model.net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.data.copy_(fake_weight(module.weight, 2))
    out.model.net.eval()
    reached = accuracy(out.model.net, DigitsOnce(batch_size=64, seed=0), "val")
    assert reached == pytest.approx(max(scores.of[6:]))


def test_between_epochs_the_net_is_plain(tmp_path: Path) -> None:
    """What copies it then, such as a teacher, copies no rounding."""

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert "forward" not in vars(pl_module.net.conv2.conv)  # type: ignore[union-attr]

    fit(tmp_path, QuantizationAwareTraining(), Look(), epochs=2)


def test_validation_changes_no_range(tmp_path: Path) -> None:
    class Ranges(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.before = aware.fake.ranges

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert trainer.sanity_checking or (self.before and self.before == aware.fake.ranges)

    aware = QuantizationAwareTraining()
    fit(tmp_path, aware, Ranges(), epochs=1)
    assert aware.fake.ranges


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    whole = fit(tmp_path / "whole", QuantizationAwareTraining(begin_epoch=1), epochs=4)
    with pytest.raises(SystemExit):
        fit(tmp_path / "half", QuantizationAwareTraining(begin_epoch=1), Stop(), epochs=4)
    (folder,) = (tmp_path / "half" / "pruning").iterdir()
    (folder / "config.yaml").touch()
    from project.frame.paths import Run

    half = fit(tmp_path / "half", QuantizationAwareTraining(begin_epoch=1), epochs=4, resume=Run(folder))
    assert not differences(weights_of(whole.run.last_checkpoint), weights_of(half.run.last_checkpoint))
    keys = weights_of(fit(tmp_path / "plain", epochs=1).run.last_checkpoint).keys()
    assert weights_of(half.run.last_checkpoint).keys() == keys


def test_a_begin_after_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begin_epoch is 5"):
        fit(tmp_path, QuantizationAwareTraining(begin_epoch=5), epochs=3)
