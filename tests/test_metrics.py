import json
import logging
import struct
import time
import types

import jax
import pytest
from conftest import RECIPES, make_mesh, tiny_network
from tensorboardX.proto import event_pb2

from gptv_jax import hardware
from gptv_jax.model import flops
from gptv_jax.train import metrics

# Throughput


def test_flops_per_token_match_a_count_by_hand():
    network = tiny_network()  # L 2, D 32, F 128, V 11, T 16
    weights = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 128) + 11 * 32
    assert flops.training(network).total == 6 * weights + 12 * 2 * 16 * 32 == 161_856


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_flops_per_token_count_the_weights_that_are_multiplied(recipe):
    network = tiny_network(vocabulary=7, grid=(2, 5), **{"mlp_ratio": 3, **recipe})
    with jax.set_mesh(make_mesh((1, 1, 1))):
        params = jax.eval_shape(network.init, jax.random.key(0))
    matrices = [leaf for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim > 2]
    multiplied = [params["head"], *matrices]
    assert len(multiplied) == 5
    attention = flops.training(network).total - 6 * sum(leaf.size for leaf in multiplied)
    assert (
        attention == 2 * 3 * (2 * 10 * 32) * 2
    )  # twice the scores and the mix, 3 passes, 2 layers


def test_mfu_is_unknown_without_a_known_peak_or_a_speed(monkeypatch):
    assert metrics.mfu(161_856, 1e6) is None  # a CPU
    monkeypatch.setitem(hardware.KINDS, "cpu", hardware.Hardware(1e12, 1, 1.0, 1.0, 1.0))
    assert metrics.mfu(161_856, None) is None


def test_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    monkeypatch.setitem(hardware.KINDS, "cpu", hardware.Hardware(1e12, 1, 1.0, 1.0, 1.0))
    assert jax.device_count() == 8
    assert metrics.mfu(161_856, 1e6) == pytest.approx(1e6 * 161_856 / 8e12)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 2307e12 / 2),  # two devices a chip
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
    ],
)
def test_the_peak_is_that_of_the_kind_of_device(kind, peak, monkeypatch):
    device = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(metrics.jax, "devices", lambda: [device])
    monkeypatch.setattr(metrics.jax, "device_count", lambda: 1)
    assert metrics.mfu(161_856, peak / 161_856) == pytest.approx(1.0)


# The log


@pytest.fixture
def writer(tmp_path):
    return metrics.MetricWriter(tmp_path)


def written(writer):
    """(stage, step) of every event."""
    return [(event["stage"], event["step"]) for event in writer.read()]


def test_events_are_lines_of_json_and_read_as_they_were_written(writer):
    writer.write("pretrain", 10, {"loss": 1.5, "mfu": None})
    writer.write("finetune", 5, {"accuracy": 0.25})
    lines = [json.loads(line) for line in writer.path.read_text().splitlines()]
    assert writer.path.name == "metrics.jsonl" and lines == writer.read()
    assert abs(lines[0].pop("time") - time.time()) < 60
    assert lines[0] == {"stage": "pretrain", "step": 10, "loss": 1.5, "mfu": None}
    assert lines[1]["accuracy"] == 0.25


def test_rewinding_drops_only_the_later_events_of_the_stage(writer):
    for step in (10, 20, 30):
        writer.write("pretrain", step, {"loss": 1.0})
        writer.write("finetune", step, {"loss": 2.0})
    before = writer.read()
    writer.rewind("pretrain", 20)
    wanted = [e for e in before if (e["stage"], e["step"]) != ("pretrain", 30)]
    assert writer.read() == wanted and len(wanted) == 5
    writer.write("pretrain", 30, {"loss": 3.0})
    assert writer.read()[:5] == wanted and writer.read()[5]["loss"] == 3.0


def test_rewinding_an_empty_log_makes_no_file(writer):
    writer.rewind("pretrain", 0)
    assert writer.read() == [] and not writer.path.exists()


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_a_kill_cut_short_is_dropped_and_the_log_continues(cut, writer, caplog):
    for step in (10, 20):
        writer.write("pretrain", step, {"loss": 1.0, "nats_per_token": 2.0})
    text = writer.path.read_text()
    writer.path.write_text(text[: -1 - cut])
    assert written(writer) == [("pretrain", 10)]
    assert "dropped a line that was cut short" in caplog.text
    writer.rewind("pretrain", 10)
    writer.write("pretrain", 20, {"loss": 1.0})
    assert written(writer) == [("pretrain", 10), ("pretrain", 20)]
    assert writer.path.read_text().startswith(text.splitlines(keepends=True)[0])


