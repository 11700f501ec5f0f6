"""The only place that starts ffmpeg and ffprobe: each in its own process group, with limits that it cannot lift.

The input is untrusted. It is opened as an inherited file descriptor, so no name from a corpus reaches ffmpeg; the
protocol whitelist admits that descriptor and the output pipe alone, and the demuxer whitelist has no format that can
point at another file (playlists, concat scripts, image sequences, SDP).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import re
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO

from pipeline.errors import BadVideo, ConfigError

# Containers with timestamps. Elementary streams (.m1v, .h264) are left out: their duration can only be guessed. Audio
# formats are in, so that a sound file is rejected as what it is.
DEMUXERS = (
    "3g2,3gp,aac,asf,avi,dv,f4v,flac,flv,gif,ivf,matroska,mj2,mov,mp3,mp4,mpeg,mpegts,mxf,nut,ogg,rm,wav,webm,wtv"
)
SPLIT_FIRST = "split it there first, such as by ffmpeg -i IN -c copy -ss START -to END OUT"
_OTHER_SIZE = "non positive size for width '-1'"
"""What ffmpeg says where `timeline.same_size` meets a picture of another size."""
_STDERR_TAIL_CHARS = 600
_STDERR_MAX_BYTES = 16 * 2**20
_PIPE_BYTES = 2**20
_SMALL_FILE_BYTES = 256 * 2**20
_SHARED_MEMORY = "/dev/shm"


_MOST = {"timeout_s": 1_000_000, "max_pixels": 2**31 - 1, "max_duration_s": 1_000_000_000}


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
    max_file_bytes: int = 64 * 2**30
    """Largest input file, in bytes."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"limits.{name} = {getattr(self, name)}: must be more than 0, and finite")
            if getattr(self, name) > _MOST.get(name, 2**62):  # the system has no number for it
                raise ConfigError(f"limits.{name} = {getattr(self, name)}: must be at most {_MOST.get(name, 2**62)}")


def identity() -> str:
    """Program, version and build (a digest of configuration and libraries) of the ffmpeg in PATH, and of ffprobe where that is of
    another build: what decides the pixels of a decoded frame, beside the video and our options.

    Raises:
        ConfigError: one of them is not installed, or does not run.
    """
    builds = {program: _build_of(shutil.which(program) or program) for program in ("ffmpeg", "ffprobe")}
    programs = ("ffmpeg",) if len(set(builds.values())) == 1 else tuple(builds)
    return ", ".join(f"{program} {builds[program]}" for program in programs)


def require_identity(wanted: str) -> None:
    """Raise `ConfigError` unless this machine has the ffmpeg that a dataset is made with."""
    if (own := identity()) != wanted:
        raise ConfigError(
            f"{socket.gethostname()} has {own}; the job that makes this dataset has {wanted}, and another one may decode other "
            "pixels. Install the same ffmpeg on every node, as one container image does, and run the same command again"
        )


@functools.lru_cache
def _build_of(program: str) -> str:
    try:
        said = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except FileNotFoundError:
        raise _not_installed(program) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{program} -version failed: {error}; install another ffmpeg") from error
    first, *lines = said.splitlines() or [""]
    # What compiled it, and when, says less than what it was made of.
    made_of = [line for line in lines if re.match(r"configuration:|lib\w+ +\d", line)]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:12]
    return f"{first.split(' version ')[-1].split(' Copyright')[0]} (build {digest})"


def _not_installed(program: str) -> ConfigError:
    return ConfigError(f"{program} is not installed; install ffmpeg (Debian: apt-get install ffmpeg)")


def input_options(limits: FfmpegLimits) -> dict[str, str | int]:
    """Options, by ffmpeg-python's names, that every untrusted input gets."""
    return {
        "protocol_whitelist": "file,pipe",
        "format_whitelist": DEMUXERS,
        "max_pixels": limits.max_pixels,
        "threads": 1,
    }


def input_words(limits: FfmpegLimits) -> list[str]:
    """`input_options` as words of a command line."""
    return [word for name, value in input_options(limits).items() for word in (f"-{name}", str(value))]


def probe_words(limits: FfmpegLimits) -> list[str]:
    """`input_words` for ffprobe, which decodes next to nothing: it shall report a size that is then refused by name."""
    named = input_options(limits).items()
    return [word for name, value in named if name != "max_pixels" for word in (f"-{name}", str(value))]


def command() -> list[str]:
    """How every command line of ffmpeg begins: quiet, without a terminal, on one core."""
    one = ["-filter_threads", "1", "-filter_complex_threads", "1"]
    return ["ffmpeg", "-v", "error", "-nostdin", "-nostats", "-y", *one]


