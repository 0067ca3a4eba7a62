"""The arguments of the net that the data give: the number of classes, and others that the net has an argument for.

The command line writes these values into the net's part of the configuration before it builds the net. Checkpoints,
``config.yaml`` and packed files therefore hold every argument that the net was built with.
"""

from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from torch import nn

from project.data import ImageDataModule
from project.frame.parser import Parser
from project.frame.rooms import nearest
from project.models.signature import find, parameters, required, takes_any

BY_NAME = ("num_classes", "image_shape")
"""The values that each net gets that has an argument of that name."""
OF_THE_DATA = (*BY_NAME, "num_channels", "height", "width")


def give_(net: Namespace, names: Mapping[str, str | None] | None, data: ImageDataModule) -> None:
    """Write values of the data into the net's arguments.

    Args:
        net: parsed configuration of the net, with ``class_path``, ``init_args`` and ``dict_kwargs``.
        names: name of each argument of the net, with the value that it gets; one of :data:`OF_THE_DATA`, or ``None``
            for no value.
        data: data module that gives the values.

    Raises:
        ValueError: if the data have no such value, if the net has no such argument, or if an argument that the net
            needs is missing.
    """
    maker = find(net.class_path)
    known, any_name = parameters(maker), takes_any(maker)
    wanted: dict[str, str | None] = {name: name for name in BY_NAME if name in known}
    if any_name:
        wanted["num_classes"] = "num_classes"
    wanted |= _checked(net.class_path, names or {}, list(known), any_name)
    values = _values(data)
    arguments = vars(net.get("init_args") or Namespace()) | dict(net.get("dict_kwargs") or {})
    arguments |= {name: values[value] for name, value in wanted.items() if value is not None}
    for name in required(maker):
        if arguments.get(name) is None:
            raise ValueError(
                f"model.net is {net.class_path}, and its argument {name} is missing: add `init_args: {{{name}: …}}` to "
                f"model.net, or `net_arguments: {{{name}: num_classes}}` if the data give its value "
                f"({', '.join(OF_THE_DATA)})."
            )
    net["init_args"] = Namespace({name: value for name, value in arguments.items() if name in known})
    net["dict_kwargs"] = {name: value for name, value in arguments.items() if name not in known}


def build_net(described: Mapping[str, Any]) -> nn.Module:
    """Build the net that the hyperparameters of a checkpoint describe, in the same way as the command line."""
    parser = Parser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    parser.take_any_arguments_of("net")
    return parser.instantiate_classes(parser.parse_object({"net": dict(described)})).net


def _checked(
    class_path: str, names: Mapping[str, str | None], known: list[str], any_name: bool
) -> Mapping[str, str | None]:
    for name, value in names.items():
        if value is not None and value not in OF_THE_DATA:
            raise ValueError(
                f"net_arguments gives {name} the value {value!r}, but the data have {', '.join(OF_THE_DATA)}: choose "
                "one of them, or put a value of your own into model.net.init_args."
            )
        if name not in known and not any_name:
            hint = nearest(name, known, f"its arguments are {', '.join(known) or 'none'}.")
            raise ValueError(f"net_arguments names {name}, but {class_path} has no such argument: {hint}")
    return names


def _values(data: ImageDataModule) -> dict[str, Any]:
    channels, height, width = data.image_shape
    shape = [channels, height, width]
    return dict(zip(OF_THE_DATA, (data.num_classes, shape, channels, height, width), strict=True))
