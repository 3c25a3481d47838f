"""The files to roll out with: they are well formed, name what exists, and agree with vLLM and docs/operate.md.

No image is built: there is no builder where the tests run.
"""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser

from tests.serve_commands import parse_serve
from tests.tree import ROOT, tracked

DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
INSTRUCTIONS = {"ARG", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"}


def instructions(name: str) -> list[tuple[str, str]]:
    parser = DockerfileParser(fileobj=(DEPLOY / name).open("rb"))
    return [(each["instruction"], each["value"]) for each in parser.structure if each["instruction"] != "COMMENT"]


def copied(name: str) -> list[str]:
    """What a Dockerfile copies from the checkout."""
    values = [value for instruction, value in instructions(name) if instruction == "COPY" and "--from=" not in value]
    return [source for value in values for source in value.split()[:-1]]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def compose() -> dict[str, Any]:
    return documents("compose.yaml")[0]["services"]


def pod() -> dict[str, Any]:
    (found,) = [each for each in documents("kubernetes.yaml") if each["kind"] == "Deployment"]
    return found["spec"]["template"]["spec"]


def unit() -> configparser.ConfigParser:
    # A key may be there several times.
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "vllm-dllm.service")
    return parser


def serve_commands() -> dict[str, list[str]]:
    start = shlex.split(unit()["Service"]["ExecStart"])
    assert start[1] == "serve"
    return {"compose": compose()["vllm"]["command"], "kubernetes": pod()["containers"][0]["args"], "systemd": start[2:]}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_keeps_the_rules(name: str) -> None:
    found = instructions(name)
    assert {instruction for instruction, _ in found} <= INSTRUCTIONS
    last = dict(found)
    assert last["USER"] not in ("root", "0")
    assert all(
        last[each].partition("CMD ")[2 if each == "HEALTHCHECK" else 0].startswith("[")
        for each in ("HEALTHCHECK", "ENTRYPOINT")
    )
    defaults = dict(value.split("=", 1) for instruction, value in found if instruction == "ARG" and "=" in value)
    for instruction, value in found:
        image = re.sub(r"\$\{(\w+)\}", lambda each: defaults[each[1]], value.split()[0])
        assert instruction != "FROM" or re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", image), f"{value}: no pinned tag"
        if "apt-get install" in value:
            assert "--no-install-recommends" in value
            assert "rm -rf /var/lib/apt/lists/*" in value
        assert "pip install" not in value or "--no-cache-dir" in value or "PIP_NO_CACHE_DIR" in str(found)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_a_dockerfile_copies_is_there_and_is_enough_for_the_sources(name: str, tmp_path: Path) -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    files = {path.relative_to(ROOT).as_posix() for path in tracked()}
    for source in copied(name):
        assert source.partition("/")[0] not in ignored
        mine = [file for file in files if file == source or file.startswith(f"{source}/")]
        assert mine, f"{source} is not in the checkout"
        for file in mine:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
    build = "import setuptools.build_meta as backend; print(backend.build_sdist('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert sources <= {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("csrc/**/*")}


@pytest.mark.parametrize("name", ["compose", "kubernetes", "systemd"])
def test_vllm_takes_the_command(name: str) -> None:
    found = parse_serve(serve_commands()[name])
    assert found.spec_method == "spiffy"
    assert found.shutdown_timeout == 60


def test_who_stops_the_server_waits_longer_than_it() -> None:
    waits = {
        "compose": compose()["vllm"]["stop_grace_period"].removesuffix("s"),
        "kubernetes": pod()["terminationGracePeriodSeconds"],
        "systemd": unit()["Service"]["TimeoutStopSec"],
    }
    assert {name: int(value) >= 60 + 15 for name, value in waits.items()} == dict.fromkeys(waits, True)


