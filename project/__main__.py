"""The console script: runs the command line and turns users' errors into one sentence."""

import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    """Entry point of ``project`` and ``python -m project``."""
    from project.frame.logger import setup_logging

    setup_logging()
    if (folder := str(Path.cwd())) not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, folder)  # as `python -m project` does: a class_path may name a file of one's own
    try:
        if sys.argv[1:2] == ["unpack"] or _names_model_file(sys.argv[1:]):
            _use_model_file(sys.argv[1], sys.argv[2:])
        else:
            from project.frame.cli import CLI

            CLI()
    except Exception as error:
        if os.environ.get("PROJECT_DEBUG") or not _is_users(error):
            raise
        from project.frame.parser import one_sentence

        if not _first_process_tells():
            sys.stderr.write(f"error: {one_sentence(str(error))}\n")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as error:
        sys.exit(_status(error))


def _is_users(error: Exception) -> bool:
    """Whether the user can mend it, such as a ``monitor`` that nothing logs (Lightning's, known by name: importing
    it takes a second).
    """
    return isinstance(error, ValueError | OSError) or type(error).__name__ == "MisconfigurationException"


def _status(error: BaseException) -> int | str | None:
    """The exit status: 130 after Ctrl-C (SIGINT), 143 after SIGTERM, as shells have it; else that of ``error``."""
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return 130  # Lightning exits with 1 when it has caught a KeyboardInterrupt
    if type(error).__name__ == "SIGTERMException":  # Lightning's
        return 143
    return error.code if isinstance(error, SystemExit) else 1


def _first_process_tells() -> bool:
    """Whether this is a further process of a run whose first one has ended meanwhile, with the same sentence."""
    from lightning.pytorch.utilities import rank_zero_only

    parent, waited = os.getppid(), 0.0
    while rank_zero_only.rank and waited < 20:  # type: ignore[attr-defined]
        if os.getppid() != parent:
            return True
        time.sleep(0.1)
        waited += 0.1
    return False


def _names_model_file(args: list[str]) -> bool:
    """Whether ``--model`` names a deployed model; ``--model CONFIG.yaml`` is LightningCLI's."""
    values = [value for option, value in itertools.pairwise([*args, ""]) if option == "--model"]
    values += [arg.removeprefix("--model=") for arg in args if arg.startswith("--model=")]
    return any(not value.endswith((".yaml", ".yml", ".json")) for value in values)


def _use_model_file(verb: str, args: list[str]) -> None:
    from jsonargparse import auto_cli

    from project.frame.parser import Parser
    from project.frame.rooms import needed

    files = needed("deployment.model_file", "a model file")
    verbs: dict[str, Callable[..., object]] = {"predict": files.predict, "test": files.test, "unpack": files.unpack}
    if verb not in verbs:
        raise ValueError(
            f"{verb} does not take a model file, but {', '.join(verbs)} do: project test --model FILE --config FILE; "
            "project benchmark --run DIR measures those in a run's folder."
        )
    args = _with_data_of_config(args) if verb == "test" else args
    auto_cli(verbs[verb], args=args, parser_class=Parser, as_positional=False, prog=f"project {verb}")


def _with_data_of_config(args: list[str]) -> list[str]:
    """``--config FILE`` -> ``--data JSON`` of the file's data: the model file takes the place of the rest."""
    import json

    import yaml

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
        data = (yaml.safe_load(path.read_text()) or {}).get("data")
        done += ["--data", json.dumps(data)] if data else []
    if not any(option.partition("=")[0] in ("--data", "--help", "-h") for option in done):
        raise ValueError(
            "test --model FILE needs images and their labels: add --config FILE (a run's config.yaml, or one of "
            "configs/) or --data CLASS."
        )
    return done


if __name__ == "__main__":
    main()