def run(args: Sequence[str], source: IO[bytes], limits: FfmpegLimits, max_output_bytes: int) -> bytes:
    """Run `args` (whose input is `source_url(source)`) to its end and return what it wrote to stdout.

    Args:
        max_output_bytes: more output than this is an endless or lying stream.

    Raises:
        BadVideo: `timeout`, `resources`, `too-large`, or `corrupt` with the tail of stderr.
        ConfigError: the program is not installed.
    """
    source.seek(0)
    stdout = Pipe(max_output_bytes)
    with Process(args, [source], limits, stdout=stdout) as process:
        output = b"".join(chunk for _, chunk in process.read())
        process.finish()
    return output


def source_url(source: IO[bytes]) -> str:
    """The name by which ffmpeg opens an inherited descriptor, to read it or to write it."""
    return f"file:/dev/fd/{source.fileno()}"


def open_unnamed(expected_bytes: int) -> IO[bytes]:
    """A new file without a name, for reading and writing; it goes away with its descriptor, whatever dies.

    In shared memory where at most 256 MiB are expected, on disk otherwise.
    """
    memory = expected_bytes <= _SMALL_FILE_BYTES and os.access(_SHARED_MEMORY, os.W_OK)
    return tempfile.TemporaryFile(dir=_SHARED_MEMORY if memory else None)


class Pipe:
    """One output of a process, read by ours; `url` names it on ffmpeg's command line.

    Args:
        max_bytes: more than this is an endless or lying stream.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size = 0
        self.read_fd, self.write_fd = os.pipe()
        self.url = f"pipe:{self.write_fd}"
        with contextlib.suppress(OSError):  # a larger buffer saves switches between the processes; it is only speed
            fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def close_write(self) -> None:
        """Leave the writing end to the process alone, so that its end is the pipe's."""
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def close(self) -> None:
        self.close_write()
        if self.read_fd >= 0:
            os.close(self.read_fd)
            self.read_fd = -1


