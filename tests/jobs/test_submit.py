"""What is told before anything is sent; tests/faults/test_submit.py has the rest, on a real cluster."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.cli import parse_options
from jobs.submit import SubmitConfig, _result, _wait_for_agent, describe, run
from pipeline.errors import ConfigError, TokenreelError


def parse(*words: str) -> SubmitConfig:
    config: SubmitConfig = parse_options("submit", list(words))
    return config


def test_submits_own_options_stand_anywhere_behind_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A", "1")
    monkeypatch.setenv("B", "2")
    words = "shard --env A videos.csv --storage remux --address http://head:8265 s3://bucket/clips --env B --no-wait"
    config = parse(*words.split())
    assert config.words == ("shard", "videos.csv", "--storage", "remux", "s3://bucket/clips")
    assert (config.address, config.env, config.wait) == ("http://head:8265", ("A", "B"), False)
    assert describe(config).entrypoint == "python -P -m jobs shard videos.csv --storage remux s3://bucket/clips"


def test_the_same_job_has_the_same_name_and_digest_however_it_is_written() -> None:
    first = describe(parse("shard", "videos", "/clips", "--storage", "copy"))
    assert first == describe(parse("shard", "videos", "/clips", "--storage", "copy", "--no-wait"))
    default = describe(parse("shard", "--storage=copy", "videos", "/clips"))
    assert (default.name, default.digest) == (first.name, first.digest)
    other = describe(parse("shard", "videos", "/clips", "--storage", "remux"))
    assert (other.name == first.name, other.digest == first.digest) == (True, False)
    assert describe(parse("shard", "videos", "/elsewhere/clips")).name != first.name
    assert describe(parse("shard", "videos", "/clips", "--name", "nightly")).name == "nightly"
    elsewhere = describe(parse("shard", "videos", "s3://b/my clips?endpoint_override=http://h:9"))
    assert elsewhere.name.startswith("shard-my-clips-")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("shard videos clips", "out = clips.*all nodes share"),
        ("plan videos --save plan.json", "save = plan.json.*all nodes share"),
        ("inspect /clips --page page.html", "page = page.html.*all nodes share"),
        ("inspect s3://bucket/clips", "page: not given.*s3://bucket/clips"),
        ("shard videos /clips --storage zip", "zip.*transcode"),
        ("ui", "the job comes first; allowed: .*shard"),
        ("bench plan /out", "the job comes first"),
        ("pretrain no-such-recipe", "no-such-recipe"),
        ("shard videos /clips --env NO_SUCH_NAME_HERE", "--env NO_SUCH_NAME_HERE: no such"),
        ("shard videos /clips --max-pack-mb 0", "max_pack_mb = 0"),
        ("shard videos /clips --name ../x", "name = '../x'"),
        ("shard videos /clips", "address = ''.*RAY_API_SERVER_ADDRESS"),
        ("shard videos /clips --address head:6379", "head:6379.*http://head:8265"),
    ],
)
def test_wrong_usage_is_told_here(words: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=expected):
        run(parse(*words.split()))


def test_a_cluster_that_is_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(TokenreelError, match=address):
            run(parse("shard", "videos", "/clips", "--address", address))


def test_a_head_without_the_packages_is_told_of() -> None:
    info = SimpleNamespace(
        driver_exit_code=1,
        message="...\nModuleNotFoundError: No module named 'tyro'",
        status="FAILED",
        submission_id="shard-clips-1",
        metadata={"tokenreel.attempt": "1"},
    )
    result = _result(info, "no line of ours", "shard")
    assert result.status == "failed" and result.job == "shard"
    assert result.figures["error"].startswith("ModuleNotFoundError: No module named 'tyro'; the head's `python`")
    info.message = "killed"
    assert _result(info, "", "shard").figures["error"] == "killed"


def test_a_cluster_that_takes_no_jobs_yet_is_waited_for() -> None:
    answers = ["500: No available agent to submit job, please try again later."] * 2

    def submit() -> None:
        if answers:
            raise RuntimeError(answers.pop())

    _wait_for_agent(submit)
    assert not answers
    for answer, within_s in (("500: No available agent", 0.0), ("500: something else", 60.0)):
        answers = [answer] * 2
        with pytest.raises(RuntimeError, match=answer):
            _wait_for_agent(submit, within_s)
        assert len(answers) == 1, "asked once more, though it was of no use"
