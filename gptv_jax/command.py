"""What the commands share: the --config flag, and errors as one sentence instead of a traceback."""

import difflib
import functools
import logging
import operator
import pathlib
import re
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gptv_jax import config as config_lib
from gptv_jax import errors, hosts
from gptv_jax.config import fields
from gptv_jax.errors import InputError, first_line
from gptv_jax.hosts import distributed, runtime, stopping

UNEXPECTED = 70  # exit code; sysexits.h: internal error. A network's failure may be one
_MISSING = re.compile(r"flag --(\w+)=None: ")
_NONE = re.compile(r"--?config\.([^=]+)=None$")


def start(main: Callable[[config_lib.Config], None]) -> None:
    """Runs `main(config)` as `run` does, with the configuration of the --config flag."""
    holder = config_flags.DEFINE_config_file(
        "config", None, "Configuration file, FILE[:ARG]; its fields are --config.a.b=value."
    )
    flags.mark_flag_as_required("config")
    run(lambda: main(config_lib.resolve(holder.value)), functools.partial(parse, holder))


def run(main: Callable[[], None], parser: Callable | None = None) -> None:
    """Parses the flags, calls `main()`, and ends with a sentence where the user can mend it.

    Exit codes: 1 for what the user can mend, 70 for what nobody expected, 75 where another process
    died, 130 where the user interrupted, 143 after SIGTERM.
    """

    def configured(argv: list[str]) -> None:
        if argv[1:]:
            raise InputError(f"{argv[1]} is no flag; a flag is --name=value (see --help).")
        logging.getLogger("gptv_jax").setLevel(logging.INFO)
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.ERROR)  # libraries: Orbax tells its every move
        jax.config.update("jax_numpy_rank_promotion", "raise")
        main()
        distributed.stop()

    stopping.install(_interrupted)
    runtime.keep_memory()
    try:
        app.run(configured, flags_parser=parser or _parse_flags)
    except InputError as error:
        _end(1, f"error: {error}", str(error))
    except hosts.StoppedError as stopped:
        distributed.stop()  # none of several processes leaves before the others have saved
        errors.end(stopping.EXIT_CODE, str(stopped))
    except Exception as error:
        distributed.settle()
        reason = f"{type(error).__name__}: {first_line(error)}"
        _end(UNEXPECTED, traceback.format_exc(), reason)


def _interrupted() -> NoReturn:
    told = "interrupted; the same command continues from the last checkpoint"
    _end(130, told, "it was interrupted")


def _end(code: int, message: str, reason: str) -> NoReturn:
    """Ends this process with the message, and all others with the reason."""
    distributed.tell(reason, code)
    errors.end(code, message)


def _parse_flags(argv: list[str]) -> list[str]:
    """Absl's flag parser, with what goes wrong in it as `InputError`."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        raise _of_flags(error) from error


def _of_flags(error: flags.Error) -> InputError:
    missing = _MISSING.match(str(error))
    told = f"--{missing[1]} must be given" if missing else str(error)
    return InputError(f"{told} (see --help).")


def parse(holder: flags.FlagHolder, argv: list[str]) -> list[str]:
    """As `_parse_flags`, with what goes wrong in the config file as well."""
    kinds = {n: fields.type_words(f) for n, f in fields.by_name(config_lib.Config).items()}
    for argument in argv[1:]:
        override = re.match(r"--?config\.([^=]+)", argument)
        if override and override[1] not in kinds:
            near = difflib.get_close_matches(override[1], kinds, n=1)
            section = override[1].rpartition(".")[0]
            near_by = [n for n in kinds if n.rpartition(".")[0] == section] or list(kinds)
            hint = f"did you mean --config.{near[0]}? " if near else ""
            raise InputError(
                f"--config.{override[1]} is not a field; {hint}There are: {', '.join(near_by)}."
            )
    # ml_collections has no word for None where a field holds a value; it is set here, at the end.
    none = [a for a in argv[1:] if (m := _NONE.match(a)) and kinds[m[1]].endswith("or None")]
    argv = [a for a in argv if a not in none]
    given = next((a for a in argv[1:] if re.match(r"--?config=", a)), "--config")
    file = given.partition("=")[2].partition(":")[0]
    if file and not pathlib.Path(file).exists():
        raise InputError(f"{given}: there is no file {file}.")
    try:
        remaining = flags.FLAGS(argv)
        settings = holder.value  # raises here what went wrong in loading the file
        for argument in none:
            *sections, field = _NONE.match(argument)[1].split(".")
            section = functools.reduce(operator.getitem, sections, settings)
            with section.ignore_type():
                section[field] = None
    except flags.IllegalFlagValueError as error:
        override = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if override and override[1] in kinds:
            name, value = override.groups()
            raise InputError(f"--config.{name} is {value!r}; it takes {kinds[name]}.") from error
        if _MISSING.match(str(error)) or not str(error).startswith("flag --config"):
            raise _of_flags(error) from error
        raise InputError(f"{given} cannot be loaded: {_last_line(error)}") from error
    except flags.Error as error:
        raise _of_flags(error) from error
    except Exception as error:  # whatever the user's config file raises
        reason = f"{type(error).__name__}: {_last_line(error)}"
        raise InputError(f"{given} cannot be loaded: {reason}") from error
    return remaining


def _last_line(error: Exception) -> str:
    """Where a traceback was put into the message, its last line says what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else ""
