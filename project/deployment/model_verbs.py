"""The verbs ``predict``, ``test`` and ``unpack`` on a model file. The file takes the place of a run."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml
from jsonargparse import auto_cli

from project.deployment.model_file import predict, test, unpack
from project.frame.parser import Parser
from project.frame.yaml_text import read_yaml

_VERBS: dict[str, Callable[..., object]] = {"predict": predict, "test": test, "unpack": unpack}


def run(verb: str, args: list[str]) -> None:
    """Run a verb of the command line on a model file.

    Args:
        verb: name of the verb.
        args: arguments that follow the verb on the command line.

    Raises:
        ValueError: if the verb does not take a model file.
    """
    if verb not in _VERBS:
        raise ValueError(
            f"{verb} does not take a model file, but {', '.join(_VERBS)} do: project test --model FILE --config FILE; "
            "project benchmark --run DIR measures those in a run's folder."
        )
    args = _with_data_of_config(args) if verb == "test" else args
    auto_cli(_VERBS[verb], args=args, parser_class=Parser, as_positional=False, prog=f"project {verb}")


def _with_data_of_config(args: list[str]) -> list[str]:
    """``--config FILE`` -> ``--data JSON`` of the file's data: the model file takes the place of the rest."""
    done: list[str] = []
    rest = list(args)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option not in ("--config", "-c"):
            done.append(option + equals + value)
            continue
        path = Path(value or (rest.pop(0) if rest else ""))
        if not path.is_file():
            raise ValueError(f"config is {str(path)!r}, but there is no such file.")
        data = yaml.safe_load(read_yaml(path)).get("data")
        done += ["--data", json.dumps(data)] if data else []
    if not any(option.partition("=")[0] in ("--data", "--help", "-h") for option in done):
        raise ValueError(
            "test --model FILE needs images and their labels: add --config FILE (a run's config.yaml, or one of "
            "configs/) or --data CLASS."
        )
    return done
