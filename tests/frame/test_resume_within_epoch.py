"""A run that is stopped within an epoch goes on with the images that the epoch has left, to the same bits."""

import csv
import hashlib
import json

import pytest
import torch
from helpers.slow import fast
from lightning.pytorch import Callback

from project.frame.paths import Run


class Watch(Callback):
    """Notes what each batch of training holds, and stops the run like a crash, if wanted."""

    stop: tuple[int, int] | None = None
    seen: dict[tuple[int, int], str] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == Watch.stop:
            raise RuntimeError("killed")
        Watch.seen[trainer.current_epoch, batch_idx] = hashlib.md5(batch[0].numpy().tobytes()).hexdigest()


OFTEN = {
    "validation within the epoch": ["--trainer.val_check_interval=0.5"],
    "within a step": ["--trainer.val_check_interval=0.5", "--trainer.accumulate_grad_batches=3"],
    "every three steps": [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=3",
        "--trainer.callbacks.save_last=true",
    ],
}


@pytest.fixture
def options(digits):
    return [*digits, "--trainer.max_epochs=2", "--trainer.test_after_fit=false"]


@pytest.fixture
def watched(command, monkeypatch, options):
    """Runs a fit in this process and returns the batches that it has trained on, by epoch and number."""

    def run(*args, stop=None):
        monkeypatch.setattr(Watch, "stop", stop)
        monkeypatch.setattr(Watch, "seen", {})
        watch = f"--trainer.callbacks+={Watch.__module__}.Watch"

        try:
            status, _, err = command("fit", *args, *([watch] if "--resume" not in args else []))
        except RuntimeError as error:
            assert stop and str(error) == "killed"
        else:
            assert stop or status == 0, err
        return dict(Watch.seen)

    return run


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", fast(OFTEN))
def test_the_rest_of_the_epoch_is_what_it_would_have_been(name, workers, watched, options, logs):
    options = [*options, *OFTEN[name], f"--data.num_workers={workers}"]
    whole = watched(*options, "--trainer.experiment=whole")
    before = watched(*options, "--trainer.experiment=killed", stop=(1, 8))
    after = watched("--resume", str(logs / "killed"))
    assert min(after) > (1, 0), "the resume began within the epoch"
    assert before | after == whole
    runs = [Run.find(logs / experiment) for experiment in ("whole", "killed")]
    weights = [torch.load(run.last_checkpoint, weights_only=True) for run in runs]
    assert all(torch.equal(weights[1]["state_dict"][key], value) for key, value in weights[0]["state_dict"].items())
    means = [json.loads(run.summary.read_text()) for run in runs]
    assert means[0]["train/loss"] == means[1]["train/loss"] and means[0]["val/loss"] == means[1]["val/loss"]
    rows = [list(csv.DictReader(run.metrics.read_text().splitlines())) for run in runs]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]


def test_another_batch_size_within_an_epoch_is_refused(command, watched, options, logs):
    options = [*options, *OFTEN["validation within the epoch"], "--trainer.experiment=killed"]
    watched(*options, stop=(1, 8))
    status, _, err = command("fit", "--resume", str(logs / "killed"), "--data.batch_size=64")
    assert status == 2 and "with batch_size 128, but batch_size is 64" in err and err.count("\n") == 1
