"""Which container a remuxed clip is written in."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import BadVideo
from pipeline.mp4 import MP4_CONTAINER
from pipeline.probe import VideoInfo
from pipeline.transcode import MP4

# What the MP4 muxer takes and common players read; everything else goes to Matroska, which takes all.
_MP4_VIDEO = ("h264", "hevc", "av1", "vp9", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg")
_MP4_AUDIO = ("aac", "mp3", "ac3", "eac3", "opus", "flac", "alac", "mp2")
# What QuickTime takes beside: for turned pictures alone, because the Matroska muxer of ffmpeg before 6.1 loses the turn.
_MOV_VIDEO = (
    *("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg", "prores", "dnxhd", "dvvideo", "h263", "jpeg2000"),
    *("png", "qtrle", "rawvideo", "svq1", "svq3", "v210", "cinepak", "cfhd"),
)
_MOV_AUDIO = ("aac", "mp3", "ac3", "eac3", "alac", "mp2", "adpcm_ima_qt", "amr_nb", "amr_wb", "qdm2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """A container to write: ffprobe's name for it, its extension, and ffmpeg's output options."""

    name: str
    ext: str
    words: tuple[str, ...]


_MP4 = Container(name=MP4_CONTAINER, ext="mp4", words=MP4)
_MOV = Container(name=MP4_CONTAINER, ext="mov", words=("-f", "mov", *MP4[2:]))
_MATROSKA = Container(
    name="matroska,webm",
    ext="mkv",
    words=("-f", "matroska", "-fflags", "+bitexact", "-map_metadata", "-1", "-map_chapters", "-1"),
)


def choose_container(info: VideoInfo, audio_codec: str) -> Container:
    """Where a video's packets go, with sound of `audio_codec` ("" without).

    MP4 where it takes both; else Matroska, or QuickTime for pictures that the container turns.

    Raises:
        BadVideo: `unsupported`, no container would hold the streams and their turn.
    """
    if info.codec in _MP4_VIDEO and (not audio_codec or audio_codec in _MP4_AUDIO):
        return _MP4
    if not info.picture.is_turned:
        return _MATROSKA
    sound_fits = not audio_codec or audio_codec in _MOV_AUDIO or audio_codec.startswith("pcm_")
    if info.codec in _MOV_VIDEO and sound_fits:
        return _MOV
    streams = f"{info.codec} with {audio_codec}" if audio_codec else info.codec
    raise BadVideo(
        "unsupported",
        f"the pictures are turned by their container, and neither MP4 nor QuickTime takes {streams}; use --storage transcode",
    )
