"""A run that is too short for its net's running statistics says so before the first step."""

import pytest
from torch import nn

from project.callbacks import WarnOfSlowNorms


@pytest.mark.parametrize(
    ("momentum", "epochs", "expected"),
    [
        (0.01, 1, "momentum 0.01, and the run has 6 steps: 94 % of their running statistics"),
        (0.1, 1, ""),  # torch's default
        (0.09, 10, "momentum 0.09, and the run has 60 steps: 0.35 % of their running statistics"),
        (0.09, 20, ""),  # 0.91 ** 120 is 1e-5
        (None, 1, ""),  # a plain mean over all steps
    ],
)
def test_a_short_run_is_told(tiny, caplog, momentum, epochs, expected):
    model = tiny.classifier()
    model.net[1].momentum = momentum
    tiny.trainer([WarnOfSlowNorms()], max_epochs=epochs, limit_val_batches=0).fit(model, tiny.data())
    warnings = [record.getMessage() for record in caplog.records if "running statistics" in record.getMessage()]
    assert len(warnings) == bool(expected) and expected in "".join(warnings)


def test_a_net_without_such_norms_is_none_of_its_business(tiny, caplog):
    model = tiny.classifier()
    model.net[1] = nn.BatchNorm2d(8, momentum=0.01, track_running_stats=False)
    tiny.trainer([WarnOfSlowNorms()], max_epochs=1, limit_val_batches=0).fit(model, tiny.data())
    assert "running statistics" not in caplog.text
