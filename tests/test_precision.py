"""In which dtype a run computes on a CPU that asks for bfloat16."""

import json
import logging

import jax
import pytest
from conftest import SMALL

from gptv_jax import config as config_lib
from gptv_jax import hardware
from gptv_jax.config import fields, run_file
from gptv_jax.errors import InputError
from gptv_jax.stages import changes, precision, setup

pytestmark = pytest.mark.usefixtures("one_device")
SLOW, FAST = "flags : fpu avx2 avx512f", f"flags : fpu {precision.FLAG} avx512f"


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """`opened(flags, version, folder, working, **model)`: the dtype of the run and of its record.

    `working` says whether the run leaves work of a stage.
    """

    def open_run(flags, version=precision.JAX, folder="run", working=True, **model):
        monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
        monkeypatch.setattr(jax, "__version_info__", version)
        given = {f"model.{name}": value for name, value in model.items()}
        flat = fields.flatten(config_lib.Config()) | SMALL | {"model.dtype": "bfloat16"} | given
        config = config_lib.resolve(fields.unflatten(flat))
        context = setup.open_run(config, str(tmp_path / folder))
        context.log.close()
        context.folder.release()
        if working:
            (tmp_path / folder / "summary.json").write_text('{"sample/images": 1}')
        assert run_file.config_of(tmp_path / folder) == context.config
        return context.config.model.dtype

    return open_run


def test_bfloat16_is_taken_only_where_processor_and_jax_are_faster_in_it():
    assert precision.is_faster(FAST, precision.JAX) and precision.is_faster(FAST, (1, 0, 0))
    assert not precision.is_faster(FAST, (0, 10, 2))
    for flags in (SLOW, f"flags : {precision.FLAG}_more", "", None):
        assert not precision.is_faster(flags, precision.JAX)


@pytest.mark.parametrize(("flags", "dtype"), [(SLOW, "float32"), (FAST, "bfloat16")])
def test_a_run_on_a_cpu_says_and_records_its_dtype_and_keeps_it(opened, caplog, flags, dtype):
    caplog.set_level(logging.INFO, "gptv_jax")
    for continued in (flags, SLOW, FAST):
        caplog.clear()
        assert opened(continued) == dtype
        said = [r.message for r in caplog.records if "in place of bfloat16" in r.message]
        assert len(said) == (dtype == "float32")


def test_a_folder_without_work_decides_anew(opened, tmp_path):
    folder = tmp_path / "run"
    assert changes.begun_run(str(folder)) is None
    assert opened(SLOW, working=False) == "float32" and changes.begun_run(str(folder)) is None
    assert opened(FAST, working=False) == "bfloat16"
    assert opened(SLOW) == "float32" and changes.begun_run(str(folder)) == folder


def test_a_user_keeps_bfloat16_and_float32_stays(opened):
    assert opened(SLOW, folder="kept", bfloat16_on_cpu=True) == "bfloat16"
    assert opened(FAST, folder="float32", dtype="float32") == "float32"
    opened(SLOW, folder="changed", working=False)  # so any setting may change
    assert opened(SLOW, folder="changed", bfloat16_on_cpu=True) == "bfloat16"


def test_other_devices_compute_in_bfloat16_and_keep_the_float32_of_a_cpu(
    opened, tmp_path, monkeypatch
):
    assert opened(SLOW) == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert opened(SLOW, folder="new") == "bfloat16"
    assert opened(SLOW) == "float32"
    # A user who changes the dtype of a run on a GPU gets what any changed setting gets.
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"devices": "1 NVIDIA H200"}))
    with pytest.raises(InputError, match="made by another configuration"):
        opened(SLOW)
