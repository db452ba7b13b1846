# SPDX-License-Identifier: Apache-2.0
"""What is under ``deploy/`` agrees with the server and with itself. No image is built and no cluster asked here."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from ltxrt.serve import command
from ltxrt.serve.contract import OPERATIONS
from ltxrt.serve.settings import ENVIRONMENT_PREFIX, Settings, load_settings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = ("kubernetes.yaml", "kubernetes-gpu.yaml")
GPU = "nvidia.com/gpu"


def dockerfile():
    """Instructions as (name, words), continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text("utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def said(name):
    """What the Dockerfile's instructions of that name say."""
    return [rest for instruction, rest in dockerfile() if instruction == name]


def image_environment():
    return dict(word.split("=", 1) for word in shlex.split(said("ENV")[0]))


def ltxrt_settings(environment):
    """The settings that an environment makes; every name in it has to be one."""
    ours = {name: value for name, value in environment.items() if name.startswith(ENVIRONMENT_PREFIX)}
    assert {name.removeprefix(ENVIRONMENT_PREFIX).lower() for name in ours} <= set(Settings.model_fields)
    return load_settings({}, ours, None)


def compose():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))


def seconds(text):
    return float(re.fullmatch(r"(\d+)s", text)[1])


@pytest.fixture(params=MANIFESTS)
def manifest(request):
    documents = yaml.safe_load_all((DEPLOY / request.param).read_text("utf-8"))
    by_kind = {document["kind"]: document for document in documents}
    assert by_kind.keys() == {"PersistentVolumeClaim", "Service", "NetworkPolicy", "Deployment"}
    return request.param, by_kind


def pod(by_kind):
    return by_kind["Deployment"]["spec"]["template"]["spec"]


def test_dockerfile():
    stages = said("FROM")
    assert [stage.partition(" AS ")[2] for stage in stages] == ["build", ""]
    (base,) = (argument for argument in said("ARG") if argument.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.11[\w.-]*", base)
    for copied in said("COPY"):
        if not copied.startswith("--from="):
            assert all((ROOT / source).exists() for source in copied.split()[:-1])
    (user,) = said("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert said("ENTRYPOINT") == ['["ltxrt", "serve"]']
    chosen = ltxrt_settings(image_environment())
    assert (chosen.host, [str(chosen.port)], [chosen.data]) == ("0.0.0.0", said("EXPOSE"), said("VOLUME"))
    (check,) = said("HEALTHCHECK")
    assert re.search(rf"http://127\.0\.0\.1:{chosen.port}(/\w+)'", check)[1] == "/health"
    assert ("get", "/health") in OPERATIONS


def test_extras_of_the_image_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    variants = [argument for argument in said("ARG") if argument.startswith("EXTRAS=")]
    variants.append("EXTRAS=" + compose()["services"]["ltxrt-gpu"]["build"]["args"]["EXTRAS"])
    assert len(variants) == 2
    for variant in variants:
        assert set(variant.removeprefix("EXTRAS=").split(",")) <= extras.keys()
    assert "gpu" in variants[1]


def test_what_is_not_copied_is_ignored():
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").split() if line[0] == "!"}
    sources = {source for copied in said("COPY") if "--from" not in copied for source in copied.split()[:-1]}
    assert kept == sources


def test_compose():
    services = compose()["services"]
    image = image_environment()
    for service in services.values():
        chosen = ltxrt_settings({**image, **service["environment"]})
        assert service["user"] == said("USER")[0]
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["ports"] == [f"127.0.0.1:{chosen.port}:{chosen.port}"]
        assert service["volumes"] == [f"data:{chosen.data}"]
        assert chosen.api_key_file == f"/run/secrets/{service['secrets'][0]}"
        assert seconds(service["stop_grace_period"]) > chosen.drain_seconds + command._LAST_ANSWERS_SECONDS
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    (device,) = services["ltxrt-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "deploy" not in services["ltxrt"]


def test_kubernetes_probes_ports_and_settings(manifest):
    _, by_kind = manifest
    (container,) = pod(by_kind)["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    chosen = ltxrt_settings({**image_environment(), **environment})
    assert container["ports"] == [{"name": "http", "containerPort": chosen.port}]
    (port,) = by_kind["Service"]["spec"]["ports"]
    assert port["targetPort"] == "http"
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/health",
    }
    for probe in probes.values():
        assert probe["port"] == "http"
        assert OPERATIONS["get", probe["path"]].open
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(by_kind)["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert mounts["data"] == chosen.data
    claim = by_kind["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim
    assert str(Path(chosen.api_key_file).parent) == mounts["keys"]


def test_kubernetes_ends_after_the_drain(manifest):
    _, by_kind = manifest
    (container,) = pod(by_kind)["containers"]
    chosen = ltxrt_settings({**image_environment(), **{entry["name"]: entry["value"] for entry in container["env"]}})
    program, pause = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    takes = float(pause) + chosen.drain_seconds + command._LAST_ANSWERS_SECONDS
    assert pod(by_kind)["terminationGracePeriodSeconds"] > takes


def test_kubernetes_safety_and_selection(manifest):
    _, by_kind = manifest
    spec, (container,) = pod(by_kind), pod(by_kind)["containers"]
    user = int(said("USER")[0].partition(":")[0])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == user
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    inside = container["securityContext"]
    assert (inside["allowPrivilegeEscalation"], inside["readOnlyRootFilesystem"]) == (False, True)
    assert inside["capabilities"] == {"drop": ["ALL"]}
    deployment = by_kind["Deployment"]["spec"]
    # SQLite and its lock belong to one server at a time.
    assert (deployment["replicas"], deployment["strategy"]["type"]) == (1, "Recreate")
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == by_kind["Service"]["spec"]["selector"]
    assert by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels


def test_the_gpu_is_asked_for_where_it_is_wanted(manifest):
    name, by_kind = manifest
    (container,) = pod(by_kind)["containers"]
    wanted = name == "kubernetes-gpu.yaml"
    assert container["resources"]["limits"].get(GPU) == (1 if wanted else None)
    assert container["image"] == ("ltxrt:gpu" if wanted else "ltxrt:cpu")
    assert {service["image"] for service in compose()["services"].values()} == {"ltxrt:gpu", "ltxrt:cpu"}
    assert any(toleration["key"] == GPU for toleration in pod(by_kind).get("tolerations", [])) == wanted
