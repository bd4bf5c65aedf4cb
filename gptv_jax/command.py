"""What the commands share: flags, --help, and errors as one sentence in place of a traceback."""

import difflib
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from gptv_jax import config as config_lib
from gptv_jax import errors, hosts
from gptv_jax.config import fields
from gptv_jax.errors import InputError
from gptv_jax.hosts import distributed, runtime, stopping

UNEXPECTED = 70  # exit code; sysexits.h: internal error. A network's failure may be one
CONFIG_HELP = (
    "Configuration file, FILE[:ARG]; ARG is an argument of the file, such as a size. "
    "--config.a.b=value overrides the field b of the section a, as in --config.train.steps=500; "
    "a wrong field name is refused with the names of the fields beside it."
)
_MISSING = re.compile(r"flag --(\w+)=None: ")


def start(main: Callable[[config_lib.Config], None]) -> None:
    """Runs `main(config)` as `run` does, with the configuration of the --config flag."""
    holder = config_flags.DEFINE_config_file("config", None, CONFIG_HELP)
    flags.mark_flag_as_required("config")
    # --help shows the flags of the module that runs as the command, which has the name sys.argv[0].
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
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
        logging.getLogger("gptv_jax").setLevel(logging.INFO)
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax logs every action
        jax.config.update("jax_numpy_rank_promotion", "raise")
        main(argv[1:]) if takes_names else main()
        stopping.leave()

    stopping.install()
    runtime.keep_memory()
    try:
        app.run(configured, flags_parser=parser)
    except InputError as error:
        errors.end(1, f"error: {error}")
    except flags.Error as error:
        missing = _MISSING.match(str(error))
        problem = f"--{missing[1]} must be given" if missing else error
        errors.end(1, f"error: {problem} (see --help).")
    except hosts.StoppedError as stopped:
        stopping.leave()  # no process leaves before the others have saved
        errors.end(stopping.STOPPED, str(stopped))
    except Exception as error:
        distributed.wait_for_abort(error)
        errors.end(UNEXPECTED, traceback.format_exc())


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
                f"--config.{name} is not a field; {hint}There are: {', '.join(siblings)}."
            )
    # ml_collections cannot set a field that holds a value to None; this is done after parsing.
    none = {a: n for a, n in overrides.items() if a.partition("=")[2] == "None"}
    none = {a: n for a, n in none.items() if kinds[n].endswith("or None")}
    given = next((a for a in argv[1:] if re.match(r"--?config=", a)), "--config")
    file = given.partition("=")[2].partition(":")[0]
    if file and not pathlib.Path(file).exists():
        raise InputError(f"{given}: there is no file {file}.")
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
