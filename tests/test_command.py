"""What the commands share: --help, and what reaches the user on stderr."""

import pathlib
import pydoc
import re
import subprocess
import sys

import pytest

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax.stages import STAGES

COMMANDS = ["main", "plan", "prepare", "convert", "predict"]
# Packages whose imports take long; all of them stand on JAX, or are needed by some stage alone.
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "sklearn", "scipy", "matplotlib"}
HEAVY |= {"tensorboardX", "pyarrow", "tensorflow_datasets"}
PACKAGE = pathlib.Path(__file__).parent.parent / "gptv_jax"


@pytest.mark.parametrize("module", [m for m in COMMANDS if m != "predict"])
def test_help_names_every_flag_and_shows_an_example(command, module):
    source = (PACKAGE / f"{module}.py").read_text()
    names = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source)
    ended = command(module, "--help")
    shown = ended.output
    assert names
    for name in names + ["config"] * (module != "convert"):
        assert re.search(rf"^  --(\[no\])?{name}: ", shown, re.MULTILINE), name
    assert ended.code == 0 and "--[no]quiet" in shown
    assert shown.count(f"\npython -m gptv_jax.{module} --") >= 2
    words = " ".join(shown.split())
    if module != "convert":
        assert "FILE[:ARG]" in words and "--config.a.b=value overrides" in words
    if module == "main":
        assert all(stage in words for stage in STAGES)


@pytest.mark.process
def test_only_the_package_s_own_words_reach_the_user(finished_run):
    modules = {path.name for path in PACKAGE.rglob("*.py")}
    for line in finished_run.errors.splitlines():
        logged = re.match(r"[IW]\d{4} [\d:.]+ +\d+ (\w+\.py):\d+\] ", line)
        field = line.startswith("  ")  # the configuration, a field a line
        assert line.startswith("import time:") or field or (logged and logged[1] in modules), line


def imported(*arguments: str) -> set[str]:
    """The packages that a Python imports with these arguments, which ends as the user expects."""
    command = [sys.executable, "-X", "importtime", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in ended.stderr, ended.stderr[-2000:]
    lines = re.findall(r"^import time:.*\| *([\w.]+)$", ended.stderr, re.MULTILINE)
    return {name.partition(".")[0] for name in lines}


@pytest.mark.process
@pytest.mark.parametrize("module", COMMANDS)
def test_help_imports_no_library_that_a_stage_needs(module):
    found = imported("-m", f"gptv_jax.{module}", "--help")
    assert "absl" in found and not found & HEAVY


MISTAKES = {
    "unknown flag": "--stage=probe",
    "unknown field": "--config.train.step=3",
    "word for a number": "--config.train.steps=many",
    "value out of range": "--config.model.dropout=1.5",
    "fields that do not fit each other": "--config.model.heads=3",
}


@pytest.mark.process
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_settings_is_found_before_jax_is_imported(tmp_path, mistake):
    digits = PACKAGE.parent / "configs" / "digits.py"
    given = [f"--config={digits}", f"--workdir={tmp_path / 'run'}", MISTAKES[mistake]]
    found = imported("-m", "gptv_jax.main", *given)
    assert "ml_collections" in found and not found & HEAVY
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_garbage_is_not_looked_for_among_what_a_command_imports():
    main = "lambda: print(gc.isenabled(), gc.get_freeze_count())"
    lines = [
        "import gc, sys",
        "from etils import epy",
        "from gptv_jax import command",
        "with epy.lazy_imports(): import gptv_jax.sharding as work",
        "sys.argv = ['command']",
        f"command.run({main}, [work])",
    ]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    enabled, frozen = ended.stdout.split()
    assert enabled == "True" and int(frozen) > 100_000, ended.stderr


@pytest.mark.process
def test_the_package_imports_jax_when_the_python_interface_is_used():
    settings = "import gptv_jax; dir(gptv_jax); gptv_jax.config.default(); gptv_jax.train"
    assert not imported("-c", settings) & HEAVY
    assert imported("-c", "import gptv_jax; gptv_jax.load") > {"jax", "flax"}


def test_the_package_shows_the_python_interface():
    assert {*gptv_jax.__all__} <= {*dir(gptv_jax)}
    page = pydoc.plain(pydoc.render_doc(gptv_jax))
    for name in gptv_jax.__all__:
        assert name in page and callable(getattr(gptv_jax, name))
    assert gptv_jax.load.__doc__.splitlines()[0] in page
    assert gptv_jax.config is config_lib
    assert not hasattr(gptv_jax, "nothing") and not hasattr(gptv_jax, "_nothing")
