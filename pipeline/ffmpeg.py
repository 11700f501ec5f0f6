"""The only place that starts ffmpeg and ffprobe: each in its own process group, with limits that it cannot lift.

The input is untrusted. It is opened as an inherited file descriptor, so no name from a corpus reaches ffmpeg; the
protocol whitelist admits that descriptor and the output pipe alone, and the demuxer whitelist has no format that can
point at another file (playlists, concat scripts, image sequences, SDP).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from pipeline.errors import BadVideo, ConfigError

# Containers with timestamps. Elementary streams (.m1v, .h264) are left out: their duration can only be guessed. Audio
# formats are in, so that a sound file is rejected as what it is.
DEMUXERS = (
    "3g2,3gp,aac,asf,avi,dv,f4v,flac,flv,gif,ivf,matroska,mj2,mov,mp3,mp4,mpeg,mpegts,mxf,nut,ogg,rm,wav,webm,wtv"
)
_STDERR_TAIL_CHARS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class FfmpegLimits:
    """What one ffmpeg process may use before its clip is rejected."""

    timeout_s: float = 300.0
    """Wall-clock (and CPU) seconds one ffmpeg process may take."""
    memory_bytes: int = 4 * 2**30
    """Address space one ffmpeg process may map, in bytes."""
    max_pixels: int = 8192 * 4320
    """Largest width x height of a frame, in pixels."""
    max_duration_s: float = 24 * 3600.0
    """Longest video, in seconds."""

    def __post_init__(self) -> None:
        if not all(0 < v < math.inf for v in (self.timeout_s, self.memory_bytes, self.max_pixels, self.max_duration_s)):
            raise ConfigError(f"limits: every value must be positive and finite, got {self}")


def input_options(limits: FfmpegLimits) -> dict[str, str | int]:
    """Options, by ffmpeg-python's names, that every untrusted input gets."""
    return {
        "protocol_whitelist": "file,pipe",
        "format_whitelist": DEMUXERS,
        "max_pixels": limits.max_pixels,
        "threads": 1,
    }


def run(args: Sequence[str], source: IO[bytes], limits: FfmpegLimits, max_output_bytes: int) -> bytes:
    """Run `args` (whose input is `source_url(source)`) to its end and return what it wrote to stdout.

    Args:
        max_output_bytes: more output than this is an endless or lying stream.

    Raises:
        BadVideo: `timeout`, `resources`, `too-large`, or `corrupt` with the tail of stderr.
        ConfigError: the program is not installed.
    """
    source.seek(0)
    with tempfile.TemporaryFile() as stderr:
        try:
            process = subprocess.Popen(
                args,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=(source.fileno(),),
                start_new_session=True,
            )
        except FileNotFoundError:
            raise ConfigError(f"{args[0]} is not installed; install ffmpeg (Debian: apt-get install ffmpeg)") from None
        try:
            _limit(process.pid, limits)
            output = _read(process, limits, max_output_bytes)
        finally:
            _kill_group(process)
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - 4 * _STDERR_TAIL_CHARS))
        tail = " | ".join(stderr.read().decode(errors="replace").split("\n")).strip(" |")
    # The same words in every run; cut only now, so that the cut cannot leave half an address.
    tail = re.sub(r" @ 0x[0-9a-f]+", "", tail.replace(source_url(source), "input"))[-_STDERR_TAIL_CHARS:]
    if process.returncode in (-signal.SIGKILL, -signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT):
        raise BadVideo("resources", f"{args[0]} was killed by signal {-process.returncode}: {tail}")
    if process.returncode != 0:
        # 127 is the dynamic loader's: it could not map ffmpeg's own libraries, which says nothing about the video.
        no_memory = process.returncode == 127 or "Cannot allocate memory" in tail
        reject_class = "resources" if no_memory else "corrupt"
        raise BadVideo(reject_class, f"{args[0]} failed: {tail or 'no message'}")
    return output


def source_url(source: IO[bytes]) -> str:
    """The name by which ffmpeg opens an inherited descriptor."""
    return f"file:/dev/fd/{source.fileno()}"


def _limit(pid: int, limits: FfmpegLimits) -> None:
    cpu_s = int(limits.timeout_s) + 1  # bounds ffmpeg even when this process is killed and no one else watches it
    for kind, value in ((resource.RLIMIT_AS, limits.memory_bytes), (resource.RLIMIT_CPU, cpu_s)):
        with contextlib.suppress(ProcessLookupError):  # it may have ended already
            resource.prlimit(pid, kind, (value, value))


def _read(process: subprocess.Popen[bytes], limits: FfmpegLimits, max_output_bytes: int) -> bytes:
    assert process.stdout is not None
    deadline = time.monotonic() + limits.timeout_s
    chunks: list[bytes] = []
    size = 0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=max(0.0, deadline - time.monotonic())):
                raise BadVideo("timeout", f"ffmpeg took longer than {limits.timeout_s:g} s")
            chunk = os.read(process.stdout.fileno(), 1 << 20)
            if not chunk:
                break
            chunks.append(chunk)
            size += len(chunk)
            if size > max_output_bytes:
                raise BadVideo(
                    "too-large", f"ffmpeg wrote more than the {max_output_bytes} bytes that the probe promised"
                )
    try:
        process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise BadVideo("timeout", f"ffmpeg took longer than {limits.timeout_s:g} s") from None
    return b"".join(chunks)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
