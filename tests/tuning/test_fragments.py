"""Every fragment of configs/tune parses, and its keys and values are those of the configuration it is for."""

from pathlib import Path
from typing import Any

import pytest

from project.frame.cli import CLI
from project.tuning.plan import Plan
from project.tuning.study import check_space

ROOT = Path(__file__).resolve().parents[2]
FRAGMENTS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/tune").glob("*.yaml"))


_QUICK = ("dropout_conv_fc",)
_SLOW = [pytest.param(path, marks=[pytest.mark.slow] * (path.stem not in _QUICK)) for path in FRAGMENTS]


@pytest.mark.parametrize("path", _SLOW, ids=[path.stem for path in FRAGMENTS])
def test_it_can_be_searched_by_the_command_in_its_first_line(path, monkeypatch, logs):
    first = (ROOT / path).read_text().splitlines()[0]
    assert first.startswith("# project tune --config configs/") and str(path) in first
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "project.tuning.study.tune", lambda base, space, **options: seen.update(base=base, spec=space, **options)
    )
    monkeypatch.chdir(ROOT)
    CLI(first.removeprefix("# project ").split())
    names = Plan.__dataclass_fields__.keys() & seen.keys()
    objective = seen["objective"] if isinstance(seen["objective"], list) else [seen["objective"]]
    plan = Plan(
        **{name: seen[name] for name in names} | {"objectives": tuple(objective), "storage": "", "deadline": None}
    )
    check_space(plan)
    assert 1 < len(plan.points) <= 40
    assert not logs.exists(), "nothing is trained"