class Process:
    """One program under limits, from its start to `finish`; leaving the context kills its group, whatever happened.

    Its wall clock runs while we wait for it: in `read`, `write` and `finish`, not while the caller does something else.

    Args:
        files: open files that it inherits, named by `source_url`: the inputs, and files to write.
        stdout, pipes: outputs to read; all are closed at the end.
        fed: it reads what `write` gives it, as stdin.
        max_file_bytes: size of a file it may write.

    Raises (every method):
        BadVideo: `timeout`, `resources`, `too-large`, or `corrupt` with the tail of stderr.
        ConfigError: the program is not installed.
    """

    def __init__(
        self,
        args: Sequence[str],
        files: Sequence[IO[bytes]],
        limits: FfmpegLimits,
        *,
        stdout: Pipe | None = None,
        pipes: Sequence[Pipe] = (),
        fed: bool = False,
        max_file_bytes: int = 0,
    ) -> None:
        self._program = args[0]
        self._limits = limits
        self._left_s = limits.timeout_s
        self._names = [source_url(file) for file in files]
        self._pipes = [*([stdout] if stdout else []), *pipes]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed by _close
        try:
            self._process = subprocess.Popen(
                args,
                stdin=subprocess.PIPE if fed else subprocess.DEVNULL,
                stdout=stdout.write_fd if stdout else subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[*(file.fileno() for file in files), *(pipe.write_fd for pipe in pipes)],
                start_new_session=True,
                bufsize=0,
            )
            self._limit(max(max_file_bytes, _STDERR_MAX_BYTES))
        except BaseException as error:
            self._end()
            if isinstance(error, FileNotFoundError):
                raise _not_installed(args[0]) from None
            raise
        for pipe in self._pipes:
            pipe.close_write()
        if self._process.stdin:
            os.set_blocking(self._process.stdin.fileno(), False)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def read(self) -> Iterator[tuple[Pipe, bytes]]:
        """Chunks of all outputs, each as soon as it is there, until all have ended."""
        with selectors.DefaultSelector() as selector:
            for pipe in self._pipes:
                selector.register(pipe.read_fd, selectors.EVENT_READ, pipe)
            while selector.get_map():
                for key, _ in self._wait(selector):
                    pipe = key.data
                    chunk = os.read(pipe.read_fd, _PIPE_BYTES)
                    if not chunk:
                        selector.unregister(pipe.read_fd)
                        continue
                    pipe.size += len(chunk)
                    if pipe.size > pipe.max_bytes:
                        raise BadVideo(
                            "too-large",
                            f"ffmpeg wrote more than the {pipe.max_bytes} bytes that the probe promised",
                        )
                    yield pipe, chunk

    def write(self, data: bytes | memoryview) -> None:
        """Feed all of `data`. A process that ended early is left for `finish` to judge."""
        assert self._process.stdin is not None
        left = memoryview(data).cast("B")
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdin, selectors.EVENT_WRITE)
            while left:
                self._wait(selector)
                try:
                    left = left[os.write(self._process.stdin.fileno(), left) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    return

    def finish(self) -> None:
        """Close its input, wait for its end, and raise what went wrong with it."""
        if self._process.stdin:
            self._process.stdin.close()
        started_s, before_s = time.monotonic(), _children_cpu_s()
        try:
            self._process.wait(timeout=max(0.0, self._left_s))
        except subprocess.TimeoutExpired:
            raise self._timeout() from None
        finally:
            self._left_s -= time.monotonic() - started_s
        code, tail = self._process.returncode, self._tail()
        # At its limit the kernel kills with the signal that it uses when memory runs out; the time tells which it was. The
        # softer SIGXCPU would not: ffmpeg catches it, and ends as after any other failure.
        used_up = code == -signal.SIGKILL and _children_cpu_s() - before_s >= 0.9 * self._cpu_s
        if code == -signal.SIGXCPU or used_up:
            raise BadVideo("timeout", f"{self._program} used up {self._cpu_s} s of CPU time ({self._cpu_limit})", tail)
        if code == -signal.SIGXFSZ:
            raise BadVideo("too-large", f"{self._program} wrote a larger file than the probe promised", tail)
        # ffmpeg catches SIGINT, SIGTERM and the like, and ends with 255, which it does for nothing else.
        if code < 0 or code == 255:
            by = f"signal {-code}" if code < 0 else "a signal"
            raise BadVideo("resources", f"{self._program} was killed by {by}: {tail or 'no message'}", tail)
        if _OTHER_SIZE in tail:
            raise BadVideo("unsupported", f"the size of its pictures changes midway: {SPLIT_FIRST}", tail)
        if code != 0:
            # 127 is the dynamic loader's: it could not map ffmpeg's own libraries, which says nothing about the video.
            no_memory = code == 127 or "Cannot allocate memory" in tail
            reject_class = "resources" if no_memory else "corrupt"
            raise BadVideo(reject_class, f"{self._program} failed: {tail or 'no message'}", tail)

    def _limit(self, max_file_bytes: int) -> None:
        self._cpu_s = int(self._limits.timeout_s) + 1  # bounds it even when we are killed and no one else watches it
        self._cpu_limit = "limits.timeout_s"
        for kind, value in (
            (resource.RLIMIT_AS, self._limits.memory_bytes),
            (resource.RLIMIT_CPU, self._cpu_s),
            (resource.RLIMIT_FSIZE, max_file_bytes),
        ):
            with contextlib.suppress(ProcessLookupError):  # it may have ended already
                _, hard = resource.prlimit(self._process.pid, kind)
                # What we inherited holds anyway, and only root may raise it.
                if hard != resource.RLIM_INFINITY and hard < value:
                    value = hard
                    if kind == resource.RLIMIT_CPU:
                        self._cpu_s, self._cpu_limit = hard, "this job's own limit, as of ulimit -t"
                resource.prlimit(self._process.pid, kind, (value, value))

    def _end(self) -> None:
        if hasattr(self, "_process") and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._close()

    def _wait(self, selector: selectors.BaseSelector) -> list[tuple[selectors.SelectorKey, int]]:
        started_s = time.monotonic()
        ready = selector.select(timeout=max(0.0, self._left_s))
        self._left_s -= time.monotonic() - started_s
        if not ready:
            raise self._timeout()
        return ready

    def _timeout(self) -> BadVideo:
        return BadVideo(
            "timeout", f"ffmpeg took longer than {self._limits.timeout_s:g} s (limits.timeout_s)", self._tail()
        )

    def _tail(self) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 4 * _STDERR_TAIL_CHARS))
        tail = " | ".join(self._stderr.read().decode(errors="replace").split("\n")).strip(" |")
        # The same words in every run; cut only now, so that the cut cannot leave half an address.
        for number, name in enumerate(self._names):
            tail = tail.replace(name, "input" if number == 0 else f"file {number}")
        return re.sub(r" @ 0x[0-9a-f]+", "", tail)[-_STDERR_TAIL_CHARS:]

    def _close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        if hasattr(self, "_process") and self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._stderr.close()


def _children_cpu_s() -> float:
    """CPU time of all children of this process that have ended and been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
