"""The measured rate of drawing, and the tradeoff that follows the load."""

from __future__ import annotations

import pytest

from catimage_accel.serve.load import LoadGauge, Pressure


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_idle_time_is_no_slow_drawing() -> None:
    clock = Clock()
    gauge = LoadGauge(clock=clock)
    for _ in range(5):
        gauge.begin()
        clock.now += 2.0
        gauge.end(10.0)
        clock.now += 100.0
    assert gauge.rate == pytest.approx(5.0)
    assert gauge.seconds(20.0) == pytest.approx(4.0)


def test_images_drawn_together_count_together() -> None:
    clock = Clock()
    gauge = LoadGauge(clock=clock)
    for _ in range(4):
        gauge.begin()
    clock.now = 2.0
    for _ in range(4):
        gauge.end(10.0)
    assert gauge.rate == pytest.approx(20.0)


def test_what_is_long_ago_is_forgotten() -> None:
    clock = Clock()
    gauge = LoadGauge(window=10.0, clock=clock)
    for seconds, cost in [(5.0, 500.0)] + [(5.0, 5.0)] * 6:
        gauge.begin()
        clock.now += seconds
        gauge.end(cost)
    assert gauge.rate == pytest.approx(1.0, rel=0.6)


def test_without_knowledge_no_wait_is_predicted() -> None:
    assert LoadGauge().seconds(1000.0) == 0.0
    assert LoadGauge(rate=50.0).seconds(100.0) == pytest.approx(2.0)


def test_a_wrong_guess_is_forgotten_after_seconds() -> None:
    clock = Clock()
    gauge = LoadGauge(rate=1e9, clock=clock)
    for _ in range(6):
        gauge.begin()
        clock.now += 1.0
        gauge.end(10.0)
    assert gauge.rate == pytest.approx(10.0)


def test_tradeoffs_are_as_asked_for_when_quiet_and_the_cheapest_before_the_target_passes() -> None:
    pressure = Pressure.for_target(10.0, dear_seconds=2.0)
    for asked in (0.0, 0.2):
        assert pressure.tradeoff(asked, 3.0, wait=1.0) == asked
        assert pressure.tradeoff(asked, 3.0, wait=8.0) == 3.0
        assert asked < pressure.tradeoff(asked, 3.0, wait=4.0) < 3.0
        assert pressure.tradeoff(asked, 3.0, wait=1.7) == pytest.approx(asked, abs=0.1), "it rises, it does not jump"


def test_a_tradeoff_above_the_cheapest_is_kept() -> None:
    assert Pressure.for_target(10.0, 2.0).tradeoff(5.0, 3.0, wait=100.0) == 5.0


def test_a_target_that_one_dear_image_misses_still_has_a_range() -> None:
    assert Pressure.for_target(1.0, dear_seconds=30.0).tradeoff(0.0, 1.0, wait=1.0) == 1.0


def test_a_target_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="latency target is 0"):
        Pressure.for_target(0.0, 1.0)
