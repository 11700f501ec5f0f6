"""Can this machine run tokenreel's jobs? Each check says what it found and, where that is not enough, what to do.

Checks run side by side, each with the same deadline, and import nothing heavy: what needs torch or Ray is asked in a
process of its own, so a broken driver or a cluster that is away shows as a line and not as a hang.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jobs.mlflow_store import probe_store, redact_uri, resolve_tracking_uri
from jobs.paths import PathOrUrl
from jobs.result import JobResult
from pipeline.ffmpeg import identity
from pipeline.transcode import ENCODERS

log = logging.getLogger(__name__)

_GIB = 2**30
_MIN_PYTHON = (3, 11)
_MIN_FFMPEG = (5, 1)
_MIN_FILES = 4096
_MIN_SHM_BYTES = 2 * _GIB
_MIN_FREE_BYTES = 10 * _GIB
_MAX_CLOCK_SKEW_S = 5.0
_DECODERS = [
    "h264",
    "hevc",
    "vp8",
    "vp9",
    "av1",
    "mpeg4",
    "mpeg2video",
    "mpeg1video",
    "theora",
    "wmv1",
    "wmv2",
    "wmv3",
    "mjpeg",
    "flv",
    "h263",
]
_DEMUXERS = ["mov", "mp4", "3gp", "matroska", "webm", "avi", "ogg", "asf", "flv", "mpeg", "mpegts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """What to look at."""

    out: PathOrUrl = "."
    """Folder or object-store URI where jobs will write; storage is tried there with one small file."""
    timeout_s: float = 9.0
    """Seconds all checks together may take; one that is slower is reported as such."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the report. fail: jobs will not run; warn: they run, with less or slower. advice: "" when ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


def run(config: DoctorConfig) -> JobResult:
    """Check everything and log a table. Failed where a check failed; warnings are fine."""
    started_s = time.monotonic()
    checks = check_all(config)
    log.info("this machine and its services:\n%s", format_checks(checks))
    failed = sum(check.status == "fail" for check in checks)
    return JobResult(
        job="doctor",
        out=config.out,
        status="failed" if failed else "done",
        planned=len(checks),
        committed=len(checks) - failed,
        rejected=failed,
        elapsed_s=time.monotonic() - started_s,
        figures={"checks": [asdict(check) for check in checks]},
    )


