"""The command ``mel``: one small module for each of its commands.

A command is a module with ``add_arguments(parser)`` and ``run(arguments)`` that enrols under the entry point group
``mel.commands``. Its docstring is its help: the first line in the list of commands, the whole under ``--help``. Only
the module of the command that was asked for is imported; the others' docstrings are read from their source.
"""

import argparse
import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from melcore import __version__
from melcore.errors import MelError

_GROUP = "mel.commands"


def _docstring(entry: EntryPoint) -> str | None:
    """Docstring of a command's module without importing it; None where the module is not installed."""
    try:
        spec = importlib.util.find_spec(entry.module)
    except ImportError:
        return None
    if spec is None or spec.origin is None:
        return None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or entry.name


def _build_parser(chosen: str | None) -> tuple[argparse.ArgumentParser, dict[str, EntryPoint]]:
    """Make the parser of ``mel``, with the arguments of the command `chosen` alone."""
    parser = argparse.ArgumentParser(
        prog="mel",
        description="Memory-efficient learning for high-dimensional MRI reconstruction.",
        epilog="mel COMMAND --help explains a command and shows an example.",
    )
    parser.add_argument("--version", action="version", version=f"mel {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    entries = {}
    for entry in sorted(entry_points(group=_GROUP), key=lambda entry: entry.name):
        text = _docstring(entry)
        if text is None:
            continue
        entries[entry.name] = entry
        command = commands.add_parser(
            entry.name,
            help=text.splitlines()[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if entry.name == chosen:
            importlib.import_module(entry.module).add_arguments(command)
    return parser, entries


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _dispatch(arguments: Sequence[str]) -> int:
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser, entries = _build_parser(chosen)
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse: 0 after --help, 2 for usage errors
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    result: int | None = importlib.import_module(entries[parsed.command].module).run(parsed)
    return result or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``mel`` and return its exit code: 0 done, 1 failed (one line on stderr), 2 usage.

    Parameters
    ----------
    argv
        Arguments after ``mel``; those of the process when None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = " ".join(["mel", *[argument for argument in arguments[:1] if not argument.startswith("-")]])
    try:
        code = _dispatch(arguments)
        # A reader that went away (mel info | head) shows only when the last of the output is written.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to go. 141 is what a shell reports for SIGPIPE.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("MEL_DEBUG"):
            traceback.print_exc()
        if isinstance(error, MelError):
            print(f"{name}: {_one_line(error)}", file=sys.stderr)
        else:
            kind = type(error).__name__
            print(f"{name}: {kind}: {_one_line(error)} (MEL_DEBUG=1 shows the traceback)", file=sys.stderr)
        return 1
