"""Entry point of the `coserve` command: the commands, and what becomes of their errors.

Exit codes: 0 good, 1 a failure, 2 wrong usage or configuration, 130 on Ctrl-C. An error is one line on
standard error; a traceback only ever means a fault of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from coserve import __version__
from coserve.cli import adapters, bench, chat, finetune, jobs, keys, serve
from coserve.cli.failure import CommandFailed
from coserve.cli.vllm_flags import ours
from coserve.errors import ConfigError, CoserveError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
# typer has click inside it or beside it, by version; this is the base of that click's errors.
_UsageFailure = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="coserve",
    help="Serve a language model and fine-tune adapters of it on one copy of the weights.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
app.command("finetune")(finetune.finetune)
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(keys.app, name="keys")
app.command("chat")(chat.chat)
app.command("bench", context_settings={"ignore_unknown_options": True, "help_option_names": []})(bench.bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"coserve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name) and return its exit code."""
    try:
        if list(arguments[:1]) == ["serve"]:
            arguments, said = ours(arguments)
            for sentence in said:
                print(f"coserve: {sentence}", file=sys.stderr)
        code = typer.main.get_command(app).main(list(arguments), "coserve", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except _UsageFailure as error:
        return _refuse(error.format_message(), EXIT_USAGE)
    except CommandFailed as error:
        return _refuse(str(error), error.exit_code)
    except ConfigError as error:
        return _refuse(error.message, EXIT_USAGE)
    except CoserveError as error:
        return _refuse(error.message, EXIT_FAILURE)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing is left to say to it
        return EXIT_FAILURE
    return code if isinstance(code, int) else 0


def _refuse(message: str, code: int) -> int:
    line = " ".join(message.split()) or "missing command; coserve --help lists them"
    print(f"coserve: {line}", file=sys.stderr)
    return code


def main() -> None:
    """What the installed `coserve` script calls."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
