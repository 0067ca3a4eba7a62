"""The studies of efficient inference: equal budgets, verdicts from numbers, refused chains, pictures, a small run."""

from itertools import combinations
from typing import Any

import efficient_inference
import large_nets
import pytest
from efficient_inference import DENSE, SETTINGS, WINOGRAD, Deployed, Measured
from evidence import Study, options
from matplotlib.figure import Figure
from matplotlib.text import Text

from project.deployment.latency import Latency

NUMBERS: dict[str, tuple[float, float, float]] = {
    DENSE: (0.920, 420.0, 8.0),
    "narrow dense": (0.905, 185.0, 4.1),
    "weights pruned": (0.9195, 44.0, 8.1),
    "units pruned": (0.912, 150.0, 3.9),
    "weights shared": (0.9197, 52.0, 8.0),
    "int8": (0.9192, 119.0, 3.9),
    "low rank": (0.914, 200.0, 4.3),
    "ternary": (0.913, 28.0, 8.0),
    "binary": (0.908, 21.0, 8.1),
    "XNOR": (0.88, 24.0, 10.5),
    WINOGRAD: (0.920, 420.0, 8.3),
    "weights pruned + shared": (0.9194, 16.0, 8.0),
    "units pruned + shared": (0.9105, 19.0, 3.9),
    "units pruned + int8": (0.9115, 48.0, 2.2),
    "low rank + int8": (0.9135, 60.0, 2.6),
}
"""Accuracy, kilobytes, and milliseconds for 64 images."""
ONCE = {"winograd": {"accuracy": [0.92, 0.921], "difference": [1e-5, 2e-5], "layers": [7, 7]}}


def measured(accuracy: float, kilobytes: float, ms: float) -> Measured:
    times = {batch: Latency.of([ms * batch / 64, 1.1 * ms * batch / 64]) for batch in (1, 64)}
    eager = {batch: Latency.of([1.4 * time.median_ms]) for batch, time in times.items()}
    size = [1000 * kilobytes, 1010 * kilobytes]
    return Measured(
        [accuracy, accuracy + 0.001], size, [3e6, 3e6], [1e5, 1e5], times, {1: "eager", 64: "onnxruntime"}, eager
    )


@pytest.fixture
def study(tmp_path) -> Study:
    words = ["--miniature", "--seeds", "0", "1", "--workers", "1", "--output", str(tmp_path)]
    return Study("efficient_inference", "Efficient inference", options("", words))


@pytest.fixture
def found() -> dict[str, Measured]:
    values = {name: measured(*NUMBERS[name]) for name in SETTINGS}
    values[WINOGRAD].eager = {64: Latency.of([8.0])}
    return values


def answers(study: Study, found: dict[str, Measured]) -> dict[str, str]:
    study.findings.clear()
    efficient_inference.decide(study, found, ONCE)
    return {finding.claim.text: finding.answer for finding in study.findings}


def starting(texts: dict[str, str], words: str) -> str:
    (answer,) = [answer for text, answer in texts.items() if text.startswith(words)]
    return answer


def test_verdicts_follow_the_rules_of_the_page(study, found):
    before = answers(study, found)
    assert len(before) == 14
    for words, answer in {
        "90 % of the weights": "reproduced",
        "pruned weights do not": "reproduced",
        "a large net": "reproduced",
        "16 shared values": "reproduced",
        "pruning, sharing": "reproduced",
        "int8 without": "reproduced",
        "layers of low rank": "reproduced",
        "ternary weights": "reproduced",
        "binary inputs": "reproduced",
        "binary nets take": "not reproduced",
        "binary nets are": "not reproduced",
        "Winograd": "reproduced",
        "in a chain the savings": "mixed",
        "in a chain with int8": "reproduced",
    }.items():
        assert starting(before, words) == answer, words
    found["weights pruned"] = measured(0.90, 400.0, 8.0)  # a clear loss, and hardly smaller
    found["units pruned"] = measured(0.90, 150.0, 8.0)  # no faster than the dense net
    after = answers(study, found)
    assert starting(after, "90 % of the weights") == "not reproduced"
    assert starting(after, "pruned weights do not") == "mixed"
    assert starting(after, "a large net") == "not reproduced"


