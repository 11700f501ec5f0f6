from __future__ import annotations

import re
import shlex
from typing import Any

from tests.infra.versions import INFRA, ROOT, image, load, pinned, ray_start_options

# What the compose specification knows of what is used here; a name that it does not know would be refused by `docker compose`.
_TOP = {"name", "services", "volumes"}
_SERVICE = {
    *("image", "build", "command", "entrypoint", "environment", "ports", "volumes", "depends_on", "healthcheck"),
    *("restart", "shm_size", "hostname", "user"),
}
_HEALTH = {"test", "interval", "timeout", "retries"}
_CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / name).read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(line.split()[0], " ".join(line.split()[1:])) for line in lines]


def test_the_images_are_pinned_small_and_not_roots() -> None:
    for name in ("docker/Dockerfile", "mlflow/Dockerfile"):
        found = instructions(name)
        known = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD", "EXPOSE"}
        assert {word for word, _ in found} <= known
        assert [value for word, value in found if word == "USER"][-1] == "1000"
        for value in (value for word, value in found if word in ("FROM", "ARG")):
            if match := re.search(r"(\w+):(\S+)|PYTHON_IMAGE=(\S+)", value):
                assert re.search(r":\d+\.\d+\.\d+", match[0]), f"{name}: {value} is not pinned"
        for value in (value for word, value in found if word == "RUN"):
            if "apt-get install" in value:
                assert "--no-install-recommends" in value and "rm -rf /var/lib/apt/lists" in value
            if "pip install" in value:
                assert (
                    "--no-cache-dir" in value or ("ENV", "PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1") in found
                )


def test_what_the_image_copies_exists_and_is_let_through() -> None:
    let_through = {
        line[1:] for line in (INFRA / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    for word, value in instructions("docker/Dockerfile"):
        if word == "COPY" and "--from" not in value:
            for source in shlex.split(value)[:-1]:
                assert (ROOT / source).exists() and source in let_through, source


def test_versions_are_those_that_are_tested() -> None:
    install = next(value for _, value in instructions("mlflow/Dockerfile") if "pip install" in value)
    assert f"mlflow=={pinned('mlflow')}" in install and f"boto3=={pinned('boto3')}" in install
    services = load("docker/compose.yaml")[0]["services"]
    assert services["mlflow"]["image"] == f"tokenreel-mlflow:{pinned('mlflow')}"
    assert {services[name]["image"] for name in ("head", "worker", "folders")} == {image()}


def test_compose_is_what_the_specification_allows() -> None:
    compose = load("docker/compose.yaml")[0]
    assert {name for name in compose if not name.startswith("x-")} <= _TOP
    services: dict[str, dict[str, Any]] = compose["services"]
    for name, service in services.items():
        assert service.keys() <= _SERVICE, f"{name}: {service.keys() - _SERVICE}"
        assert service.get("healthcheck", {}).keys() <= _HEALTH
        assert re.search(r":[\w.-]*\d", service["image"]) and "latest" not in service["image"], f"{name} is not pinned"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to the network"
        depends = service.get("depends_on", {})
        assert set(depends) <= services.keys()
        for other, how in depends.items() if isinstance(depends, dict) else ():
            assert how["condition"] in _CONDITIONS
            assert how["condition"] != "service_healthy" or "healthcheck" in services[other]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (INFRA / "docker" / source).resolve().is_file(), source
            else:
                assert source in compose["volumes"]
        build = service.get("build", {})
        context = INFRA / "docker" / (build["context"] if isinstance(build, dict) and build else build or ".")
        assert context.is_dir()


def test_secrets_come_from_the_environment() -> None:
    text = (INFRA / "docker" / "compose.yaml").read_text()
    needed = set(re.findall(r"\$\{(\w+)", text))
    lines = (INFRA / "docker" / "example.env").read_text().splitlines()
    assert needed == {line.partition("=")[0] for line in lines if line and line[0] != "#"}
    assert all(line.endswith("=") for line in lines if "=" in line), "an example holds a password"
    for service in load("docker/compose.yaml")[0]["services"].values():
        for name, value in service.get("environment", {}).items():
            assert ("PASSWORD" not in name and "SECRET" not in name) or str(value).startswith("${"), name


def test_the_cluster_of_compose_fits_together() -> None:
    services = load("docker/compose.yaml")[0]["services"]
    head, worker = services["head"]["command"], services["worker"]["command"]
    assert "--port=6379" in head and "--address=head:6379" in worker
    assert services["head"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "mlflow:5000" in services["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    for command in (head, worker):
        used = {word.partition("=")[0] for word in shlex.split(command)[2:]}
        assert used <= ray_start_options(), command
