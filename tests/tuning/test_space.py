"""The search space: what a fragment may say, what it comes to, and what is refused."""

import itertools
import math

import pytest

from project.tuning.space import Space

BASE = {
    "model": {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        "net": {
            "class_path": "project.models.LeNet5",
            "init_args": {"fc_dropout": 0.0, "norm": "project.models.NoNorm"},
        },
        "penalties": None,
    },
    "data": {"init_args": {"augment": [{"init_args": {"degrees": 10.0, "translate": 0.1}}, {"init_args": {}}]}},
    "trainer": {"max_epochs": 3, "callbacks": None},
}


def test_a_grid_is_every_combination_once_and_ends_are_exact():
    space = Space({"a": {"log_uniform": [1e-3, 1], "points": 4}, "b": [1, 2], "c": {"int": [2, 6], "step": 2}})
    points = space.grid()
    assert len(points) == 4 * 2 * 3 == len({tuple(point.items()) for point in points})
    rates = sorted({point["a"] for point in points})
    assert rates[0] == 1e-3 and rates[-1] == 1
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert all(math.isclose(ratio, 10) for ratio in ratios)
    assert {point["c"] for point in points} == {2, 4, 6}
    assert Space({"a": {"uniform": [0, 1], "step": 0.1}}).grid()[-1]["a"] == pytest.approx(1.0)
    assert len(Space({"a": {"uniform": [0, 1], "step": 0.1}}).grid()) == 11


def test_a_condition_adds_a_key_only_where_it_holds():
    optimizers = ["torch.optim.Adam", {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}]
    momentum = {"choices": [0.0, 0.9], "when": {"model.optimizer": "SGD"}}
    space = Space({"model.optimizer.init_args.momentum": momentum, "model.optimizer": optimizers})
    points = space.grid()
    assert [len(point) for point in points] == [1, 2, 2]
    adam, _, sgd = (space.apply(BASE, point)["model"]["optimizer"] for point in points)
    assert adam == "torch.optim.Adam"
    assert sgd == {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}


def test_the_point_that_a_configuration_stands_at_changes_nothing_of_it():
    spec = {
        "model.optimizer": ["torch.optim.Adam", {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}],
        "model.optimizer.init_args.momentum": {"uniform": [0, 1], "when": {"model.optimizer": "SGD"}},
        "model.net.init_args.norm": ["project.models.NoNorm", "project.models.BatchNorm"],
        "data.init_args.augment.0.init_args.degrees": {"log_uniform": [1, 20]},
        "trainer.max_epochs": {"int": [1, 5]},
        "model.penalties": [None, "project.losses.L2"],
    }
    space = Space(spec)
    point = space.point_of(BASE)
    assert len(point) == len(spec) and point["model.optimizer"] == "SGD(lr=0.1)"
    without = {key: value for key, value in point.items() if key != "model.optimizer"}  # the choice has lr alone
    assert space.apply(BASE, without) == BASE


@pytest.mark.parametrize(
    ("key", "values", "sentence"),
    [
        ("trainer.max_epochs", {"int": [5, 9]}, "max_epochs is 3 in the configuration, which is not from 5 to 9"),
        ("model.optimizer", ["torch.optim.Adam"], r"SGD\(.*is not one of torch.optim.Adam"),
        ("model.optimizer", [{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2}}], "which is not one of SGD"),
    ],
)
def test_a_configuration_outside_the_space_has_no_point(key, values, sentence):
    with pytest.raises(ValueError, match=sentence):
        Space({key: values}).point_of(BASE)


def test_values_reach_items_of_lists_and_leave_the_base_alone():
    key = "data.init_args.augment.0.init_args.degrees"
    before = repr(BASE)
    changed = Space({key: [5.0]}).apply(BASE, {key: 5.0})
    assert changed["data"]["init_args"]["augment"][0]["init_args"] == {"degrees": 5.0, "translate": 0.1}
    assert changed["data"]["init_args"]["augment"][1] == {"init_args": {}}
    assert repr(BASE) == before


def test_choices_that_read_alike_stay_apart():
    key = "model.optimizer"
    twice = [{"class_path": "a.SGD", "init_args": {"lr": 0.1}}, {"class_path": "b.SGD", "init_args": {"lr": 0.1}}]
    space = Space({key: twice})
    assert len(space.grid()) == 2
    assert [space.values(point)[key] for point in space.grid()] == twice


def test_probes_hold_every_choice_and_both_ends():
    spec = {"a": ["x", "y", "z"], "b": {"uniform": [0, 1]}, "c": {"int": [1, 9], "when": {"a": "z"}}}
    probes = Space(spec).probes()
    assert {point["a"] for point in probes} == {"x", "y", "z"}
    assert {point["b"] for point in probes} == {0, 1}
    assert {point["c"] for point in probes if "c" in point} == {1, 9}


REFUSED = {
    "nothing to search": ({}, "at least one key"),
    "no choices": ({"a": []}, "no choices"),
    "empty range": ({"a": {"uniform": [1, 0.1]}}, "empty range"),
    "log range through 0": ({"a": {"log_uniform": [0, 1]}}, "no logarithm"),
    "log range below 0": ({"a": {"log_int": [-2, 8]}}, "no logarithm"),
    "typo in the kind": ({"a": {"log_unifrom": [1e-3, 1]}}, "log_uniform"),
    "one end": ({"a": {"uniform": [1]}}, "two numbers"),
    "ends that are no numbers": ({"a": {"uniform": ["x", "y"]}}, "two numbers"),
    "condition on what is not searched": ({"a": {"uniform": [0, 1], "when": {"b": 1}}}, "not searched"),
    "condition that is no choice": ({"b": [1, 2], "a": {"uniform": [0, 1], "when": {"b": 3}}}, "none of its choices"),
    "conditions in a circle": (
        {"a": {"choices": [1], "when": {"b": 1}}, "b": {"choices": [1], "when": {"a": 1}}},
        "circle",
    ),
    "step of a logarithm": ({"a": {"log_uniform": [1e-3, 1], "step": 0.1}}, "step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name):
    spec, expected = REFUSED[name]
    with pytest.raises(ValueError, match=r"^space") as error:
        Space(spec)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_grid_of_a_range_needs_a_number_of_points():
    with pytest.raises(ValueError, match="points: 5"):
        Space({"a": {"uniform": [0, 1]}}).grid()


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.optimizer.init_args.momentm", "momentum"),
        ("model.optimiser.init_args.lr", "model.optimizer.init_args.lr"),
        ("trainer.max_epoch", "trainer.max_epochs"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, near):
    with pytest.raises(ValueError, match="not in the configuration") as error:
        Space({key: [1, 2]}).check_keys(BASE)
    assert near in str(error.value).split("Did you mean")[1]
