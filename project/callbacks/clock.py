"""A clock of the training alone: it stands still during validation, test pictures and all that lies between two
epochs.
"""

import time

import torch


class Clock:
    """Seconds between ``start`` and ``stop``, less those between ``pause`` and ``resume``."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._paused = False

    @property
    def seconds(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._seconds + running

    def start(self) -> None:
        self._since = time.perf_counter()
        self._paused = False

    def stop(self) -> None:
        """Stop, after the work that an accelerator still has in its queue."""
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds, self._since = self.seconds, None
        self._paused = False

    def pause(self) -> None:
        """Stop for a while, if it runs at all."""
        running = self._since is not None
        self.stop()
        self._paused = running

    def resume(self) -> None:
        """Go on, if it was paused."""
        if self._paused:
            self.start()
