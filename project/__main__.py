"""The console script: runs the command line and turns users' errors into one sentence."""

import os
import sys
import warnings


def main() -> None:
    """Entry point of ``project`` and ``python -m project``."""
    from project.cli import CLI
    from project.logger import setup_logging

    setup_logging()
    warnings.filterwarnings("ignore", ".*isinstance.*LeafSpec.*")
    try:
        CLI()
    except (ValueError, OSError) as error:
        if os.environ.get("PROJECT_DEBUG"):
            raise
        from project.parser import one_sentence

        sys.stderr.write(f"error: {one_sentence(str(error))}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