@pytest.mark.parametrize("miniature", [False, True])
def test_every_run_has_the_same_number_of_steps(miniature):
    def epochs(trainer: dict[str, Any]) -> int:
        shared = [each for each in trainer["callbacks"] if each["class_path"].endswith("WeightSharing")]
        return trainer["max_epochs"] + sum(each["init_args"]["epochs"] for each in shared)

    trainers = [efficient_inference.dense(miniature), *efficient_inference.methods(miniature).values()]
    assert len({(epochs(each), each["limit_train_batches"]) for each in trainers}) == 1


def test_every_setting_has_a_run_and_every_chain_has_its_parts():
    runs = {DENSE, "narrow dense", *efficient_inference.methods(False)}
    assert {setting.run for setting in SETTINGS.values()} == runs
    assert {part for setting in SETTINGS.values() for part in setting.parts} <= set(SETTINGS)


def test_each_chain_that_is_left_out_is_refused_in_a_sentence():
    rows = efficient_inference.refusals()
    assert len(rows) == 6
    assert all(sentence.endswith(".") and "but" in sentence for _, sentence in rows)


def test_every_name_in_the_picture_can_be_read(found):
    figure = Figure(figsize=(12.0, 5.6), layout="constrained", dpi=100)
    efficient_inference.draw(figure, found)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [(text.get_text(), Text.get_window_extent(text)) for text in axes.texts]
        assert len(boxes) == len(SETTINGS)
        assert not [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
        for name, box in boxes:
            assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1), name
            assert axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1), name


@pytest.mark.slow
def test_files_are_written_measured_and_timed_once(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_LOGS_DIR", str(tmp_path / "logs"))
    names = [DENSE, "narrow dense", "units pruned", "int8", WINOGRAD, "units pruned + int8"]
    monkeypatch.setattr(efficient_inference, "SETTINGS", {name: SETTINGS[name] for name in names})
    runs = efficient_inference.train(study)
    once = efficient_inference.measure_once(study, runs)
    assert efficient_inference.measure_once(study, runs) == once
    found = efficient_inference.collect(runs, once)
    dense, units, int8 = found[DENSE], found["units pruned"], found["int8"]
    assert units.macs[0] < 0.4 * dense.macs[0] and units.smaller(dense) > 2 and int8.smaller(dense) > 3
    assert int8.engine == {1: "onnxruntime", 64: "onnxruntime"}
    assert found[WINOGRAD].engine == {1: "eager", 64: "eager"}
    assert max(map(abs, found[WINOGRAD].loss(dense))) < 2 and max(once["winograd"]["difference"]) < 1e-3
    efficient_inference.show(study, found)
    assert sum(line.startswith("| ") for line in study.lines) == 2 + len(names)


def test_a_net_with_many_weights_loses_none_by_pruning_and_sharing():
    kilobytes = {"dense": 1000, "narrow dense": 100, "weights pruned": 90, "weights shared": 110, "binary": 35}
    accuracies = {name: [0.90, 0.91] for name in kilobytes} | {"narrow dense": [0.88, 0.89]}
    kilobytes["weights pruned + shared"], accuracies["weights pruned + shared"] = 11, [0.90, 0.91]

    def answers() -> list[str]:
        study = Study("s", "S", options("", ["--seeds", "0", "1"]))
        net = {name: Deployed(accuracies[name], [1000 * size, 1001 * size]) for name, size in kilobytes.items()}
        large_nets.decide(study, {"net": net})
        return [finding.answer for finding in study.findings]

    assert answers() == ["reproduced"] * 6
    accuracies["weights pruned"] = accuracies["weights pruned + shared"] = [0.87, 0.88]
    kilobytes |= {"binary": 60, "weights pruned + shared": 20}
    assert answers() == ["mixed", "not reproduced", "reproduced", "mixed", "not reproduced", "not reproduced"]
