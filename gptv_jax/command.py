"""What the commands share: flags, --help, and errors as one sentence in place of a traceback.

A command reads its flags and checks its configuration before it imports JAX and the modules of its
work, which takes seconds: --help and a misspelt flag are answered at once. So the commands, and the
modules that they need for that, import JAX and whatever imports JAX by `epy.lazy_imports`: such a
module is imported when one of its names is first used. tests/test_command.py holds it.
"""

import difflib
import gc
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from etils import epy
from ml_collections import config_flags

from gptv_jax import config as config_lib
from gptv_jax import errors, hosts
from gptv_jax.config import fields, run_file
from gptv_jax.errors import InputError
from gptv_jax.hosts import cores, distributed, runtime, stopping

with epy.lazy_imports():
    import jax

READER_LEFT = 141  # exit code; of other programs that SIGPIPE ends
UNEXPECTED = 70  # exit code; sysexits.h: internal error. A network's failure may be one
HELP = {"--help", "-help", "-h", "-?", "--helpshort", "--helpfull"}
CONFIG_HELP = (
    "Configuration file, FILE[:ARG]; ARG is an argument of the file, such as a size. A run folder, "
    "or its config.json, stands for the configuration of that run. "
    "--config.a.b=value overrides the field b of the section a, as in --config.train.steps=500; "
    "a wrong field name is refused with the names of the fields beside it."
)
FREE_DISK = "make room and give the same command again; what was saved is whole."
QUIET = flags.DEFINE_bool("quiet", False, "Only warnings, errors and the result.")
_MISSING = re.compile(r"flag --(\w+)=None: ")


def start(
    main: Callable[[config_lib.Config], None],
    work: Sequence[Any] = (),
    again: str = stopping.BEGINS_ANEW,
) -> None:
    """Runs `main(config)` as `run` does, with the configuration of the --config flag."""
    holder = flags.DEFINE_string("config", None, CONFIG_HELP, allow_override=True)
    flags.mark_flag_as_required("config")
    _show_in_help("config")
    run(main, work, _parse, lambda: (config_lib.resolve(holder.value),), again=again)


def run(
    main: Callable[..., None],
    work: Sequence[Any] = (),
    parser: Callable = flags.FLAGS,
    given: Callable[[], tuple] = tuple,
    takes_names: bool = False,
    again: str = stopping.BEGINS_ANEW,
) -> None:
    """Parses the flags, calls `main`, and ends with a sentence where the user can act on it.

    The arguments of `main` are those that `given()` returns, before JAX is imported; where the
    command `takes_names` the list of the arguments that are no flags, else refused, comes first.
    `work` is the modules of lazy imports that `main` will use, which are imported with JAX.
    `again` says what a new start of the command does, after SIGTERM or an interrupt.
    Exit codes: 1 for an error that the user can mend, 70 for an unexpected error, 75 where another
    process died, 130 after an interrupt by the user, 141 where nobody reads the output any more,
    143 after SIGTERM.
    """

    def configured(argv: list[str]) -> None:
        if argv[1:] and not takes_names:
            raise InputError(f"{argv[1]} is no flag; a flag is --name=value (see --help).")
        log = logging.getLogger("gptv_jax")
        log.setLevel(logging.WARNING if QUIET.value else logging.INFO)
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every action
        arguments = (argv[1:], *given()) if takes_names else given()
        cores.check_environment()
        _import([jax, *work])
        jax.config.update("jax_numpy_rank_promotion", "raise")
        main(*arguments)
        sys.stdout.flush()
        stopping.leave()

    def in_thread(failed: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread would leave the run waiting for it.
        if problem := errors.disk_problem(failed.exc_value):
            _refuse(f"{problem}; {FREE_DISK}")
        threading.__excepthook__(failed)

    def in_callback(failed) -> None:
        # After a save has failed, tensorstore calls back to where nobody listens any more.
        if str(failed.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(failed)

    _show_in_help("quiet")
    runtime.keep_memory()  # before a thread of Python starts
    stopping.install(again)
    threading.excepthook, sys.unraisablehook = in_thread, in_callback
    try:
        app.run(configured, ["--help" if a == "-h" else a for a in sys.argv], flags_parser=parser)
    except SystemExit as ended:
        # The exit code of absl's --help is 1.
        raise SystemExit(0 if HELP & set(sys.argv[1:]) else ended.code) from None
    except InputError as error:
        _refuse(str(error))
    except flags.Error as error:
        missing = _MISSING.match(str(error))
        problem = f"--{missing[1]} must be given" if missing else error
        _refuse(f"{problem} (see --help).")
    except hosts.StoppedError as stopped:
        stopping.leave()  # no process leaves before the others have saved
        errors.end(stopping.STOPPED, str(stopped))
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            try:
                print(flush=True)
            except BrokenPipeError:  # the reader of the output, as `| head -1` is one, has left
                os._exit(READER_LEFT)
        if problem := errors.disk_problem(error):
            _refuse(f"{problem}; {FREE_DISK}")
        distributed.wait_for_abort(error)
        errors.end(UNEXPECTED, traceback.format_exc())


def _import(modules: Sequence[Any]) -> None:
    """Imports modules of lazy imports.

    Imports make many objects and no garbage. Looking for garbage among them takes a sixth of the
    time here, and some of every later collection, so the collector is off and then leaves them out.
    """
    gc.disable()
    for module in modules:
        _ = module.__name__  # the first use of a name imports the module
    gc.freeze()
    gc.enable()


def _show_in_help(flag: str) -> None:
    """Lists the flag in --help: of the module that runs as the command, named sys.argv[0]."""
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag])


