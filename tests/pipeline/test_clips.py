"""Spans: they tile the video, whatever its length."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clips import ClipConfig, plan_clips
from pipeline.errors import ConfigError
from pipeline.schema import ClipSpan

durations = st.floats(min_value=0.001, max_value=5000, allow_nan=False)


@settings(deadline=None)
@given(duration_s=durations, window_s=st.floats(min_value=0.5, max_value=100))
def test_windows_tile_the_video(duration_s: float, window_s: float) -> None:
    spans = plan_clips(duration_s, ClipConfig(mode="window", window_s=window_s))
    assert spans[0].start_s == 0 and spans[-1].end_s == duration_s
    assert all(before.end_s == after.start_s for before, after in itertools.pairwise(spans))
    assert all(0 < span.duration_s <= window_s + 1e-9 for span in spans)
    assert all(span.duration_s == pytest.approx(window_s) for span in spans[:-1])


@settings(deadline=None)
@given(count=st.integers(1, 2000), window_s=st.sampled_from([0.1, 0.3, 0.7, 1.1, 10.0]))
def test_no_sliver_from_rounding(count: int, window_s: float) -> None:
    """A running sum of 0.1 ends just before 0.3, and would leave a last window of 1e-17 s that holds no frame."""
    assert len(plan_clips(count * window_s, ClipConfig(mode="window", window_s=window_s))) == count


@settings(deadline=None)
@given(duration_s=durations)
def test_whole_is_one_span(duration_s: float) -> None:
    assert plan_clips(duration_s, ClipConfig(mode="whole", window_s=1)) == [ClipSpan(start_s=0, end_s=duration_s)]


@settings(deadline=None)
@given(duration_s=durations, window_s=st.floats(0.5, 100), stride_s=st.floats(0.5, 200))
def test_stride(duration_s: float, window_s: float, stride_s: float) -> None:
    spans = plan_clips(duration_s, ClipConfig(mode="window", window_s=window_s, stride_s=stride_s))
    assert spans[0].start_s == 0 and all(0 < span.duration_s <= window_s + 1e-9 for span in spans)
    assert all(b.start_s - a.start_s == pytest.approx(stride_s) for a, b in itertools.pairwise(spans))
    assert all(a.end_s < b.end_s for a, b in itertools.pairwise(spans))  # none lies within the one before
    if stride_s <= window_s:
        assert spans[-1].end_s == pytest.approx(duration_s, abs=1e-5)


@settings(deadline=None)
@given(duration_s=durations, cuts=st.lists(st.floats(0, 6000), max_size=20), max_s=st.floats(0.5, 100))
def test_shots_tile_the_video(duration_s: float, cuts: list[float], max_s: float) -> None:
    cuts_s = sorted(set(cuts))
    spans = plan_clips(duration_s, ClipConfig(mode="shots", max_s=max_s), cuts_s)
    assert spans[0].start_s == 0 and spans[-1].end_s == duration_s
    assert all(before.end_s == after.start_s for before, after in itertools.pairwise(spans))
    assert all(0 < span.duration_s <= max_s + 1e-5 for span in spans)
    assert {cut for cut in cuts_s if 0 < cut < duration_s} <= {span.start_s for span in spans}


def test_a_long_shot_is_split() -> None:
    config = ClipConfig(mode="shots", max_s=4)
    starts = [span.start_s for span in plan_clips(20.0, config, [3.0, 14.02])]
    assert starts == [0, 3, 7, 11, 14.02, 18.02]
    starts = [span.start_s for span in plan_clips(20.0, config, [3.0, 15.02], frame_s=0.04)]
    assert starts == [0, 3, 7, 11, 15.02, 19.02]  # nothing of 20 ms, in which there is no frame
    assert len(plan_clips(20.0, config, [3.0, 15.02], frame_s=0.01)) == 7


def test_a_manifest_row_without_a_span_is_a_whole_video() -> None:
    assert plan_clips(7.5, ClipConfig(mode="manifest")) == [ClipSpan(start_s=0, end_s=7.5)]


def test_last_window_is_the_rest() -> None:
    spans = plan_clips(25.0, ClipConfig(mode="window", window_s=10))
    assert [(span.start_s, span.end_s) for span in spans] == [(0, 10), (10, 20), (20, 25)]
    assert len(plan_clips(25.0, ClipConfig(mode="window", window_s=5))) == 5


@pytest.mark.parametrize(
    ("duration_s", "stride_s", "count"), [(4.023, None, 2), (4.0395, None, 3), (4.04, None, 3), (8.02, 4, 2)]
)
def test_less_than_a_frame_is_no_window(duration_s: float, stride_s: float | None, count: int) -> None:
    """Sound often outlasts the picture; a frame may be stated up to a millisecond shorter than it is."""
    config = ClipConfig(mode="window", window_s=2, stride_s=stride_s)
    assert len(plan_clips(duration_s, config, frame_s=0.04)) == count
    assert plan_clips(0.02, config, frame_s=0.04) == [ClipSpan(start_s=0, end_s=0.02)]


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"mode": "scenes"}, "mode"),
        ({"window_s": 0}, "window_s"),
        ({"window_s": -1}, "window_s"),
        ({"window_s": math.nan}, "window_s"),  # would plan no clip at all, and lose the video
        ({"window_s": math.inf}, "window_s"),
        ({"stride_s": -1}, "stride_s"),
        ({"stride_s": 0}, "stride_s"),
        ({"window_s": 1e-4}, "window_s"),
        ({"stride_s": math.nan}, "stride_s"),
        ({"cut_threshold": 0}, "cut_threshold"),
        ({"cut_threshold": 1}, "cut_threshold"),
        ({"max_s": 0}, "max_s"),
        ({"max_s": math.inf}, "max_s"),
        ({"mode": "shots", "max_s": 2, "min_s": 3}, "no clip could pass"),
        ({"min_s": -0.1}, "min_s"),
        ({"min_s": math.nan}, "min_s"),
        ({"mode": "window", "window_s": 2, "min_s": 3}, "no clip could pass"),
    ],
)
def test_bad_settings(bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ClipConfig(**bad)
