#!/bin/sh
# Installs the system's ffmpeg where it is missing: apt-get as root, else a message that says what to do.
set -eu
if command -v ffmpeg >/dev/null && command -v ffprobe >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ffmpeg with apt-get" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ffmpeg >/dev/null
    exit 0
fi
echo "ffmpeg and ffprobe are needed and not on PATH. Install them and run this again:" >&2
echo "  Debian, Ubuntu: sudo apt-get install ffmpeg    macOS: brew install ffmpeg    Fedora: sudo dnf install ffmpeg" >&2
exit 1
