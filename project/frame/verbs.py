"""The Trainer of the command line: Lightning's verbs, those of every room, and one from a file outside the package.

A room's verbs are the public methods of the class ``Verbs`` in its file ``verbs.py``. A verb from outside is a function
in a file of the working directory. The command line calls it by its dotted name: ``project my_verbs.count_labels``.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from project.frame.rooms import nearest, needed
from project.frame.trainer import RunTrainer
from project.learning.checkpoints import load_with_weights

_PACKAGE = Path(__file__).parents[1]
_FILES = [
    file for depth in ("*", "*/*") for file in sorted(_PACKAGE.glob(f"{depth}/verbs.py")) if file.parent.name != "frame"
]
_NAMES = [".".join(file.relative_to(_PACKAGE).with_suffix("").parts) for file in _FILES]
_CLASSES: list[Any] = [needed(name, "a verb").Verbs for name in _NAMES]

_TAKEN = ("run", "ckpt_path", "self", "data", "config", "net_arguments", "seed_everything", "trust")
"""Names that no option of a verb from outside may have."""


class Trainer(*_CLASSES, RunTrainer):  # type: ignore[misc]
    """The trainer with all verbs. Its arguments are those of :class:`~project.frame.trainer.RunTrainer`.

    Example::

        trainer:
          max_epochs: 20
          precision: auto
          kernels: "off"
    """


VERBS = {
    name: kind.needs_weights
    for kind in _CLASSES
    for name in vars(kind)
    if callable(getattr(kind, name)) and name[0] != "_"
}
"""The verbs of the rooms, each with whether it needs trained weights."""


def with_verb(name: str) -> tuple[str, type[Trainer]]:
    """The name of a method, and a Trainer with this method: it calls a function of a file outside the package.

    The function gets ``trainer``, ``model`` and ``datamodule``. Its further arguments are the verb's options. Two more
    options choose trained weights: ``--run`` and ``--ckpt_path``. With one of them ``model`` has these weights and is
    in eval mode.

    Args:
        name: dotted name of the function, such as ``"my_verbs.count_labels"``.

    Raises:
        ValueError: if there is no such function, or if its arguments are not those of a verb.
    """
    function = _find(name)
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError as error:  # an annotation that is text
        raise ValueError(f"{name} is no verb, for {error}: import the types of its arguments in that file.") from error
    given, options = list(signature.parameters)[:3], list(signature.parameters.values())[3:]
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    fits = [each.annotation is not each.empty and each.kind in kinds and each.name not in _TAKEN for each in options]
    if given != ["trainer", "model", "datamodule"] or not all(fits):
        raise ValueError(
            f"{name} is no verb, for its arguments are {signature}: begin with trainer, model, datamodule, and give "
            f"each further one a type and another name than {', '.join(_TAKEN)}."
        )

    def verb(
        self: Trainer, model: Any, datamodule: Any, run: str | None = None, ckpt_path: str | None = None, **values: Any
    ) -> Any:
        weights = self._weights_of(run, ckpt_path)
        model = model if weights is None else load_with_weights(model, Path(weights))[0]
        return function(self, model, datamodule, **values)

    standard = list(inspect.signature(verb).parameters.values())[:-1]
    own = [option.replace(kind=option.KEYWORD_ONLY) for option in options]
    verb.__signature__ = inspect.Signature([*standard, *own])  # type: ignore[attr-defined]
    text, _, described = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    weights = (
        "    run: a run's folder; gives the configuration and the weights.\n    ckpt_path: checkpoint with the weights."
    )
    verb.__doc__ = f"{text}\n\nArgs:\n{weights}\n{described}"
    key = name.replace(".", "_")
    return key, type("Trainer", (Trainer,), {key: verb})


def _find(name: str) -> Callable[..., Any]:
    """The function of a dotted name."""
    file, _, function = name.rpartition(".")
    try:
        module = import_module(file)
    except (ImportError, SyntaxError) as error:
        others = [path.stem for path in Path.cwd().glob("*.py") if path.stem != file]
        remedy = nearest(file, others, f"correct {file}.py, or run the command in its folder.")
        raise ValueError(f"there is no verb {name} ({error}): {remedy}") from error
    functions = {key: value for key, value in vars(module).items() if inspect.isfunction(value)}
    if function not in functions:
        near = nearest(function, functions, "define it.")
        raise ValueError(f"there is no verb {name}, for {file} has no function {function}: {near}")
    return functions[function]