def test_compose_names_files_that_exist() -> None:
    build = compose()["vllm"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert (context, (context / build["dockerfile"]).is_file()) == (ROOT, True)
    binds = [bind.split(":") for each in compose().values() for bind in each.get("volumes", ()) if bind[0] == "."]
    assert len(binds) >= 4
    assert [bind for bind in binds if not (DEPLOY / bind[0]).is_file()] == []
    targets = {bind[1] for bind in binds}
    (provider,) = documents("grafana/dashboards.yaml")[0]["providers"]
    assert f"{provider['options']['path']}/vllm-dllm.json" in targets
    (job,) = documents("prometheus.yml")[0]["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert compose()[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    (source,) = documents("grafana/datasource.yaml")[0]["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_the_pod_is_probed_as_the_page_says() -> None:
    (page,) = re.findall(r"^```yaml\n(spec:.*?)^```", (ROOT / "docs/operate.md").read_text(), re.MULTILINE | re.DOTALL)
    (shown,), (container,) = yaml.safe_load(page)["spec"]["containers"], pod()["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
        assert container[probe]["periodSeconds"] == shown[probe]["periodSeconds"]
    assert container["lifecycle"] == shown["lifecycle"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod()["volumes"]}
    claims = {
        each["metadata"]["name"] for each in documents("kubernetes.yaml") if each["kind"] == "PersistentVolumeClaim"
    }
    assert {v["persistentVolumeClaim"]["claimName"] for v in pod()["volumes"] if "persistentVolumeClaim" in v} == claims
    (service,) = [each for each in documents("kubernetes.yaml") if each["kind"] == "Service"]
    assert service["spec"]["selector"] == {"app": "vllm-dllm"}


def test_the_user_may_write_where_weights_are_kept() -> None:
    (hub,) = [mount["mountPath"] for mount in pod()["containers"][0]["volumeMounts"] if mount["name"] == "hub"]
    (volume,) = compose()["vllm"]["volumes"]
    for name, mount in {"Dockerfile": volume.removeprefix("hub:"), "Dockerfile.cuda": hub}.items():
        last = dict(instructions(name))
        (runs,) = [" ".join(value.split()) for _, value in instructions(name) if "useradd" in value]
        user, home = last["USER"], last["WORKDIR"]
        uid = pod()["securityContext"]["runAsUser"] if mount == hub else 1000
        assert f"useradd --create-home --home-dir {home} --uid {uid} {user}" in runs
        assert mount == f"{home}/.cache/huggingface"
        # Docker takes a volume's owner from the image's folder; of folders that are missing it is root.
        assert runs.endswith(f" && install -d -o {user} -g {user} {home}/.cache {mount}")
    service = (DEPLOY / "vllm-dllm.service").read_text().splitlines()
    assert {"ProtectSystem=strict", "StateDirectory=vllm-dllm", "Environment=HOME=/var/lib/vllm-dllm"} <= {*service}


def test_a_wheel_gets_the_tag_of_the_oldest_glibc(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm_dllm-0.0.0-py3-none-linux_x86_64.whl"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: py3-none-linux_x86_64\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(ROOT / "vllm_dllm/_C.so", "vllm_dllm/_C.so")
        archive.writestr("vllm_dllm-0.0.0.dist-info/WHEEL", tags)
        archive.writestr(
            "vllm_dllm-0.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm-dllm\nVersion: 0.0.0\n"
        )
        archive.writestr("vllm_dllm-0.0.0.dist-info/RECORD", "vllm_dllm/_C.so,,\n")
    command = [ROOT / "scripts/repair_wheel.sh", wheel, tmp_path / "dist"]
    subprocess.run(command, check=True, capture_output=True)
    (repaired,) = (tmp_path / "dist").iterdir()
    assert re.fullmatch(r"vllm_dllm-0\.0\.0-py3-none-(manylinux_\d+_\d+_x86_64\.?)+\.whl", repaired.name)
    with zipfile.ZipFile(repaired) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        assert libraries == ["vllm_dllm/_C.so"], "torch and OpenMP are those of the installation"
