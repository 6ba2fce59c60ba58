"""The command line of lm-evaluation-harness, which knows the model ``cipherlm`` and this package's tasks."""

import sys

from cipherlm.evaluation.harness import TASKS

_OPTION = "--include_path"


def with_tasks(arguments: list[str]) -> list[str]:
    """Return the harness's arguments with the folder of this package's tasks.

    The first argument is a subcommand, or an option of ``run``. A folder that is given already stays.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        return arguments
    if any(argument.split("=")[0] == _OPTION for argument in arguments):
        return arguments
    command = [] if arguments[0].startswith("-") else [arguments[0]]
    return [*(command or ["run"]), _OPTION, str(TASKS), *arguments[len(command) :]]


def main() -> None:
    """Run the harness. Raises ``SystemExit`` with one line where it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        sys.exit('lm-evaluation-harness is not installed: pip install "cipherlm[eval]"')

    import cipherlm.evaluation.harness.model  # noqa: F401 - registers the model

    sys.argv = [sys.argv[0], *with_tasks(sys.argv[1:])]
    cli_evaluate()


if __name__ == "__main__":
    main()
