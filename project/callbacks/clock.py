"""A stopwatch for training time. It can pause, so that validation and the work between epochs are not counted."""

import time

import torch


class Clock:
    """Counts the seconds between ``start`` and ``stop``, without those between ``pause`` and ``resume``.

    Args:
        seconds: time that is already counted, in seconds, 0 or more.
    """

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
        """Stop the clock, after an accelerator has finished the work in its queue."""
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds, self._since = self.seconds, None
        self._paused = False

    def pause(self) -> None:
        """Stop the clock for a while; no effect if it does not run."""
        running = self._since is not None
        self.stop()
        self._paused = running

    def resume(self) -> None:
        """Continue if the clock was paused; no effect otherwise."""
        if self._paused:
            self.start()
