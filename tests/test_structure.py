"""The rules of the package's layout that no linter knows; `lint-imports` checks the imports."""

import dataclasses
import pathlib

import gptv_jax
from gptv_jax import config as config_lib
from gptv_jax.stages import STAGES

PACKAGE = pathlib.Path(gptv_jax.__file__).parent
FILES = {path.relative_to(PACKAGE): path.read_text() for path in PACKAGE.rglob("*.py")}


def test_the_package_has_at_most_twelve_modules_at_its_root():
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert len(modules) <= 12, sorted(modules)


def test_no_file_of_the_package_has_more_than_350_lines():
    long = {str(path): len(text.splitlines()) for path, text in FILES.items()}
    assert not {path: lines for path, lines in long.items() if lines > 350}


def test_no_module_uses_private_modules_of_jax():
    assert not [str(path) for path, text in FILES.items() if "jax._src" in text]


def test_every_stage_names_settings_and_code_that_exist():
    settings = {each.name for each in dataclasses.fields(config_lib.Config)}
    for name, stage in STAGES.items():
        assert stage.name == name and stage.run.__module__ == f"gptv_jax.stages.{name}"
        assert set(stage.sections) <= settings
        if stage.heading:
            assert stage.report.__name__ == name
        if stage.planning:
            assert set(stage.plan.sections) <= set(stage.sections)


def test_type_checkers_are_told_that_the_package_is_annotated():
    assert (PACKAGE / "py.typed").exists()
