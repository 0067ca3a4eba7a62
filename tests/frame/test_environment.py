import json
import socket

import pytest
import torch

from project.frame.environment import cpu_abilities, describe_environment


def test_environment_is_plain_and_names_no_host():
    environment = describe_environment()
    text = json.dumps(environment)
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__ in text
    assert environment["num_cores"] >= 1 and environment["python"] and environment["cpu"]
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"avx512_f": True, "avx2": True, "avx512_vnni": False, "avx512_bf16": False}, "AVX-512, no VNNI, no bfloat16"),
        ({"avx512_f": False, "avx2": True, "avx512_vnni": False, "avx_vnni": True}, "AVX2, VNNI"),
        ({"avx512_f": True, "avx512_vnni": True, "avx512_bf16": True}, "AVX-512, VNNI, bfloat16"),
    ],
)
def test_a_processor_is_described_by_what_it_can_do(found, words, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert cpu_abilities().startswith(words)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_abilities() == "aarch64"
