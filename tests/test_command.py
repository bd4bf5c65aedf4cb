"""What the commands share: --help, and what reaches the user on stderr."""

import pathlib
import re

import pytest

from gptv_jax.stages import STAGES

PACKAGE = pathlib.Path(__file__).parent.parent / "gptv_jax"


@pytest.mark.parametrize("module", ["main", "plan", "prepare", "convert"])
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
