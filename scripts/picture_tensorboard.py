"""Take the README's picture of TensorBoard: a run's folder, shown by a browser without a window.

    project fit --config configs/deploy_fast.yaml
    python scripts/picture_tensorboard.py --logs logs/deploy_fast

It needs Chromium and its driver (Debian: ``apt-get install chromium chromium-driver``). TensorBoard and the browser run
on this machine and end with the script. ``--tags`` chooses the cards.
"""

import argparse
import base64
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from PIL import Image

TAGS = "pruning/sparsity|test/confusion_matrix|test/mistakes|train/loss|training_batch|val/accuracy"
BROWSER = {
    "browserName": "chrome",
    "goog:chromeOptions": {
        # Without WebGL TensorBoard draws its curves as SVG, which a screenshot shows.
        "args": ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-3d-apis", "--disable-dev-shm-usage"]
    },
}
SETTINGS = {
    "timeSeriesSettingsPaneOpened": False,
    "stepSelectorEnabled": False,
    "sideBarWidthInPercent": 0,
    "ignoreOutliers": False,
}
"""TensorBoard keeps these in the browser: no panes at the sides, no line at a step, the whole curves."""


def ask(method: str, address: str, body: Any = None) -> Any:
    """Send one request; the answer as JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


def wait(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer of a condition that is tried twice a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except (URLError, ConnectionError):
            pass  # the server is not up yet
        time.sleep(0.5)
    sys.exit(f"{what} did not come within {seconds:.0f} seconds.")


@contextmanager
def server(command: list[str]) -> Iterator[None]:
    """A process that runs until the block ends."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed; the head of this script says what it needs.")
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def screenshot(address: str, driver: str, width: int, height: int) -> Image.Image:
    """The page as it looks when nothing on it has changed for two seconds."""
    session = ask("POST", f"{driver}/session", {"capabilities": {"alwaysMatch": BROWSER}})["value"]["sessionId"]
    page = f"{driver}/session/{session}"
    try:
        ask("POST", f"{page}/window/rect", {"width": width, "height": height})
        ask("POST", f"{page}/url", {"url": address})
        keep = f"localStorage.setItem('_tb_global_settings', {json.dumps(json.dumps(SETTINGS))})"
        ask("POST", f"{page}/execute/sync", {"script": keep, "args": []})
        ask("POST", f"{page}/refresh", {})
        shots: list[str] = []
        for _ in range(30):
            time.sleep(1)
            shots.append(ask("GET", f"{page}/screenshot")["value"])
            if len(shots) > 5 and shots[-1] == shots[-2] == shots[-3]:
                break
        return Image.open(io.BytesIO(base64.b64decode(shots[-1]))).convert("RGB")
    finally:
        ask("DELETE", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, required=True, help="folder of the runs to show")
    parser.add_argument("--tags", default=TAGS, help="regular expression; a card is shown if its tag matches")
    parser.add_argument("--width", type=int, default=1360, help="width of the browser's window in pixels")
    parser.add_argument("--height", type=int, default=983, help="height of the browser's window in pixels")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/tensorboard.png"))
    args = parser.parse_args()
    if not args.logs.is_dir():
        parser.error(f"--logs {args.logs}: there is no such folder.")
    ports = free_port(), free_port()
    board, driver = (f"http://localhost:{port}" for port in ports)
    tensorboard = [sys.executable, "-m", "tensorboard.main", "--logdir", str(args.logs), "--load_fast=false"]
    with server([*tensorboard, "--port", str(ports[0])]):
        wait(lambda: ask("GET", f"{board}/data/runs"), 60, "TensorBoard")
        query = urlencode({"darkMode": "false", "smoothing": "0", "tagFilter": args.tags})
        with server(["chromedriver", f"--port={ports[1]}"]):
            wait(lambda: ask("GET", f"{driver}/status")["value"]["ready"], 30, "The browser's driver")
            image = screenshot(f"{board}/?{query}#timeseries", driver, args.width, args.height)
    if image.width > 1200:
        image = image.resize((1200, round(image.height * 1200 / image.width)), Image.Resampling.LANCZOS)
    image.quantize(200).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
