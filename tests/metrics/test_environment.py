import json
import socket

import torch

from project.metrics import describe_environment


def test_environment_is_plain_and_names_no_host():
    environment = describe_environment()
    text = json.dumps(environment)
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__ in text
    assert environment["num_cores"] >= 1 and environment["python"] and environment["cpu"]
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