def check_all(config: DoctorConfig) -> list[Check]:
    """Every check, in the order of the report; takes at most about `timeout_s` and never raises."""
    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("python", _check_python),
        ("packages", _check_packages),
        ("ffmpeg", _check_ffmpeg),
        ("torch", lambda: _check_torch(config.timeout_s)),
        ("ray", lambda: _check_ray(config.timeout_s)),
        ("mlflow", _check_mlflow),
        ("storage", lambda: _check_storage(config.out)),
        ("system", _check_system),
    ]
    results: dict[str, list[Check]] = {}

    def check(name: str, function: Callable[[], list[Check]]) -> None:
        try:
            results[name] = function()
        except Exception as error:
            detail = f"{type(error).__name__}: {redact_uri(str(error))[:300]}"
            results[name] = [Check(name=name, status="fail", detail=detail, advice="see the message")]

    deadline_s = time.monotonic() + config.timeout_s
    threads = [threading.Thread(target=check, args=step, daemon=True) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    late = f"no answer in {config.timeout_s:g} s"
    advice = "something hangs: a network disk, a server, a driver; try again with a longer --timeout-s"
    return [
        one
        for name, _ in steps
        for one in results.get(name, [Check(name=name, status="fail", detail=late, advice=advice)])
    ]


def format_checks(checks: list[Check]) -> str:
    """The report as lines of text: status, name, detail, and below it what to do."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.advice:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.advice}")
    return "\n".join(lines)


def _check_python() -> list[Check]:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info >= _MIN_PYTHON:
        return [Check(name="python", status="ok", detail=detail)]
    return [Check(name="python", status="fail", detail=detail, advice="install Python 3.11 or later")]


def _check_packages() -> list[Check]:
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("tokenreel") or []]
    except importlib.metadata.PackageNotFoundError:
        advice = "run `pip install -e .` in the repository"
        return [Check(name="packages", status="warn", detail="tokenreel is not installed", advice=advice)]
    found, wrong = [], []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        found.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        advice = "run `pip install --upgrade tokenreel`, or `pip install -e .` in the repository"
        return [Check(name="packages", status="fail", detail="; ".join(wrong), advice=advice)]
    return [Check(name="packages", status="ok", detail=", ".join(found))]


def _check_ffmpeg() -> list[Check]:
    checks = []
    install = "install ffmpeg 5.1 or later, for example `apt install ffmpeg`, and see that it is in PATH"
    for tool in ("ffmpeg", "ffprobe"):
        path = shutil.which(tool)
        if path is None:
            checks.append(Check(name=tool, status="fail", detail="not found in PATH", advice=install))
            continue
        lines = _run([path, "-hide_banner", "-version"]).splitlines()
        first = lines[0] if lines else "no version"
        match = re.search(r"version n?(\d+)\.(\d+)", first)
        old = match is not None and (int(match[1]), int(match[2])) < _MIN_FFMPEG
        detail = f"{first.split(' Copyright')[0]} at {path}"
        if tool == "ffmpeg" and shutil.which("ffprobe"):
            detail += f"; datasets made here have decoder = {identity()}"
        checks.append(Check(name=tool, status="warn" if old else "ok", detail=detail, advice=install if old else ""))
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        return checks
    encoders, decoders, demuxers = (
        {name for line in _run([ffmpeg, "-hide_banner", flag]).splitlines() for name in _read_names(line)}
        for flag in ("-encoders", "-decoders", "-demuxers")
    )
    if "libdav1d" in decoders or "libaom-av1" in decoders:
        decoders.add("av1")
    lost = [f"{name} ({codec})" for codec, name in ENCODERS.items() if name not in encoders]
    detail = f"missing: {', '.join(lost)}" if lost else ", ".join(ENCODERS.values())
    advice = "install a full build of ffmpeg; storage transcode encodes clips with them" if lost else ""
    status: Literal["ok", "warn", "fail"] = "fail" if ENCODERS["h264"] not in encoders else "warn" if lost else "ok"
    checks.append(Check(name="encoder", status=status, detail=detail, advice=advice))
    for name, needed, there in (("decoders", _DECODERS, decoders), ("demuxers", _DEMUXERS, demuxers)):
        missing = [one for one in needed if one not in there]
        if missing:
            advice = "videos of these kinds will be rejected; install a full build of ffmpeg to keep them"
            checks.append(Check(name=name, status="warn", detail=f"missing: {', '.join(missing)}", advice=advice))
        else:
            checks.append(Check(name=name, status="ok", detail=", ".join(needed)))
    return checks


def _read_names(line: str) -> list[str]:
    """The names in a line of `ffmpeg -decoders` or `-demuxers`: flags, then names with commas between."""
    words = line.split()
    return words[1].split(",") if len(words) > 1 else []


def _check_torch(timeout_s: float) -> list[Check]:
    smi = shutil.which("nvidia-smi")
    gpus: list[str] = []
    if smi is not None:
        query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = [line for line in _run([smi, *query], check=False).splitlines() if line.count(",") == 2]
    code = (
        "import json, torch; c = torch.cuda; ok = c.is_available(); print(json.dumps([torch.__version__, "
        "torch.version.cuda, [c.get_device_name(i) for i in range(c.device_count())] if ok else []]))"
    )
    version, cuda, names = json.loads(_run([sys.executable, "-c", code], timeout_s=timeout_s).splitlines()[-1])
    build = f"torch {version}, " + (f"CUDA {cuda}" if cuda else "built without CUDA")
    driver = f"; driver {gpus[0].split(', ')[2]}" if gpus else ""
    if names:
        return [Check(name="gpu", status="ok", detail=f"{len(names)} x {names[0]}; {build}{driver}")]
    if gpus:
        advice = "install the torch build for your CUDA version, or update the driver"
        detail = f"{len(gpus)} NVIDIA GPUs, but torch cannot use them; {build}{driver}"
        return [Check(name="gpu", status="warn", detail=detail, advice=advice)]
    advice = "fine for shard and for the demo; tokenize and pretrain on GPU machines of a cluster"
    return [Check(name="gpu", status="warn", detail=f"none here; {build}", advice=advice)]


def _check_ray(timeout_s: float) -> list[Check]:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address == "local":
        return _check_local_ray()
    if address.startswith("http"):
        probe_store(address)  # a TCP connection, no more: it is the address of the job server
        return [Check(name="ray", status="ok", detail=f"job server answers at {redact_uri(address)}")]
    code = (
        "import json, ray; ray.init(log_to_driver=False, logging_level='ERROR');"
        "print(json.dumps([ray.cluster_resources(), len([n for n in ray.nodes() if n['Alive']])]))"
    )
    try:
        answer = _run([sys.executable, "-c", code], timeout_s=timeout_s - 1)
        resources, num_nodes = json.loads(answer.splitlines()[-1])
    except (subprocess.SubprocessError, RuntimeError, ValueError, IndexError) as error:
        advice = "start the cluster, correct RAY_ADDRESS, or unset it to use a local Ray; versions must match"
        detail = f"no cluster at RAY_ADDRESS={address}: {str(error)[-200:]}"
        return [Check(name="ray", status="fail", detail=detail, advice=advice)]
    detail = f"{address}: {num_nodes} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    return [Check(name="ray", status="ok", detail=f"{detail}, {resources.get('memory', 0) / _GIB:.0f} GiB")]


def _check_local_ray() -> list[Check]:
    import psutil

    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_bytes = min(psutil.virtual_memory().available, _read_memory_limit())
    detail = f"RAY_ADDRESS is not set: jobs start a local Ray on {num_cpus} CPUs, {memory_bytes / _GIB:.1f} GiB free"
    low = memory_bytes < 2 * _GIB
    advice = "a local Ray with its workers wants 2 GiB or more; close programs or use a cluster" if low else ""
    checks = [Check(name="ray", status="warn" if low else "ok", detail=detail, advice=advice)]
    if Path("/dev/shm").is_dir():
        shm_bytes = shutil.disk_usage("/dev/shm").total
        small = shm_bytes < _MIN_SHM_BYTES
        advice = "Ray will put shared objects on disk, which is slow; in a container set --shm-size=2g or more"
        detail = f"/dev/shm has {shm_bytes / _GIB:.1f} GiB"
        checks.append(
            Check(name="shm", status="warn" if small else "ok", detail=detail, advice=advice if small else "")
        )
    return checks


def _read_memory_limit() -> float:
    """Bytes that this container may use; infinity where no cgroup says so."""
    try:
        return float(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return float("inf")


def _check_mlflow() -> list[Check]:
    uri = resolve_tracking_uri()
    shown, client = redact_uri(uri), importlib.metadata.version("mlflow")
    try:
        probe_store(uri)
        if not uri.startswith("http"):
            embedded = "embedded store" if "MLFLOW_TRACKING_URI" not in os.environ else "MLFLOW_TRACKING_URI"
            return [Check(name="mlflow", status="ok", detail=f"{embedded} {shown}; mlflow {client}")]
        parts = urllib.parse.urlsplit(redact_uri(uri))
        url = urllib.parse.urlunsplit((*parts[:2], parts.path.rstrip("/") + "/version", "", ""))
        with urllib.request.urlopen(url, timeout=3) as response:
            server = response.read(100).decode(errors="replace").strip()
    except Exception as error:
        if "HTTP Error 40" in str(error):  # it answers, and wants a login that only mlflow's client makes
            return [Check(name="mlflow", status="ok", detail=f"server {shown} asks for a login; mlflow {client}")]
        advice = "jobs run all the same and send their numbers later; start the server or correct MLFLOW_TRACKING_URI"
        detail = f"{shown} does not answer: {redact_uri(str(error))[:200]}"
        return [Check(name="mlflow", status="warn", detail=detail, advice=advice)]
    newer = server.split(".")[0] != client.split(".")[0]
    advice = "client and server are of different major versions; bring them together" if newer else ""
    detail = f"server {shown} has mlflow {server[:20]}, here is {client}"
    return [Check(name="mlflow", status="warn" if newer else "ok", detail=detail, advice=advice)]


def _check_storage(out: str) -> list[Check]:
    from pyarrow import fs

    is_local = "://" not in out
    if is_local:
        folder = Path(out).resolve()
        while not folder.exists():  # a job makes its out folder; the disk below it is what is tried
            folder = folder.parent
        system, root = fs.LocalFileSystem(), str(folder)
    else:
        system, root = fs.FileSystem.from_uri(out)
    first, second = (f"{root}/.tokenreel-doctor-{uuid.uuid4().hex}{end}" for end in (".tmp", ""))
    payload, step = os.urandom(4096), "write"
    try:
        start_s = time.time()
        with system.open_output_stream(first) as stream:
            stream.write(payload)
        step = "rename"
        system.move(first, second)
        step = "list"
        info = {one.path: one for one in system.get_file_info(fs.FileSelector(root))}
        if second not in info:
            raise OSError("a file that was just written is not listed")
        step = "read"
        with system.open_input_stream(second) as stream:
            if stream.read() != payload:
                raise OSError("other bytes came back than were written")
        elapsed_s = time.time() - start_s
        modified_s = info[second].mtime_ns / 1e9
    except OSError as error:
        advice = "correct --out, its permissions, quota or credentials"
        return [Check(name="storage", status="fail", detail=f"cannot {step} in {root}: {error}", advice=advice)]
    finally:
        for path in (first, second):
            try:
                system.delete_file(path)
            except OSError:
                continue
    detail = f"write, rename, list, read in {root} took {elapsed_s * 1000:.0f} ms"
    checks = [Check(name="storage", status="ok", detail=detail), _check_clock(modified_s - start_s)]
    if is_local:
        free_bytes = shutil.disk_usage(root).free
        low = free_bytes < _MIN_FREE_BYTES
        advice = "a dataset needs about as much as its videos, a checkpoint three times its model" if low else ""
        status: Literal["ok", "warn"] = "warn" if low else "ok"
        checks.insert(1, Check(name="space", status=status, detail=f"{free_bytes / _GIB:.1f} GiB free", advice=advice))
    return checks


def _check_clock(skew_s: float) -> Check:
    """The clock against the storage's own, and against the age of this file, which cannot come from the future."""
    if time.time() < Path(__file__).stat().st_mtime - 86400:
        detail = f"{time.strftime('%Y-%m-%d %H:%M')} is before this program was installed"
        return Check(name="clock", status="warn", detail=detail, advice="set the clock; TLS and MLflow need it")
    if abs(skew_s) > _MAX_CLOCK_SKEW_S:
        advice = "switch time synchronisation on (NTP): logs and object stores rely on it"
        return Check(name="clock", status="warn", detail=f"{skew_s:+.0f} s off the storage's clock", advice=advice)
    return Check(name="clock", status="ok", detail=time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def _check_system() -> list[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < _MIN_FILES
    advice = f"run `ulimit -n {min(hard, 65536) if hard > 0 else 65536}` first: Ray opens many sockets" if low else ""
    detail = f"{soft} open files a process (hard limit {hard})"
    return [Check(name="files", status="warn" if low else "ok", detail=detail, advice=advice)]


def _run(command: list[str], *, timeout_s: float = 8.0, check: bool = True) -> str:
    """Standard output of `command`; with `check`, a failure raises RuntimeError with the end of its standard error."""
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout
