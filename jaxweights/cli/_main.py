"""The command `jaxweights`: its arguments, its errors, its exit codes."""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # 130: as shells report Ctrl-C

COMMANDS = ("quantize", "run", "merge", "plan", "inspect", "compare", "convert")

_DESCRIPTION = """\
Changes the weights of trained models: prunes, quantizes, adapts, merges, and shows what it cost.

Commands take seconds to minutes; all of them write messages and progress to standard error, and
their result to standard output, with --json in a form for programs."""

_EPILOG = """\
example:
  jaxweights run configs/quickstart.yaml

exit codes:
  0    done
  1    refused or failed; nothing was written
  2    the command line was wrong
  130  interrupted by Ctrl-C"""


class _Parser(argparse.ArgumentParser):
    """Says which command is nearest to a misspelt one."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the usage and one sentence."""
        if "invalid choice" in message and self.prog == "jaxweights":
            from difflib import get_close_matches

            typed = message.split("'")[1]
            close = get_close_matches(typed, COMMANDS, n=1, cutoff=0.3)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            message = f"there is no command {typed!r}.{hint} Commands: {', '.join(COMMANDS)}."
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: Those of the command line; None takes the program's own.

    Returns:
      The exit code: 0 done, 1 refused or failed.

    Example:
      >>> main(["inspect", "no/such/folder"])
      1
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return USAGE
    # Modules of commands import the library only when executed, so that help comes at once.
    command = importlib.import_module(f"jaxweights.cli._{options.command}")
    gc.freeze()  # hundreds of thousands of imported objects stay, and need no looking through
    try:
        result, text = command.execute(options)
    except KeyboardInterrupt:
        _say(f"interrupted; {getattr(command, 'INTERRUPTED', 'nothing was written')}", options)
        return INTERRUPTED
    except BrokenPipeError:
        return OK
    except Exception as error:
        if options.debug:
            raise
        message = _clean(error, options.command)
        _say(_in_its_words(message, getattr(command, "WORDS", ())), options)
        return FAILED
    try:
        print(_as_json(result) if options.json else text, flush=True)
    except BrokenPipeError:  # `| head` closed its end
        sys.stderr.close()
    return OK


def _as_json(result: dict[str, Any]) -> str:
    from jaxweights.checkpoint._json import sayable

    return json.dumps(sayable(result), ensure_ascii=False, allow_nan=False)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="jaxweights",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="say the version and stop")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"jaxweights.cli._{name}")
        command = subparsers.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        common = command.add_argument_group("common")
        common.add_argument("--json", action="store_true", help="print the result as JSON")
        common.add_argument("--quiet", action="store_true", help="show no progress")
        common.add_argument(
            "--debug", action="store_true", help="show where an error arose, with its traceback"
        )
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from jaxweights.checkpoint import Provenance

        versions = Provenance.collect(recipe={}).versions
        print(" ".join(f"{name} {version}" for name, version in versions.items()))
        parser.exit(OK)


def _clean(error: Exception, command: str) -> str:
    """An error as its reader needs it: the message, and the kind only where it says something.

    Example:
      >>> words = "jaxweights merge: 'out' exists. Remove it, or say overwrite=True."
      >>> _clean(FileExistsError(words), "merge")
      "'out' exists. Remove it, or say --overwrite."
    """
    message = str(error).strip()
    if isinstance(error, OSError) and error.errno is not None:
        message = _of_system(error)
    if isinstance(error, KeyError) and error.args:
        message = str(error.args[0])  # KeyError quotes its message
    message = message.removeprefix(f"jaxweights {command}: ")
    message = message.replace("say overwrite=True", "say --overwrite")
    if isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError | KeyError):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _in_its_words(message: str, words: Sequence[tuple[str, str]]) -> str:
    """A message of the library, with how a command says what it speaks of.

    Example:
      >>> print(_in_its_words("bits=9 must lie in [2, 8].", [("bits=", "bits is --bits")]))
      bits=9 must lie in [2, 8].
      (bits is --bits)
    """
    said = [here for pattern, here in words if re.search(pattern, message)]
    return message + (f"\n({'; '.join(said)})" if said else "")


_REMEDIES = {
    errno.ENOSPC: "Free some space or choose another disk.",
    errno.EDQUOT: "Free some space or choose another disk.",
    errno.EACCES: "Change its permissions or choose another path.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.ENOENT: "Check the path.",
}


def _of_system(error: OSError) -> str:
    """What the system refused, without its number: where, why, and what helps.

    Example:
      >>> _of_system(PermissionError(errno.EACCES, "Permission denied", "out"))
      "'out': permission denied. Change its permissions or choose another path."
    """
    code, words = error.errno or 0, str(error.strerror)
    if words != os.strerror(code):  # the library's own sentences, which name path and remedy
        return words
    where = f"'{error.filename}': " if error.filename is not None else ""
    remedy = _REMEDIES.get(code, "")
    return f"{where}{words[:1].lower()}{words[1:]}. {remedy}".strip()


def _say(message: str, options: argparse.Namespace) -> None:
    print(f"jaxweights {options.command}: {message}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"error": message}, ensure_ascii=False), flush=True)
