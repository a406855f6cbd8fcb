"""The command line: its commands, defaults from moetrace.toml or pyproject.toml, errors and exit codes.

The only package that knows Typer, stdout and exit codes.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from moetrace.cli.completion import finding_names
from moetrace.cli.output import say
from moetrace.errors import MoetraceError, SettingError, lacks_memory
from moetrace.files import discard
from moetrace.frames import Later

USAGE = 2
INTERRUPTED = 130
# Matrices are small here: threads of BLAS would cost more than they give, on busy cores ten times as much.
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def explain(
    finding: Annotated[
        str | None, typer.Argument(help="Name of a finding. [default: all of them]", autocompletion=finding_names)
    ] = None,
) -> None:
    """Explain what a finding means and what to do about it.

    \b
    Example: moetrace explain imbalance
    """
    from moetrace.doctor import KINDS, check_known

    check_known([finding] if finding else [])
    for name in [finding] if finding else KINDS:
        sys.stdout.write(f"{name} ({KINDS[name].severity}): {KINDS[name].advice}\n")


def help_(command: Annotated[str | None, typer.Argument(help="Name of a command.")] = None) -> None:
    """Show the help of a command.

    \b
    Example: moetrace help states
    """
    raise typer.Exit(main([*([command] if command else []), "--help"]))


class Listed(NamedTuple):
    """A command of the listing: the first line of its help, and the module and the name of its function."""

    line: str
    module: str
    function: str


COMMANDS = {
    "ingest": Listed("Read dumps and logs into traces, and check them.", "ingest", "ingest"),
    "states": Listed("Show when the load of each layer became stable.", "states", "states"),
    "predict": Listed("Score forecasts of the load, and forecast the steps to come.", "predict", "predict"),
    "report": Listed("Generate an HTML report with figures and data.", "report", "report"),
    "place": Listed("Decide whether balancing is worth it, and place experts.", "place", "place"),
    "hot": Listed("Choose the experts to keep in fast memory.", "hot", "hot"),
    "compare": Listed("Compare the loads of two traces: does a plan transfer?", "compare", "compare"),
    "list": Listed("List the traces of the workspace.", "traces", "list_"),
    "remove": Listed("Remove traces and their results from the workspace.", "traces", "remove"),
    "check": Listed("Check traces for damage, gaps and idle experts.", "traces", "check"),
    "export": Listed("Export a trace to another format.", "traces", "export"),
    "explain": Listed("Explain what a finding means and what to do about it.", "", "explain"),
    "help": Listed("Show the help of a command.", "", "help_"),
}
# Shared options that a command does all it can do without.
WITHOUT = {
    "compare": ("expert_bytes",),
    "list": ("layers", "steps"),
    "remove": ("layers", "steps", "all", "show", "table", "no_progress"),
}


class Commands(TyperGroup):
    """The commands, each made of its function when it is called: to read all signatures takes longer than to list."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Later({name: partial(_made, name) for name in COMMANDS})  # type: ignore[assignment]

    def list_commands(self, _ctx: Any) -> list[str]:
        """Their names, in order."""
        return list(self.commands)

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        """Write each with the first line of its help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, own.line) for name, own in COMMANDS.items()])


def _made(name: str) -> Any:
    from moetrace.cli.options import Command, with_options

    module = import_module(f"{__name__}.{COMMANDS[name].module}".rstrip("."))
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, cls=Command)(with_options(getattr(module, COMMANDS[name].function), WITHOUT.get(name, ())))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="moetrace",
    cls=Commands,
    help="Analyse expert load in Mixture-of-Experts models: imbalance, stability, predictability, placement.",
    epilog="Start with: moetrace ingest, moetrace states, moetrace predict --horizon 2000, moetrace report, "
    "moetrace place --gpus 4",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"moetrace {version('moetrace')}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: ARG001 - handled by its callback
        bool, typer.Option("--version", "-V", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Analyse expert load in Mixture-of-Experts models: imbalance, stability, predictability, placement."""
    if debug:
        os.environ["MOETRACE_DEBUG"] = "1"


# Where defaults of options stand, in the working directory: the file, and the tables above them.
CONFIG = (("moetrace.toml", ()), ("pyproject.toml", ("tool", "moetrace")))


def defaults(group: Any) -> dict[str, dict[str, Any]]:
    """The defaults of each command of the *group*, from the first file of `CONFIG` that has any.

    A name such as ``gpus = 8`` is for every command that has the option, a table ``[place]`` for one.
    Raises `SettingError` for invalid TOML, and for an unknown option.
    """
    name, table = _configured()
    if not table:
        return {}
    known = {command: {option.name for option in own.params} for command, own in group.commands.items()}
    given: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        of_one = isinstance(value, dict) and key in known
        for option, setting in (value if of_one else {key: value}).items():
            own = option.replace("-", "_")
            able = [command for command in ([key] if of_one else known) if own in known[command]]
            if not able:
                raise SettingError(f"{name}: there is no option {option!r}; moetrace COMMAND --help lists them")
            for command in able:
                given.setdefault(command, {})[own] = setting
    return given


