"""The Trainer of the command line: Lightning's verbs, those of every room, and one from a file outside the package.

A room's verbs are the public methods of the class ``Verbs`` in its file ``verbs.py``. A verb from outside is a function
of a file in the working directory; the command line calls it by its dotted name, ``project my_verbs.count_labels``.
"""

import difflib
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from project.frame.rooms import needed
from project.frame.trainer import RunTrainer
from project.learning.checkpoints import load_with_weights

_PACKAGE = Path(__file__).parents[1]
_ROOMS = [
    file.parent.relative_to(_PACKAGE) for depth in ("*", "*/*") for file in sorted(_PACKAGE.glob(f"{depth}/verbs.py"))
]
_CLASSES: list[Any] = [
    needed(".".join((*room.parts, "verbs")), "a verb").Verbs for room in _ROOMS if room.name != "frame"
]
_GIVEN = ["trainer", "model", "datamodule"]
_TAKEN = {"self", "run", "ckpt_path", "data", "config", "net_arguments", "seed_everything"}
_WEIGHTS = """\
    run: a run's folder; its configuration, and the weights of its best checkpoint.
    ckpt_path: file of a checkpoint, whose weights the model gets.
"""


class Trainer(*_CLASSES, RunTrainer):  # type: ignore[misc]
    """Trains, shrinks, measures and deploys; all its arguments are :class:`~project.frame.trainer.RunTrainer`'s."""


VERBS = {
    name: kind.needs_weights
    for kind in _CLASSES
    for name in vars(kind)
    if callable(getattr(kind, name)) and name[0] != "_"
}
"""The rooms' verbs, and whether each needs trained weights."""


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
    except NameError as error:  # annotations may be text
        raise ValueError(f"{name} is no verb, for {error}: import the types of its arguments in that file.") from error
    options = list(signature.parameters.values())[3:]
    if list(signature.parameters)[:3] != _GIVEN or not all(map(_is_option, options)):
        raise ValueError(
            f"{name} is no verb, for its arguments are {signature}: begin with {', '.join(_GIVEN)}, and give each "
            f"further one a type and another name than {', '.join(sorted(_TAKEN))}."
        )

    def verb(
        self: Trainer, model: Any, datamodule: Any, run: str | None = None, ckpt_path: str | None = None, **values: Any
    ) -> Any:
        weights = self._weights_of(run, ckpt_path)
        model = model if weights is None else load_with_weights(model, Path(weights))[0]
        return function(self, model, datamodule, **values)

    standard = list(inspect.signature(verb).parameters.values())[:-1]
    options = [option.replace(kind=option.KEYWORD_ONLY) for option in options]
    verb.__signature__ = inspect.Signature([*standard, *options])  # type: ignore[attr-defined]
    text, _, described = inspect.cleandoc(function.__doc__ or "").partition("Args:\n")
    verb.__doc__ = f"{text}\n\nArgs:\n{_WEIGHTS}{described}"
    key = name.replace(".", "_")
    return key, type("Trainer", (Trainer,), {key: verb})


def _is_option(parameter: inspect.Parameter) -> bool:
    kinds = parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY
    return parameter.kind in kinds and parameter.annotation is not parameter.empty and parameter.name not in _TAKEN


def _find(name: str) -> Callable[..., Any]:
    """The function of a dotted name."""
    file, _, function = name.rpartition(".")
    try:
        module = import_module(file)
    except (ImportError, SyntaxError) as error:
        near = ""
        if getattr(error, "name", None) == file:
            near = _hint(file, [path.stem for path in Path.cwd().glob("*.py")])
            near = near or f" Run the command in the folder that holds {file}.py."
        raise ValueError(f"there is no verb {name}, for {file} cannot be imported: {error}.{near}") from error
    found = getattr(module, function, None)
    if not inspect.isfunction(found):
        near = _hint(function, [key for key, value in vars(module).items() if inspect.isfunction(value)])
        raise ValueError(f"there is no verb {name}, for {file} has no function {function}.{near}")
    return found


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
