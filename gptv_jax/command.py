"""What the commands share: flags, --help, and errors as one sentence in place of a traceback."""

import difflib
import logging
import pathlib
import re
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gptv_jax import config as config_lib
from gptv_jax import errors, files, hardware, hosts
from gptv_jax.config import fields, run_file
from gptv_jax.errors import InputError
from gptv_jax.hosts import distributed, runtime, stopping

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


def start(main: Callable[[config_lib.Config], None]) -> None:
    """Runs `main(config)` as `run` does, with the configuration of the --config flag."""
    holder = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
    flags.mark_flag_as_required("config")
    _show_in_help("config")
    run(lambda: main(config_lib.resolve(holder.value)), lambda argv: _parse(argv, holder))


def run(
    main: Callable[..., None], parser: Callable = flags.FLAGS, takes_names: bool = False
) -> None:
    """Parses the flags, calls `main()`, and ends with a sentence where the user can act on it.

    Arguments that are no flags are refused; where the command `takes_names` it is `main(names)`.

    Exit codes: 1 for an error that the user can mend, 70 for an unexpected error, 75 where another
    process died, 130 after an interrupt by the user, 143 after SIGTERM.
    """

    def configured(argv: list[str]) -> None:
        if argv[1:] and not takes_names:
            raise InputError(f"{argv[1]} is no flag; a flag is --name=value (see --help).")
        log = logging.getLogger("gptv_jax")
        log.setLevel(logging.WARNING if QUIET.value else logging.INFO)
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every action
        jax.config.update("jax_numpy_rank_promotion", "raise")
        main(argv[1:]) if takes_names else main()
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
    stopping.install()
    runtime.keep_memory()
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
        if problem := errors.disk_problem(error):
            _refuse(f"{problem}; {FREE_DISK}")
        try:
            hardware.devices()
        except InputError as unavailable:  # and everything that computes fails
            _refuse(str(unavailable))
        distributed.wait_for_abort(error)
        errors.end(UNEXPECTED, traceback.format_exc())


def _show_in_help(flag: str) -> None:
    """Lists the flag in --help: of the module that runs as the command, named sys.argv[0]."""
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag])


def _refuse(message: str) -> NoReturn:
    """Ends by an error of one line; a message too long for a line comes before it, whole."""
    line = errors.cut(f"error: {message}", errors.LONGEST, end=130)
    if not line.endswith(message):
        print(f"In full: {message}", file=sys.stderr)
    errors.end(1, line)


def _run_folder(value: str) -> pathlib.Path | None:
    """The run folder that --config names by itself or by its config.json; None: it names a file."""
    path = files.user_path(value)
    if path.name == "config.json" and path.is_file():
        return path.parent
    return path if path.is_dir() else None


def _parse(argv: list[str], holder: flags.FlagHolder) -> list[str]:
    """Parses flags and fields of the configuration; returns the arguments that are neither.

    Raises:
      InputError: a field is unknown or has a wrong value, or the config file fails.
      flags.Error: as absl raises it, for the other flags.
    """
    kinds = {n: fields.type_words(f) for n, f in fields.by_name(config_lib.Config).items()}
    overrides = {a: m[1] for a in argv[1:] if (m := re.match(r"--?config\.([^=]+)", a))}
    for name in overrides.values():
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            section = name.rpartition(".")[0]
            siblings = [n for n in kinds if n.rpartition(".")[0] == section] or list(kinds)
            hint = f"did you mean --config.{near[0]}? " if near else ""
            raise InputError(
                f"--config.{name} is not a field; {hint}There are: {errors.shorten(siblings)}."
            )
    # ml_collections cannot set a field that holds a value to None; this is done after parsing.
    none = {a: n for a, n in overrides.items() if a.partition("=")[2] == "None"}
    none = {a: n for a, n in none.items() if kinds[n].endswith("or None")}
    for index, argument in enumerate(argv[1:-1], start=1):
        if argument in ("--config", "-config"):
            argv = [*argv[:index], f"--config={argv[index + 1]}", *argv[index + 2 :]]
    given = next((a for a in argv[1:] if re.match(r"--?config=", a)), "--config")
    value = given.partition("=")[2]
    file, colon, own_argument = value.partition(":")
    if value and (run := _run_folder(value)):
        config_lib.of_run(run)  # refuses other folders
        file, colon, own_argument = run_file.__file__, ":", str(run)
    elif file:
        file = str(files.user_path(file))
        if not pathlib.Path(file).is_file():
            raise InputError(f"{given}: there is no file {file}.")
    argv = [f"--config={file}{colon}{own_argument}" if a == given else a for a in argv]
    try:
        remaining = flags.FLAGS([a for a in argv if a not in none])
        settings = holder.value  # raises an error of loading the file
        if none:
            with settings.ignore_type():
                settings.update_from_flattened_dict(dict.fromkeys(none.values()))
        return remaining
    except Exception as error:  # of the flags, or any error of the user's config file
        message, of_flags = str(error).strip(), isinstance(error, flags.Error)
        override = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
        if override and override[1] in kinds:
            name, value = override.groups()
            raise InputError(f"--config.{name} is {value!r}; it takes {kinds[name]}.") from error
        if of_flags and (_MISSING.match(message) or not message.startswith("flag --config")):
            raise
        reason = message.rpartition("\n")[2].strip()  # the last line, where it has a traceback
        kind = "" if of_flags else f"{type(error).__name__}: "
        raise InputError(f"{given} cannot be loaded: {kind}{reason}") from error