def _configured() -> tuple[str, dict[str, Any]]:
    """The first file of `CONFIG` that has defaults, and what it has; an empty table where none has any."""
    for name, tables in CONFIG:
        try:
            text = Path(name).read_text("utf-8")
            if tables and tables[-1] not in text:
                continue
            import tomllib  # not needed in most folders

            found: Any = tomllib.loads(text)
        except OSError:
            continue
        except ValueError as error:
            if not tables:
                raise SettingError(f"{name}: is no TOML: {error}") from None
            continue  # another tool's file, which is that tool's to complain about
        for table in tables:
            found = found.get(table, {}) if isinstance(found, dict) else {}
        if found and isinstance(found, dict):
            return name, found
    return "", {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors become one line on stderr."""
    os.environ.pop("MOETRACE_DEBUG", None)
    given = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the terminal has no character for is shown as its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        group = typer.main.get_command(app)
        code = group(args=given, prog_name="moetrace", default_map=defaults(group), standalone_mode=False)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except typer.Abort:
        say("nothing was done")
        return 1
    except Exception as error:  # a lack of memory has many types
        if hasattr(error, "format_message"):  # of Typer
            if "\n" in error.format_message():  # the help, where nothing was given
                sys.stderr.write(f"{error.format_message()}\n")
            else:
                say(_usage(error, given))
            return USAGE
        memory = lacks_memory(error)
        if "MOETRACE_DEBUG" in os.environ or not (memory or isinstance(error, MoetraceError | OSError)):
            raise
        if memory:
            say("out of memory: choose fewer layers or steps with --layers and --steps")
        elif isinstance(error, OSError):
            say(f"{error.filename or 'a file'}: {error.strerror or error}")
        else:
            say(str(error))
        return USAGE if isinstance(error, SettingError) else 1
    return code if isinstance(code, int) else 0


# What Typer says of a value, and how every other error says it.
PLAIN = (
    (r"^Invalid value(?: for '(?P<name>[^']*)')?: ", lambda found: f"{found['name']}: " if found["name"] else ""),
    (r": Input should be a valid integer.*", " is not a whole number"),
    (r": Input should be a valid number.*", " is not a number"),
    (r": Input should be greater than or equal to (\S+)", r" has to be \1 or more"),
    (r": Input should be less than or equal to (\S+)", r" has to be \1 or less"),
    (r"Value error, ", ""),
    (r"^Missing", "missing"),
    (r"^Option '(.*)' requires", r"option \1 requires"),
    (r"^Got unexpected extra argument\(s\) \((.*)\)", r"nothing more is expected here than options, got \1"),
    (r"^No such option: (\S+)", r"there is no option \1"),
    (r"\(Possible options: (.*)\)", r"(did you mean \1?)"),
)


def _usage(error: Any, given: Sequence[str]) -> str:
    """A usage error of Typer as one line, with the help that says more."""
    message: str = error.format_message()
    if strange := re.match(r"No such command '(.*?)'", message):
        from moetrace.settings import unknown

        message = str(unknown("command", strange[1], COMMANDS))
    for pattern, plain in PLAIN:
        message = re.sub(pattern, plain, message)
    command = next((f" {word}" for word in given if word in COMMANDS), "")  # an error in the last option has no context
    return f"{message.rstrip('.')} (see {error.ctx.command_path if error.ctx else f'moetrace{command}'} -h)"


def _leave(_signal: int, _frame: object) -> None:
    """Leave at once: an exception instead would be lost where a library's callback happens to run."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # a progress bar hides the cursor
    say("interrupted")
    discard()
    os._exit(INTERRUPTED)


def run() -> None:
    """The console script."""
    if sys.platform == "win32":  # locks, forks and paths of the workspace are those of POSIX, and tested there alone
        sys.exit("moetrace: runs on Linux and macOS, not on Windows: use it in WSL (Windows Subsystem for Linux)")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: whatever opens a file next would get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - kept to the end
    os.environ["MPLBACKEND"] = "agg"  # figures need none, but matplotlib refuses to load with an unknown one
    for name in BLAS_THREADS:  # read when numpy is loaded, by the command
        os.environ.setdefault(name, "1")
    signal.signal(signal.SIGINT, _leave)
    sys.exit(main())
