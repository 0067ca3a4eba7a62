"""The console script: runs the command line and turns users' errors into one sentence."""

import itertools
import os
import sys
import time
import traceback
from pathlib import Path

_BUG = """
This is a bug of the program, not a mistake of yours. Please report it: the lines above, your command, and your
configuration or the run's config.yaml. The form is .github/ISSUE_TEMPLATE/bug.yml.
"""


def main() -> None:
    """Entry point of ``project`` and ``python -m project``."""
    from project.frame.errors import sentence  # now, because a process that has no free file handle cannot load it
    from project.frame.logger import leave_stdout, setup_logging

    setup_logging()
    if (folder := str(Path.cwd())) not in sys.path and not sys.flags.safe_path:
        sys.path.insert(0, folder)  # as `python -m project` does: a class_path may name a file of one's own
    try:
        if sys.argv[1:2] == ["unpack"] or _names_model_file(sys.argv[1:]):
            from project.frame.rooms import needed

            needed("deployment.model_verbs", "a model file").run(sys.argv[1], sys.argv[2:])
        else:
            from project.frame.cli import CLI

            CLI()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads the output any more
        leave_stdout()
        sys.exit(141)  # as shells have it after SIGPIPE
    except Exception as error:
        text = sentence(error)
        if os.environ.get("PROJECT_DEBUG"):
            raise
        if text is None:
            traceback.print_exc()
            sys.stderr.write(_BUG)
        elif not _first_process_tells():
            sys.unraisablehook = lambda _: None  # a loader that is not whole fails once more when it is deleted
            sys.stderr.write(f"error: {text}\n")
        sys.exit(1 if text is None else 2)
    except (KeyboardInterrupt, SystemExit) as error:
        sys.exit(_status(error))


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


if __name__ == "__main__":
    main()
