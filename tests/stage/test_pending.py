"""How long a step took, where the next one is given before it is done."""

from neurojax.stage import pending


def test_a_step_takes_what_is_left_after_the_one_before_it(monkeypatch):
  now = iter([10.0, 13.0, 20.5])
  monkeypatch.setattr(pending.time, "perf_counter", lambda: next(now))
  clock = pending.Clock()
  assert clock.took(8.0) == 2.0
  # Given while the first one ran: it began when that was done.
  assert clock.took(9.0) == 3.0
  # Given after a pause.
  assert clock.took(20.0) == 0.5
