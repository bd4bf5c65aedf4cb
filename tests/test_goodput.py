"""Sessions: the share of the time that was training, and what kills lost."""

import types

import pytest

from gptv_jax.train import metrics
from gptv_jax.train.metrics import Sessions


@pytest.fixture
def clock(monkeypatch):
    """`clock(seconds)` sets the time."""
    now = [0.0]
    # Only in this module: threads of other tests may still be using the clock.
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(time=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, float(seconds))


def test_one_session_loses_nothing(clock, tmp_path):
    clock(1010)
    sessions = Sessions(tmp_path, "pretrain", began=1000.0, step=0, saved=0.0)
    clock(1100)
    sessions.seen(50)
    assert sessions.lost == (0, 0.0)
    assert sessions.numbers(productive=75.0) == {
        "goodput": 0.75,
        "restarts": 0,
        "steps_redone": 0,
        "seconds_lost": 0.0,
        "seconds_up": 100.0,
        "seconds_down": 0.0,
    }
    assert sessions.numbers(productive=None)["goodput"] is None


def session(clock, folder, began, restored, saved, seen, last):
    """A session from `began` to `seen` that continued from step `restored`, saved at `saved`."""
    clock(began)
    found = Sessions(folder, "pretrain", float(began), restored, float(saved))
    clock(seen)
    found.seen(last)
    return found


def test_work_after_the_checkpoint_is_lost_and_time_between_sessions_is_down(clock, tmp_path):
    session(clock, tmp_path, 100, restored=0, saved=0, seen=160, last=30)  # saved 20 at 140
    second = session(clock, tmp_path, 200, restored=20, saved=140, seen=230, last=25)
    assert second.lost == (10, 20.0)
    # The second session was killed before it saved: all of its time and steps are lost.
    third = session(clock, tmp_path, 300, restored=20, saved=140, seen=340, last=60)
    assert third.lost == (5, 30.0)
    numbers = third.numbers(productive=65.0)
    assert numbers == {
        "goodput": pytest.approx(65 / 240),  # 60 + 30 + 40 up, and the time between
        "restarts": 2,
        "steps_redone": 15,
        "seconds_lost": 50.0,
        "seconds_up": 130.0,
        "seconds_down": 110.0,
    }


def test_passing_over_a_damaged_checkpoint_loses_more_and_counts_nothing_twice(clock, tmp_path):
    session(clock, tmp_path, 100, restored=0, saved=0, seen=160, last=30)  # saved 10 at 120
    session(clock, tmp_path, 200, restored=20, saved=140, seen=230, last=40)
    third = session(clock, tmp_path, 300, restored=10, saved=120, seen=301, last=10)
    assert third.lost == (10 + 20, 20.0 + 30.0)  # 10 steps of the first were lost before
    assert third.numbers(1.0)["steps_redone"] == 20 + 20


def test_what_a_kill_lost_is_at_least_what_the_session_had_noted(clock, tmp_path):
    first = session(clock, tmp_path, 100, restored=0, saved=0, seen=160, last=30)
    assert not first.lost_at_least  # no session was before
    killed = session(clock, tmp_path, 200, restored=20, saved=140, seen=230, last=25)
    assert killed.lost_at_least and killed.lost == (10, 20.0)
    killed.seen(25, ended=True)
    after = Sessions(tmp_path, "pretrain", began=300.0, step=25, saved=230.0)
    assert not after.lost_at_least and after.lost == (0, 0.0)


def test_trainings_are_kept_apart(clock, tmp_path):
    session(clock, tmp_path, 100, restored=0, saved=0, seen=160, last=30)
    other = Sessions(tmp_path, "finetune", began=200.0, step=0, saved=0.0)
    assert other.lost == (0, 0.0) and other.numbers(1.0)["restarts"] == 0
    again = session(clock, tmp_path, 300, restored=30, saved=160, seen=310, last=40)
    assert again.numbers(1.0)["restarts"] == 1
