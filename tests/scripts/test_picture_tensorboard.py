"""The picture of TensorBoard needs a browser; what can be said without one is tested here."""

import picture_tensorboard
import pytest


def test_a_missing_folder_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["picture_tensorboard.py", "--logs", "nowhere"])
    with pytest.raises(SystemExit):
        picture_tensorboard.main()
    assert "--logs nowhere: there is no such folder" in capsys.readouterr().err


def test_a_missing_program_is_named() -> None:
    with (
        pytest.raises(SystemExit, match="no-such-driver is not installed"),
        picture_tensorboard.server(["no-such-driver"]),
    ):
        pass
