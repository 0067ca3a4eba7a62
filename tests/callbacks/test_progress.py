import logging
import re
import sys

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar

from project.callbacks import ProgressLines, default_progress_bar
from project.callbacks.observe.progress_bars import ProgressBars


def test_one_line_for_each_epoch_with_all_its_metrics(tiny, caplog, capsys):
    values = []

    class Lines(ProgressLines):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            values.append(trainer.callback_metrics["val/loss"].item())

    with caplog.at_level(logging.INFO, "project"):
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[Lines()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(tiny.classifier(), tiny.data())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("project")]
    pattern = (
        r"epoch {}/2: train/loss \S+, train/accuracy \S+, val/loss {:.4f}, val/accuracy \S+ \(\S+ s, \d+ images/s\)"
    )
    assert len(lines) == 2
    for number, (line, value) in enumerate(zip(lines, values, strict=True), 1):
        assert re.fullmatch(pattern.format(number, value), line), line
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("terminal", "kind"), [(True, ProgressBars), (False, ProgressLines)])
def test_the_output_chooses(monkeypatch, terminal, kind):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    bar = default_progress_bar()
    assert type(bar) is kind and isinstance(bar, ProgressBar)
