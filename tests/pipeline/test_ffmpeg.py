"""ffmpeg under limits: what it may use, what it may open, and that nothing of it stays behind."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from pipeline import ffmpeg
from pipeline.decode import FrameConfig, decode_frames, require_decodable
from pipeline.errors import BadVideo, ConfigError
from pipeline.ffmpeg import FfmpegLimits, Pipe, Process
from pipeline.probe import probe
from pipeline.remux import remux_span
from pipeline.schema import ClipSpan
from pipeline.scoring import watch_file
from pipeline.transcode import TranscodeConfig, transcode_span
from tests.corpora import make_clip, real_clips

LIMITS = FfmpegLimits()
BUDGET = 2**20


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("ffmpeg") / "clip.mp4", seconds=1)


def endless(source: IO[bytes]) -> list[str]:
    """A command that never ends by itself and never writes."""
    return [
        "ffmpeg",
        "-v",
        "error",
        "-nostdin",
        "-stream_loop",
        "-1",
        "-i",
        ffmpeg.source_url(source),
        "-f",
        "null",
        "-",
    ]


def failure(args: Sequence[str], source: IO[bytes], limits: FfmpegLimits = LIMITS, budget: int = BUDGET) -> BadVideo:
    with pytest.raises(BadVideo) as caught:
        ffmpeg.run(args, source, limits, budget)
    return caught.value


def runs(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestTimeout:
    def test_class_and_time(self, clip: Path) -> None:
        with clip.open("rb") as source:
            started_s = time.monotonic()
            bad = failure(endless(source), source, FfmpegLimits(timeout_s=0.5))
        assert bad.reject_class == "timeout" and "0.5 s" in bad.reason
        assert 0.5 <= time.monotonic() - started_s < 10

    def test_more_time_is_enough(self, clip: Path) -> None:
        with clip.open("rb") as source:
            assert failure(["sleep", "1"], source, FfmpegLimits(timeout_s=0.2)).reject_class == "timeout"
            assert ffmpeg.run(["sleep", "1"], source, FfmpegLimits(timeout_s=60), BUDGET) == b""

    def test_a_program_that_closed_its_output_is_not_waited_for(self, clip: Path) -> None:
        with clip.open("rb") as source:
            bad = failure(["sh", "-c", "exec >&-; exec sleep 60"], source, FfmpegLimits(timeout_s=0.3))
        assert bad.reject_class == "timeout"

    def test_the_process_group_is_gone(self, clip: Path, tmp_path: Path) -> None:
        pids = tmp_path / "pids"
        script = 'echo $$ > "$0"; sleep 600 & echo $! >> "$0"; wait'
        with clip.open("rb") as source:
            bad = failure(["sh", "-c", script, str(pids)], source, FfmpegLimits(timeout_s=0.5))
        assert bad.reject_class == "timeout"
        found = [int(pid) for pid in pids.read_text().split()]
        assert len(found) == 2
        deadline = time.monotonic() + 10
        while any(map(runs, found)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(runs, found))

    def test_cpu_time_is_bounded_too(self, clip: Path) -> None:
        """When this process is killed, nobody watches the clock; the kernel still counts the CPU."""
        with clip.open("rb") as source:
            limits = FfmpegLimits(timeout_s=30)
            # The limits are set from outside, a moment after the start.
            output = ffmpeg.run(["sh", "-c", "sleep 0.3; ulimit -t"], source, limits, BUDGET)
        assert int(output) == 31

    @pytest.mark.parametrize("program", [["sh", "-c", "while :; do :; done"], None], ids=["sh", "ffmpeg"])
    def test_cpu_time_that_ran_out_is_a_timeout(self, clip: Path, program: list[str] | None) -> None:
        """Whatever the program makes of signals. Our own clock stands until `finish`."""
        with (
            clip.open("rb") as source,
            pytest.raises(BadVideo, match=r"used up 1 s of CPU time \(limits\.timeout_s\)") as caught,
            Process(program or endless(source), [source], FfmpegLimits(timeout_s=0.9)) as process,
        ):
            deadline = time.monotonic() + 60
            while runs(process._process.pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.finish()
        assert caught.value.reject_class == "timeout"


class TestInheritedLimits:
    def test_lower_ones_stay(self) -> None:
        """Without root's rights nobody can raise a hard limit, not even to ours."""
        program = (
            "import os, resource, tempfile\n"
            "from pipeline import ffmpeg\n"
            "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
            "if not os.getuid():\n"
            "    os.setuid(65534)\n"
            "with tempfile.TemporaryFile() as source:\n"
            "    command = ['sh', '-c', 'sleep 0.3; ulimit -t; ulimit -v']\n"
            "    limits = ffmpeg.FfmpegLimits(memory_bytes=2**30)\n"
            "    print(ffmpeg.run(command, source, limits, 100).decode().split())\n"
        )
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
        assert done.stdout == "['20', '1048576']\n", done.stderr

    def test_a_limit_that_cannot_be_set_leaves_nothing(self, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pids = []

        def refuse(pid: int, *_: Any) -> None:
            pids.append(pid)
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("resource.prlimit", refuse)
        with clip.open("rb") as source:
            before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            with pytest.raises(PermissionError):
                Process(["sleep", "60"], [source], LIMITS, stdout=Pipe(100), fed=True)
            assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
        assert not runs(pids[0])


class TestMemory:
    @pytest.mark.parametrize("memory_bytes", [2**20, 2**26])
    def test_too_little(self, clip: Path, memory_bytes: int) -> None:
        """It says nothing about the video, whichever step runs out: not `corrupt`, and not `not-video`."""
        limits = FfmpegLimits(memory_bytes=memory_bytes)
        with clip.open("rb") as source:
            info = replace(probe(source, LIMITS), decoded_at_s=-1.0)  # so that there is something left to check
            for step in (
                lambda: probe(source, limits),
                lambda: require_decodable(source, info, limits),
                lambda: decode_frames(source, 1.0, FrameConfig(), limits),
                lambda: transcode_span(source, info, ClipSpan(start_s=0, end_s=1), TranscodeConfig(), limits),
                lambda: remux_span(source, info, ClipSpan(start_s=0, end_s=1), limits, 10_000),
                lambda: watch_file(source, info, 0.35, limits),
            ):
                with pytest.raises(BadVideo) as caught:
                    step()
                assert caught.value.reject_class == "resources", caught.value

    def test_it_is_the_kernel_that_limits(self, clip: Path) -> None:
        with clip.open("rb") as source:
            limits = FfmpegLimits(memory_bytes=2**30)
            assert int(ffmpeg.run(["sh", "-c", "sleep 0.3; ulimit -v"], source, limits, BUDGET)) == 2**20  # in KiB

    @pytest.mark.parametrize("signal", ["KILL", "SEGV", "ABRT", "TERM"])
    def test_killed(self, clip: Path, signal: str) -> None:
        with clip.open("rb") as source:
            assert failure(["sh", "-c", f"ulimit -c 0; kill -{signal} $$"], source).reject_class == "resources"

    def test_ended_by_a_signal_that_ffmpeg_catches(self, clip: Path) -> None:
        ffmpeg = "ffmpeg -v error -nostdin -re -f lavfi -i testsrc2 -f null - & sleep 0.5; kill -TERM $!; wait $!"
        with clip.open("rb") as source:
            error = failure(["sh", "-c", ffmpeg], source)
        assert error.reject_class == "resources" and "by a signal" in error.reason


class TestOutput:
    def test_budget(self, clip: Path) -> None:
        args = ["sh", "-c", "printf 12345"]
        with clip.open("rb") as source:
            assert ffmpeg.run(args, source, LIMITS, 5) == b"12345"
            bad = failure(args, source, budget=4)
        assert bad.reject_class == "too-large" and "4 bytes" in bad.reason

    def test_an_endless_stream_is_cut(self, clip: Path) -> None:
        with clip.open("rb") as source:
            args = [*endless(source)[:-3], "-f", "rawvideo", "pipe:"]
            started_s = time.monotonic()
            assert failure(args, source).reject_class == "too-large"
        assert time.monotonic() - started_s < 30

    def test_the_source_is_read_from_its_start(self, clip: Path) -> None:
        with clip.open("rb") as source:
            source.seek(500)
            assert ffmpeg.run(["cat", f"/dev/fd/{source.fileno()}"], source, LIMITS, BUDGET) == clip.read_bytes()

    def test_a_file_that_grows_too_large(self, clip: Path) -> None:
        """RLIMIT_FSIZE: the kernel stops it, whatever the program thinks."""
        with clip.open("rb") as source, ffmpeg.open_unnamed(0) as out:
            script = f"sleep 0.2; exec cat /dev/zero > /dev/fd/{out.fileno()}"
            with (
                pytest.raises(BadVideo, match="larger file") as caught,
                Process(["sh", "-c", script], [source, out], LIMITS, max_file_bytes=20 * 2**20) as process,
            ):
                process.finish()
            assert out.seek(0, 2) == 20 * 2**20
        assert caught.value.reject_class == "too-large"


class TestSeveralPipes:
    def test_all_are_read_at_the_same_time(self, clip: Path) -> None:
        """Both outputs are far larger than a pipe's buffer: who reads them one after the other waits for ever."""
        pipes = [Pipe(2**26), Pipe(2**26)]
        script = "".join(f"head -c 3000000 /dev/zero >&{pipe.write_fd};" for pipe in (*pipes, *pipes[::-1]))
        with clip.open("rb") as source, Process(["bash", "-c", script], [source], LIMITS, pipes=pipes) as process:
            sizes = dict.fromkeys(pipes, 0)
            for pipe, chunk in process.read():
                sizes[pipe] += len(chunk)
            process.finish()
        assert list(sizes.values()) == [6_000_000, 6_000_000]

    def test_each_has_its_own_budget(self, clip: Path) -> None:
        pipes = [Pipe(100), Pipe(3)]
        script = f"printf 12345 >&{pipes[0].write_fd}; printf 1234 >&{pipes[1].write_fd}"
        with (
            clip.open("rb") as source,
            pytest.raises(BadVideo, match="3 bytes"),
            Process(["bash", "-c", script], [source], LIMITS, pipes=pipes) as process,
        ):
            list(process.read())

    def test_memory_stays_bounded(self, clip: Path) -> None:
        """Whoever stops reading stops the process: nothing is piled up."""
        pipe = Pipe(2**40)
        with clip.open("rb") as source, Process(["cat", "/dev/zero"], [source], LIMITS, stdout=pipe) as process:
            chunks = process.read()
            next(chunks)
            time.sleep(0.2)
            assert pipe.size <= 2**21


class TestFeeding:
    def test_what_goes_in_comes_out(self, clip: Path, tmp_path: Path) -> None:
        data = os.urandom(3_000_000)
        with clip.open("rb") as source, (tmp_path / "out").open("w+b") as out:
            script = f"cat > /dev/fd/{out.fileno()}"
            with Process(["sh", "-c", script], [source, out], LIMITS, fed=True) as process:
                process.write(data[:1000])
                process.write(memoryview(data)[1000:])
                process.finish()
            assert out.read() == data

    def test_a_reader_that_hangs(self, clip: Path) -> None:
        limits = FfmpegLimits(timeout_s=0.3)
        with (
            clip.open("rb") as source,
            pytest.raises(BadVideo, match=r"0\.3 s"),
            Process(["sleep", "60"], [source], limits, fed=True) as process,
        ):
            process.write(bytes(4_000_000))

    def test_a_reader_that_died_tells_why(self, clip: Path) -> None:
        script = "echo no such codec >&2; exit 1"
        with (
            clip.open("rb") as source,
            pytest.raises(BadVideo, match="no such codec") as caught,
            Process(["sh", "-c", script], [source], LIMITS, fed=True) as process,
        ):
            process.write(bytes(4_000_000))
            process.finish()
        assert caught.value.stderr == "no such codec"

    def test_the_clock_stands_while_the_caller_is_busy(self, clip: Path) -> None:
        limits = FfmpegLimits(timeout_s=0.5)
        with clip.open("rb") as source, Process(["cat"], [source], limits, stdout=Pipe(100), fed=True) as process:
            time.sleep(0.8)
            process.write(b"x")
            process.finish()


class TestMessages:
    def test_equal_in_every_run(self, tmp_path: Path, clip: Path) -> None:
        """ffmpeg prints addresses and our descriptor's number; both would make equal datasets differ."""
        path = tmp_path / "bad.mp4"
        path.write_bytes(clip.read_bytes()[:1000])  # the index stands at the end
        reasons = set()
        for _ in range(2):
            with path.open("rb") as first, path.open("rb") as source:  # another descriptor each time
                with pytest.raises(BadVideo) as caught:
                    probe(source if reasons else first, LIMITS)
                reasons.add(caught.value.reason)
        assert len(reasons) == 1
        (reason,) = reasons
        assert "0x" not in reason and "/dev/fd" not in reason and "\n" not in reason
        assert "moov atom not found" in reason and "input: Invalid data" in reason

    def test_addresses(self, clip: Path) -> None:
        with clip.open("rb") as source:
            script = f'echo "[mov @ 0x55d0c0ffee00] bad atom in {ffmpeg.source_url(source)}" >&2; exit 1'
            bad = failure(["sh", "-c", script], source)
        assert bad.reject_class == "corrupt"
        assert bad.reason == "sh failed: [mov] bad atom in input"

    def test_only_the_tail_is_kept(self, clip: Path) -> None:
        with clip.open("rb") as source:
            bad = failure(["sh", "-c", "seq 100000 >&2; exit 1"], source)
        assert bad.reason.endswith("99999 | 100000") and len(bad.reason) < 700

    def test_no_address_is_cut_in_half(self, clip: Path) -> None:
        """Wherever the tail begins, it must not begin with the digits of an address."""
        with clip.open("rb") as source:
            for count in range(20):
                script = f'echo "{"x" * count}"; seq 200 | sed "s/.*/[h264 @ 0xfeedfeedfeed] &/"; exit 1'
                assert "feed" not in failure(["sh", "-c", f"({script}) >&2"], source).reason

    def test_bytes_that_are_no_text(self, clip: Path) -> None:
        with clip.open("rb") as source:
            failure(["sh", "-c", r"printf '\377\376' >&2; exit 1"], source).reason.encode()

    def test_not_installed(self, clip: Path) -> None:
        with clip.open("rb") as source, pytest.raises(ConfigError, match="apt-get install ffmpeg"):
            ffmpeg.run(["ffmpeg-that-is-not-there"], source, LIMITS, BUDGET)


class TestNoOtherFileIsOpened:
    """A file that names another one must not make ffmpeg read it: that would leak files of the machine into a dataset.

    Each comes with a control: without the whitelists, ffmpeg does follow it, so the test can fail.
    """

    def control(self, path: Path, *options: str) -> int:
        command = ["ffprobe", "-v", "error", *options, "-show_streams", "-select_streams", "v", f"file:{path}"]
        return subprocess.run(command, capture_output=True, timeout=60).stdout.count(b"codec_type=video")

    def refused(self, path: Path) -> None:
        with path.open("rb") as source:
            with pytest.raises(BadVideo) as caught:
                probe(source, LIMITS)
            assert caught.value.reject_class == "not-video"
            with pytest.raises(BadVideo):  # a lying probe would not open the door either
                decode_frames(source, 1.0, FrameConfig(), LIMITS)

    def test_hls_playlist(self, tmp_path: Path) -> None:
        segment = make_clip(tmp_path / "segment.ts", seconds=1)
        path = tmp_path / "playlist.mp4"
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{segment}\n#EXT-X-ENDLIST\n")
        assert self.control(path, "-f", "hls")
        self.refused(path)

    def test_concat_script(self, tmp_path: Path, clip: Path) -> None:
        path = tmp_path / "script.mp4"
        path.write_text(f"ffconcat version 1.0\nfile 'file:{clip}'\n")
        assert self.control(path, "-f", "concat", "-safe", "0")
        self.refused(path)

    def test_image_sequence_and_text_formats(self, tmp_path: Path) -> None:
        subprocess.run(
            ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=d=1:r=3:s=32x32", str(tmp_path / "%d.png")],
            check=True,
        )
        path = tmp_path / "1.png"
        assert self.control(path)
        self.refused(path)  # one picture: its demuxer would look for 2.png

    def test_names_never_reach_ffmpeg(self, tmp_path: Path, clip: Path) -> None:
        """The file is an inherited descriptor, so a name that looks like a protocol is only a name."""
        for name in ("concat:a|b.mp4", "-i.mp4", "%03d.mp4", "http:x.mp4"):
            path = tmp_path / name
            path.write_bytes(clip.read_bytes())
            with path.open("rb") as source:
                assert probe(source, LIMITS).codec == "h264"

    def test_no_protocol_but_file_and_pipe(self, tmp_path: Path, clip: Path) -> None:
        words = [f"-{n}={v}" for n, v in ffmpeg.input_options(LIMITS).items()]
        assert "-protocol_whitelist=file,pipe" in words
        names = set(ffmpeg.DEMUXERS.split(","))
        listed = subprocess.run(["ffmpeg", "-v", "error", "-demuxers"], capture_output=True, text=True).stdout
        followers = {
            "hls",
            "concat",
            "concatf",
            "dash",
            "sdp",
            "rtsp",
            "image2",
            "image2pipe",
            "lavfi",
            "imf",
            "webm_dash_manifest",
        }
        assert followers & set(listed.replace(",", " ").split()), "ffmpeg has none of them: the test checks nothing"
        assert not names & followers


class TestLimitsChangeWhatPasses:
    def test_max_pixels(self, clip: Path) -> None:
        with clip.open("rb") as source:
            assert probe(source, FfmpegLimits(max_pixels=160 * 120)).width == 160
            with pytest.raises(BadVideo, match="160 x 120") as caught:
                probe(source, FfmpegLimits(max_pixels=160 * 120 - 1))
        assert caught.value.reject_class == "too-large"

    def test_max_pixels_holds_for_decoders_too(self, tmp_path: Path) -> None:
        """A header may lie about the size of its frames, so the decoder has the limit as well."""
        path = make_clip(tmp_path / "clip.mp4", seconds=0.5, size="320x240")
        with path.open("rb") as source, pytest.raises(BadVideo):
            decode_frames(source, 0.5, FrameConfig(), FfmpegLimits(max_pixels=160 * 120))

    def test_max_duration(self) -> None:
        with real_clips()["iscc-samples/demo.mp4"].open("rb") as source:
            assert probe(source, FfmpegLimits(max_duration_s=61)).duration_s > 60
            with pytest.raises(BadVideo, match="at most 59 s") as caught:
                probe(source, FfmpegLimits(max_duration_s=59))
        assert caught.value.reject_class == "too-large"

    @pytest.mark.parametrize("name", ["timeout_s", "memory_bytes", "max_pixels", "max_duration_s", "max_file_bytes"])
    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
    def test_bad_values(self, name: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=name):
            FfmpegLimits(**{name: value})


def test_no_descriptor_leaks(clip: Path) -> None:
    with clip.open("rb") as source:
        probe(source, LIMITS)
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(3):
            probe(source, LIMITS)
            failure(["sh", "-c", "exit 1"], source)
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


class TestIdentity:
    """Another version or build of ffmpeg is another decoder, whatever compiled it and whenever."""

    def install(self, folder: Path, said: str, programs: Sequence[str] = ("ffmpeg", "ffprobe")) -> Path:
        folder.mkdir(exist_ok=True)
        for program in programs:
            (folder / program).write_text(f"#!/bin/sh\necho run >> {folder}/runs\ncat <<'END'\n{program} {said}\nEND\n")
            (folder / program).chmod(0o755)
        return folder

    def test_of_this_machine(self) -> None:
        said = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
        assert re.fullmatch(r"ffmpeg \S+ \(build [0-9a-f]{12}\)", ffmpeg.identity())
        assert ffmpeg.identity().split()[1] == said.split()[2]

    def test_what_makes_a_difference(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "version 7.1-3 Copyright (c) 2000-{}\nbuilt with gcc {}\nconfiguration: --enable-{}\nlibavutil 57. {}\n"
        found = []
        for n, words in enumerate([(2024, 12, "x", 1), (2026, 14, "x", 1), (2024, 12, "y", 1), (2024, 12, "x", 2)]):
            monkeypatch.setenv("PATH", f"{self.install(tmp_path / str(n), text.format(*words))}:/bin:/usr/bin")
            found.append(ffmpeg.identity())
            assert ffmpeg.identity() == found[-1]
            assert (tmp_path / str(n) / "runs").read_text().count("run") == 2  # each program once a process
        assert found[0] == found[1] and len(set(found)) == 3
        self.install(tmp_path / "0", "version 6.0 Copyright\nconfiguration:\n", ["ffprobe"])
        ffmpeg._build_of.cache_clear()
        monkeypatch.setenv("PATH", f"{tmp_path / '0'}:/bin:/usr/bin")
        assert re.fullmatch(r"ffmpeg 7.1-3 \(build \w+\), ffprobe 6.0 \(build \w+\)", ffmpeg.identity())

    def test_a_node_with_another_one_is_named_with_both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ffmpeg.require_identity(ffmpeg.identity())
        with pytest.raises(
            ConfigError, match=rf"{socket.gethostname()} has {re.escape(ffmpeg.identity())}; .* has ffmpeg 7, "
        ):
            ffmpeg.require_identity("ffmpeg 7")

    def test_programs_that_do_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match="ffmpeg is not installed"):
            ffmpeg.identity()
        (tmp_path / "ffmpeg").write_text("#!/bin/sh\nexit 127\n")
        (tmp_path / "ffmpeg").chmod(0o755)
        with pytest.raises(ConfigError, match="ffmpeg -version failed"):
            ffmpeg.identity()


MOST = {
    "timeout_s": 10**6,
    "memory_bytes": 2**62,
    "max_pixels": 2**31 - 1,
    "max_duration_s": 10**9,
    "max_file_bytes": 2**62,
}


@pytest.mark.parametrize("name", MOST)
def test_limits_have_bounds_that_the_system_knows(tmp_path: Path, name: str) -> None:
    """A larger one would fail in every video, and each would be called bad."""
    limits = FfmpegLimits(**{name: MOST[name]})  # type: ignore[arg-type]
    (tmp_path / "x").write_bytes(b"1")
    with (tmp_path / "x").open("rb") as source:
        assert ffmpeg.run(["cat", "/dev/null"], source, limits, BUDGET) == b""
    for value in (MOST[name] + 1000, 0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"limits.{name} = {value}: must be"):
            FfmpegLimits(**{name: value})  # type: ignore[arg-type]
