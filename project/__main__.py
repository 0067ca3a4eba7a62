"""The console script: runs the command line and turns users' errors into one sentence."""

import itertools
import os
import sys
import warnings


def main() -> None:
    """Entry point of ``project`` and ``python -m project``."""
    from project.logger import setup_logging

    setup_logging()
    warnings.filterwarnings("ignore", ".*isinstance.*LeafSpec.*")
    try:
        if _names_model_file(sys.argv[1:]):
            _predict_with_model_file(sys.argv[1], sys.argv[2:])
        else:
            from project.cli import CLI

            CLI()
    except (ValueError, OSError) as error:
        if os.environ.get("PROJECT_DEBUG"):
            raise
        from project.parser import one_sentence

        sys.stderr.write(f"error: {one_sentence(str(error))}\n")
        sys.exit(2)


def _names_model_file(args: list[str]) -> bool:
    """Whether ``--model`` names a deployed model; ``--model CONFIG.yaml`` is LightningCLI's."""
    values = [value for option, value in itertools.pairwise([*args, ""]) if option == "--model"]
    values += [arg.removeprefix("--model=") for arg in args if arg.startswith("--model=")]
    return any(not value.endswith((".yaml", ".yml", ".json")) for value in values)


def _predict_with_model_file(verb: str, args: list[str]) -> None:
    if verb != "predict":
        raise ValueError(
            f"{verb} does not take a model file: project predict --model FILE does, and project benchmark --run DIR "
            "measures those in a run's folder."
        )
    from jsonargparse import auto_cli

    from project.model_file import predict
    from project.parser import Parser

    auto_cli(predict, args=args, parser_class=Parser, as_positional=False)


if __name__ == "__main__":
    main()