def test_only_the_first_process_writes(writer, monkeypatch):
    writer.write("pretrain", 10, {"loss": 1.0})
    before = writer.path.read_text()
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    writer.write("pretrain", 20, {"loss": 1.0})
    writer.rewind("pretrain", 0)
    assert writer.path.read_text() == before


# TensorBoard


def board_events(folder):
    """{stage/name: {step: value}} as TensorBoard shows it: later files replace repeated steps."""
    shown = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4  # length and its checksum, event, checksum
            if event.session_log.status == event_pb2.SessionLog.START:
                stage = f"{path.parent.name}/"
                for name in (n for n in shown if n.startswith(stage)):
                    shown[name] = {s: v for s, v in shown[name].items() if s < event.step}
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def json_events(writer):
    shown = {}
    for event in writer.read():
        for name in event.keys() - {"stage", "step", "time"}:
            if event[name] is not None:
                shown.setdefault(f"{event['stage']}/{name}", {})[event["step"]] = event[name]
    return shown


def assert_board_shows_the_log(writer):
    """Waits for it: the writer's thread writes the file every two seconds."""
    deadline = time.monotonic() + 30
    while board_events(writer.board_folder) != json_events(writer) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert board_events(writer.board_folder) == json_events(writer)


def test_tensorboard_shows_the_events_of_the_log_also_after_a_rewind(tmp_path):
    first = metrics.MetricWriter(tmp_path)
    for step in (10, 20, 30):
        first.write("pretrain", step, {"loss": step / 8, "mfu": None})
    first.write("finetune", 5, {"accuracy": 0.25})
    assert_board_shows_the_log(first)
    assert json_events(first)["pretrain/loss"] == {10: 1.25, 20: 2.5, 30: 3.75}

    again = metrics.MetricWriter(tmp_path)
    again.rewind("pretrain", 10)
    again.write("pretrain", 20, {"loss": 7.5})
    again.close()
    assert_board_shows_the_log(again)
    assert json_events(again)["pretrain/loss"] == {10: 1.25, 20: 7.5}


# Progress


def test_progress_without_a_terminal_logs_a_line_for_each_report(caplog):
    progress = metrics.Progress("pretrain", 100, done=10)
    with caplog.at_level(logging.INFO, "gptv_jax"):
        progress.advance()
        progress.report(20, {"loss": 1.23456, "mfu": None})
        progress.close()
    (record,) = caplog.records
    assert record.getMessage() == "pretrain 20/100  loss 1.235"


def test_a_line_has_the_loss_then_validation_then_speed_and_the_time_left(caplog, monkeypatch):
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    progress = metrics.Progress("finetune", 100)
    values = {"accuracy": 0.5, "class_nats": 2.25, "grad_norm": 9.0, "nats_per_token": 1.5}
    values |= {"mfu": None, "tokens_per_second": 13_420.0}
    evaluations = [
        {"step": s, "nats_per_token": 1.0, "accuracy": a} for s, a in ((0, 0.5), (20, 0.25))
    ]
    with caplog.at_level(logging.INFO, "gptv_jax"):
        progress.report(10, values)
        progress.evaluated(evaluations[:1])
        progress.evaluated(evaluations)
        progress.evaluated(evaluations, quiet=True)
        progress.report(20, values)
        progress.report(100, values | {"mfu": 0.4})
    numbers = "  loss 2.250  val 25.0%  best 50.0%  13.4k tokens/s"
    assert [record.getMessage() for record in caplog.records] == [
        "finetune 10/100  loss 2.250  13.4k tokens/s",
        "finetune 0/100 validation: accuracy 50.0% (best so far), nats_per_token 1.000",
        "finetune 20/100 validation: accuracy 25.0% (best 50.0% at 0), nats_per_token 1.000",
        f"finetune 20/100{numbers}  01:20 left",
        f"finetune 100/100{numbers}  00:00 left  MFU 40.0%",
    ]
