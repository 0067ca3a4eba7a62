"""Download a file and verify its checksum. The file appears complete or not at all."""

import logging
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

TIMEOUT_S = 20.0


def download(urls: Sequence[str], path: Path, md5: str) -> None:
    """Download a file from the first mirror that has it. A temporary file is written, checked and then renamed.

    Args:
        urls: addresses of the file, one for each mirror, in the order in which they are tried.
        path: path that the file gets.
        md5: MD5 checksum of the file, in hexadecimal digits.

    Raises:
        ConnectionError: if no mirror gives a file with this checksum.
    """
    from torchvision.datasets.utils import download_url

    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)  # a network that swallows packets must not hang the run
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
            for url in urls:
                try:
                    log.info("Downloading %s", url)
                    download_url(url, folder, path.name, md5)
                except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
                    failures.append(f"{url}: {error}")
                else:
                    (Path(folder) / path.name).replace(path)
                    return
    finally:
        socket.setdefaulttimeout(timeout)
    raise ConnectionError("; ".join(failures))