def _refuse(message: str) -> NoReturn:
    """Ends by an error of one line; a message too long for a line comes before it, whole."""
    line = errors.cut(f"error: {message}", errors.LONGEST, end=130)
    if not line.endswith(message):
        print(f"In full: {message}", file=sys.stderr)
    errors.end(1, line)


def _parse(argv: list[str]) -> list[str]:
    """Parses flags and fields of the configuration; returns the arguments that are neither."""
    kinds = {n: fields.type_words(f) for n, f in fields.by_name(config_lib.Config).items()}
    overrides = {a: m[1] for a in argv[1:] if (m := re.match(r"--?config\.([^=]+)", a))}
    for name in overrides.values():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            section = name.rpartition(".")[0]
            siblings = [n for n in kinds if n.rpartition(".")[0] == section] or list(kinds)
            hint = f"did you mean --config.{near[0]}? " if near else ""
            problem = f"--config.{name} is not a field"
            raise InputError(f"{problem}; {hint}There are: {errors.shorten(siblings)}.")
    # ml_collections cannot set a field that holds a value to None; this is done after parsing.
    none = {a: n for a, n in overrides.items() if a.partition("=")[2] == "None"}
    none = {a: n for a, n in none.items() if kinds[n].endswith("or None")}
    for index, argument in enumerate(argv[1:-1], start=1):
        if argument in ("--config", "-config"):
            argv = [*argv[:index], f"--config={argv[index + 1]}", *argv[index + 2 :]]
    given = [a.partition("=")[2] for a in argv[1:] if re.match(r"--?config=", a)]
    argv = [argv[0], *(a for a in argv[1:] if not re.match(r"--?config=", a))]
    if given:  # in place of the flag that holds the text
        settings = run_file.load(given[-1])
        config_flags.DEFINE_config_dict("config", settings, sys_argv=argv, allow_override=True)
    try:
        # Without a configuration no field can be parsed, and the flag --config is missing.
        remaining = flags.FLAGS([a for a in argv if a not in (none if given else overrides)])
    except flags.Error as error:
        override = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error).strip(), re.DOTALL)
        if override and override[1] in kinds:
            name, value = override.groups()
            raise InputError(f"--config.{name} is {value!r}; it takes {kinds[name]}.") from error
        raise
    if none:
        with settings.ignore_type():
            settings.update_from_flattened_dict(dict.fromkeys(none.values()))
    return remaining
