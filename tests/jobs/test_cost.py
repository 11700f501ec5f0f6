"""Measured speeds: the rules between them by hand, and their file."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import cost
from jobs.cost import DecodeSpeed, EncodeSpeed, Measured, cpu_slowness, encode_frame_s
from pipeline.errors import ConfigError

MEASURED = Measured(
    decode={
        "cpu": [DecodeSpeed(short_side_px=100, frames_per_s=1000), DecodeSpeed(short_side_px=200, frames_per_s=100)],
        "slow": [DecodeSpeed(short_side_px=200, frames_per_s=50), DecodeSpeed(short_side_px=400, frames_per_s=1)],
        "other": [DecodeSpeed(short_side_px=720, frames_per_s=50)],
    },
    encode={
        "gpu": [
            EncodeSpeed(tokenizer="t", size_px=100, precision="bf16", frames_per_s=1000, num_threads=1),
            EncodeSpeed(tokenizer="t", size_px=200, precision="bf16", frames_per_s=100, num_threads=1),
        ],
    },
    start_s={"cpu": 0.5, "slow": 2.0},
)


@pytest.mark.parametrize(
    ("side", "milliseconds"),
    [(100, 1), (200, 10), (50, 0.25), (400, 40), (150, 1 + 9 * (150**2 - 100**2) / (200**2 - 100**2))],
)
def test_seconds_a_frame_grow_with_its_pixels(side: int, milliseconds: float) -> None:
    found = encode_frame_s(MEASURED, "gpu", tokenizer="t", precision="bf16", size_px=side)
    assert found * 1000 == pytest.approx(milliseconds)


def test_a_cpu_is_compared_by_what_was_measured_on_both() -> None:
    assert cpu_slowness(MEASURED, "slow", "cpu") == 3  # between 2 at 200 lines and 4 for a start
    assert cpu_slowness(MEASURED, "cpu", "slow") == pytest.approx((0.5 + 0.25) / 2)
    assert cpu_slowness(Measured(), "same", "same") == 1


def test_what_was_not_measured_is_named_with_the_command() -> None:
    with pytest.raises(
        ConfigError, match=r"no decoding speed of both 'other' and 'cpu', only of .*bench decode --save"
    ):
        cpu_slowness(MEASURED, "other", "cpu")
    for device, tokenizer, precision in (("a", "t", "bf16"), ("gpu", "u", "bf16"), ("gpu", "t", "fp16")):
        with pytest.raises(ConfigError, match=f"no encoding speed of {tokenizer} in {precision} on '{device}'.*--save"):
            encode_frame_s(MEASURED, device, tokenizer=tokenizer, precision=precision, size_px=64)


def test_the_file_takes_in_new_figures_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speeds.json"
    cost.save(path, MEASURED)
    assert Measured.load(path) == MEASURED
    newer = Measured(
        decode={
            "cpu": [DecodeSpeed(short_side_px=200, frames_per_s=50)],
            "b": [DecodeSpeed(short_side_px=1, frames_per_s=1)],
        }
    )
    cost.save(path, newer)
    merged = Measured.load(path)
    assert merged.decode["b"] == newer.decode["b"] and merged.decode["slow"] == MEASURED.decode["slow"]
    assert merged.decode["cpu"] == [MEASURED.decode["cpu"][0], newer.decode["cpu"][0]]
    assert merged.encode == MEASURED.encode and merged.start_s == MEASURED.start_s
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_text('{"some": "thing"}')
    with pytest.raises(ConfigError, match="holds no measured speeds"):
        cost.save(path, MEASURED)
