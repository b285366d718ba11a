"""deploy/ builds into what Kubernetes takes, and each rule about it is shown to catch a violation."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from teacher_service import server
from teacher_service.config import ENV_PREFIX, ServiceSettings
from teacher_service.engine.fake import FakeEngine
from tests.support import manifests as rules
from tests.support.kustomize import DEPLOY, OVERLAYS, ROOT, TIMEOUT_S, built, deploy_tool, overlay_with_tls
from tests.support.manifests import CHECKS, CLOSING_S, DEFAULT_DRAIN_S, USER_MADE, Check, Manifest
from tests.support.quantities import parse_quantity
from tests.support.service import running_service
from trainer.config.hydra_store import register_verl_config

DOCS = (ROOT / "docs" / "deploy.md").read_text()
METRIC = "teacher_queued_tokens"

Change = Callable[[dict[str, Manifest]], object]


@pytest.fixture(scope="module", params=[f"{overlay}{tls}" for overlay in OVERLAYS for tls in ("", "-tls")])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    overlay, _, tls = request.param.partition("-")
    if not tls:
        return built(DEPLOY / "overlays" / overlay)
    return built(overlay_with_tls(tmp_path_factory.mktemp("tls"), overlay))


@pytest.fixture
def base() -> dict[str, Manifest]:
    """The base as it is written, by `Kind/name`, with the images that an overlay gives it."""
    found = {rules.title(one): one for one in rules.read_tree(DEPLOY / "base")}
    for pod in rules.pods(list(found.values())):
        for container in pod.containers:
            container["image"] += ":cpu"
    for one in found.values():
        if one["kind"] != "Namespace":
            one["metadata"]["namespace"] = "gkd"
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_build_keeps_the_rule(check: Check, build: list[Manifest]) -> None:
    """No overlay breaks a rule, with TLS or without."""
    assert check(build) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_base_keeps_the_rule(check: Check, base: dict[str, Manifest]) -> None:
    """The files as they are written, for where there is no kustomize."""
    assert check(list(base.values())) == []


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_file_is_yaml_and_is_used(path: Path) -> None:
    """No kustomization leaves a file of its folder out, and none names one that is missing."""
    list(yaml.safe_load_all(path.read_text()))
    if path.name == "kustomization.yaml":
        named = {*_named_files(yaml.safe_load(path.read_text()))}
        assert [name for name in named if not (path.parent / name).exists()] == []
        assert {one.name for one in path.parent.glob("*.*")} - {path.name} <= named


def _named_files(kustomization: Mapping[str, Any]) -> list[str]:
    found = [*kustomization.get("resources", []), *kustomization.get("configurations", [])]
    found += [name for one in kustomization.get("configMapGenerator", []) for name in one["files"]]
    return found + [one["path"] for one in kustomization.get("patches", []) if "path" in one]


def _set(where: str, value: object) -> Change:
    """Set `Kind/name|key/key/0/key` to a value; None deletes it."""

    def change(objects: dict[str, Manifest]) -> None:
        name, _, path = where.partition("|")
        *parents, last = [int(step) if step.isdigit() else step for step in path.split("/")]
        node: Any = objects[name]
        for step in parents:
            node = node[step]
        if value is None:
            del node[last]
        else:
            node[last] = value

    return change


def _drop(name: str) -> Change:
    return lambda objects: objects.pop(name)


def _twice(name: str) -> Change:
    return lambda objects: objects.update({f"{name} again": copy.deepcopy(objects[name])})


TEACHER = "Deployment/gkd-teacher|spec/template/spec"
TEACHER_CONTAINER = TEACHER + "/containers/0"
TRAINER = "Job/gkd-trainer|spec/template/spec"
POLICY = "NetworkPolicy/gkd-teacher|spec"


@pytest.mark.parametrize(
    ("check", "change", "violation"),
    [
        (rules.names, _set("Service/gkd-teacher|metadata/name", "gkd_teacher"), "is no DNS-1123 name"),
        (rules.names, _set("Service/gkd-teacher|metadata/name", "Gkd"), "is no DNS-1123 name"),
        (rules.names, _set(TEACHER_CONTAINER + "/name", "teacher.one"), "is no DNS-1123 label"),
        (rules.names, _set(TEACHER + "/volumes/0/name", "-scripts"), "is no DNS-1123 label"),
        (rules.names, _set(TEACHER_CONTAINER + "/ports/0/name", "a-port-of-16-char"), "is no name of a port"),
        (rules.namespaces, _set("Service/gkd-teacher|metadata/namespace", "default"), "its namespace is default"),
        (rules.namespaces, _set("Service/gkd-teacher|metadata/namespace", None), "its namespace is None"),
        (rules.namespaces, _drop("Namespace/gkd"), "the namespace gkd is not in the build"),
        (rules.namespaces, _twice("Service/gkd-teacher"), "Service/gkd-teacher stands twice"),
        (rules.quantities, _set(TEACHER_CONTAINER + "/resources/limits/memory", "6GiB"), "'6GiB' is no quantity"),
        (rules.quantities, _set(TEACHER_CONTAINER + "/resources/requests/cpu", "5"), "of cpu is above its limit"),
        (rules.quantities, _set(TEACHER + "/volumes/3/emptyDir/sizeLimit", "10 Gi"), "'10 Gi' is no quantity"),
        (
            rules.quantities,
            _set("PersistentVolumeClaim/gkd-runs|spec/resources/requests/storage", "5gi"),
            "requests.storage: '5gi' is no quantity",
        ),
        (
            rules.quantities,
            _set("HorizontalPodAutoscaler/gkd-teacher|spec/metrics/0/pods/target/averageValue", "128K"),
            "averageValue: '128K' is no quantity",
        ),
        (
            rules.selectors,
            _set("Deployment/gkd-teacher|spec/selector/matchLabels", {"app.kubernetes.io/name": "teacher"}),
            "Deployment/gkd-teacher: its selector",
        ),
        (rules.selectors, _set("Deployment/gkd-teacher|spec/selector/matchLabels", {}), "its selector {}"),
        (rules.selectors, _set("Service/gkd-teacher|spec/selector", {"app": "x"}), "matches no pod"),
        (rules.service_ports, _set("Service/gkd-teacher|spec/ports/0/targetPort", "rpc"), "has no port rpc"),
        (rules.service_ports, _set(TEACHER_CONTAINER + "/ports/1/name", "web"), "has no port http"),
        (rules.probe_ports, _set(TEACHER_CONTAINER + "/readinessProbe/grpc/port", 15556 + 1), "asks port 15557"),
        (
            rules.probe_ports,
            _set(TEACHER_CONTAINER + "/livenessProbe", {"httpGet": {"port": "web", "path": "/healthz"}}),
            "livenessProbe.httpGet asks port web",
        ),
        (rules.grace_periods, _set(TEACHER + "/terminationGracePeriodSeconds", 91), "91 s to end and may need 92 s"),
        (rules.grace_periods, _set(TEACHER + "/terminationGracePeriodSeconds", None), "has 30 s to end"),
        (rules.grace_periods, _set(TEACHER_CONTAINER + "/lifecycle", {}), "no preStop sleep"),
        (
            rules.grace_periods,
            _set(TEACHER_CONTAINER + "/env/3", {"name": "TEACHER_DRAIN_TIMEOUT_S", "value": "600"}),
            "may need 632 s",
        ),
        (rules.references, _drop("ServiceAccount/gkd-teacher"), "ServiceAccount gkd-teacher is not there"),
        (rules.references, _drop("ConfigMap/gkd-scripts"), "ConfigMap gkd-scripts is not there"),
        (rules.references, _drop("PersistentVolumeClaim/gkd-runs"), "PersistentVolumeClaim gkd-runs is not there"),
        (rules.references, _set(TEACHER + "/volumes/2/secret/secretName", "token"), "Secret token is not there"),
        (
            rules.references,
            _set(TEACHER_CONTAINER + "/env/0", {"name": "X", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}}),
            "Secret x is not there",
        ),
        (
            rules.references,
            _set(TEACHER_CONTAINER + "/volumeMounts/0/name", "model"),
            "teacher mounts model, which is no volume",
        ),
        (
            rules.targets,
            _set("PodDisruptionBudget/gkd-teacher|spec/selector/matchLabels", {"app": "x"}),
            "PodDisruptionBudget/gkd-teacher: it covers no pod",
        ),
        (
            rules.targets,
            _set("HorizontalPodAutoscaler/gkd-teacher|spec/scaleTargetRef/name", "teacher"),
            "there is no Deployment/teacher",
        ),
        (rules.targets, _set("Deployment/gkd-teacher|spec/replicas", 2), "it sets replicas"),
        (rules.network_policies, _drop("NetworkPolicy/gkd-default-deny"), "no policy denies by default"),
        (
            rules.network_policies,
            _set("NetworkPolicy/gkd-default-deny|spec/egress", [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]),
            "no policy denies by default",
        ),
        (
            rules.network_policies,
            _set("NetworkPolicy/gkd-default-deny|spec/policyTypes", ["Ingress"]),
            "no policy denies by default",
        ),
        (rules.network_policies, _set("NetworkPolicy/gkd-default-deny|spec/ingress", [{}]), "denies by default"),
        (rules.network_policies, _set(POLICY + "/egress", [{}]), "a rule for egress names no peer"),
        (rules.network_policies, _set(POLICY + "/podSelector/matchLabels", {"app": "x"}), "it covers no pod"),
        (
            rules.network_policies,
            _set(POLICY + "/ingress/0/from/0/podSelector/matchLabels", {"app": "x"}),
            "its peer {'app': 'x'} is no pod",
        ),
        (rules.network_policies, _set(POLICY + "/ingress/0/from", None), "names no peer, and so allows all"),
        (rules.network_policies, _set(POLICY + "/ingress/0/ports/0/port", "rpc"), "has no port rpc"),
        (
            rules.network_policies,
            _set("NetworkPolicy/gkd-trainer|spec/egress/0/ports/0/port", "rpc"),
            "Deployment/gkd-teacher has no port rpc",
        ),
        (rules.security, _set("Namespace/gkd|metadata/labels", {}), "does not enforce the restricted standard"),
        (rules.security, _set("ServiceAccount/gkd-teacher|automountServiceAccountToken", None), "its token is mounted"),
        (rules.security, _set(TEACHER + "/securityContext/runAsNonRoot", None), "it may run as root"),
        (rules.security, _set(TEACHER + "/securityContext/runAsUser", 0), "it may run as root"),
        (rules.security, _set(TRAINER + "/securityContext/seccompProfile", None), "calls are not filtered"),
        (rules.security, _set(TRAINER + "/automountServiceAccountToken", None), "a token is mounted"),
        (rules.security, _set(TEACHER + "/enableServiceLinks", None), "Services add variables"),
        (rules.security, _set(TEACHER + "/hostNetwork", True), "hostNetwork is set"),
        (
            rules.security,
            _set(TEACHER + "/volumes/4", {"name": "tmp", "hostPath": {"path": "/"}}),
            "tmp is the host's",
        ),
        (rules.security, _set(TEACHER_CONTAINER + "/securityContext/privileged", True), "teacher: privileged"),
        (rules.security, _set(TEACHER_CONTAINER + "/securityContext/readOnlyRootFilesystem", None), "readOnlyRoot"),
        (rules.security, _set(TEACHER_CONTAINER + "/securityContext/allowPrivilegeEscalation", None), "Escalation"),
        (rules.security, _set(TEACHER + "/initContainers/0/securityContext/capabilities", None), "capabilities"),
        (rules.security, _set(TEACHER_CONTAINER + "/volumeMounts/2/mountPath", "/c"), "/cache is not writable"),
        (rules.security, _set(TEACHER_CONTAINER + "/volumeMounts/3/mountPath", "/t"), "/tmp is not"),  # noqa: S108 - a message
        (rules.images, _set(TEACHER_CONTAINER + "/image", "gkd-teacher"), "image gkd-teacher is not pinned"),
        (rules.images, _set(TEACHER_CONTAINER + "/image", "host:5000/gkd-teacher"), "is not pinned"),
        (rules.images, _set(TEACHER_CONTAINER + "/image", "gkd-teacher:latest"), "is not pinned"),
    ],
)
def test_violation_is_caught(check: Check, change: Change, violation: str, base: dict[str, Manifest]) -> None:
    """Each rule sees what is broken, and says so; before, it saw nothing."""
    assert check(list(base.values())) == []
    change(base)
    assert any(violation in one for one in check(list(base.values()))), check(list(base.values()))


@pytest.mark.parametrize(
    ("text", "number"), [("128Ki", 131072), ("500m", 0.5), ("1.5Gi", 1610612736), ("2e3", 2000), ("16", 16), (8, 8)]
)
def test_quantities_are_read_as_kubernetes_does(text: object, number: float) -> None:
    """Decimal and binary units, exponents, plain numbers."""
    assert parse_quantity(text) == pytest.approx(number)


def test_times_are_those_of_the_service() -> None:
    """The grace period is computed from what the service itself takes to end."""
    assert server._WRITE_GRACE_S + server._ENGINE_CLOSE_TIMEOUT_S == CLOSING_S
    assert ServiceSettings.model_fields["drain_timeout_s"].default == DEFAULT_DRAIN_S


def test_variables_are_settings_of_the_service(build: list[Manifest]) -> None:
    """The service refuses any other, and would not start."""
    known = {ENV_PREFIX + name.upper() for name in ServiceSettings.model_fields}
    given = {one["name"] for pod in rules.pods(build) for box in pod.containers for one in box.get("env", [])}
    assert {one for one in given if one.startswith(ENV_PREFIX)} - known == set()


async def test_probes_ask_what_the_service_answers(build: list[Manifest]) -> None:
    """Health services and paths exist, and are well once the service is ready."""
    probes = [
        container[f"{when}Probe"]
        for pod in rules.pods(build)
        for container in pod.containers
        if container["name"] == "teacher"
        for when in ("startup", "readiness", "liveness")
    ]
    assert len(probes) == 3
    async with running_service(FakeEngine()) as service:
        health = health_pb2_grpc.HealthStub(service.channel)
        for probe in probes:
            if "grpc" in probe:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=probe["grpc"]["service"]))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            else:
                assert (await service.http.get(probe["httpGet"]["path"])).status_code == 200


async def test_autoscaler_reads_a_metric_of_the_service(build: list[Manifest]) -> None:
    """Autoscaler, adapter and service call it the same."""
    scalers = [one for one in build if one["kind"] == "HorizontalPodAutoscaler"]
    assert [one["spec"]["metrics"][0]["pods"]["metric"]["name"] for one in scalers] == [METRIC]
    [rule] = yaml.safe_load((DEPLOY / "monitoring" / "prometheus-adapter-values.yaml").read_text())["rules"]["custom"]
    assert rule["seriesQuery"].startswith(METRIC + "{")
    assert rule["name"]["as"] == METRIC
    async with running_service(FakeEngine()) as service:
        assert METRIC in await service.metrics()


def test_overrides_are_keys_of_the_trainer(build: list[Manifest]) -> None:
    """Hydra takes every line; the files are read in the order of their names."""
    [overrides] = [one["data"] for one in build if one["metadata"]["name"].startswith("gkd-trainer-overrides")]
    lines = [line for name in sorted(overrides) for line in overrides[name].splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    register_verl_config()
    with initialize_config_dir(str(ROOT / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=lines)
    for key in (one.partition("=")[0] for one in lines):
        assert OmegaConf.select(config, key) is not None
    assert config.actor_rollout_ref.teacher.endpoints == "gkd-teacher:15555"


def test_of_a_key_that_stands_twice_the_last_value_holds() -> None:
    """Which is how an overlay's file changes what the common one says."""
    register_verl_config()
    with initialize_config_dir(str(ROOT / "trainer" / "config"), version_base=None):
        twice = ["trainer.nnodes=1", "trainer.nnodes=2"]
        assert compose("ppo_trainer", overrides=twice).trainer.nnodes == 2


def test_tls_keeps_the_key_from_the_trainer(build: list[Manifest]) -> None:
    """Trainers mount the authority's certificate alone."""
    for pod in rules.pods(build):
        for volume in pod.spec.get("volumes", []):
            if volume.get("secret", {}).get("secretName") == "gkd-teacher-tls" and "trainer" in pod.owner:
                assert volume["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


def test_volume_loader_may_run_in_the_namespace(base: dict[str, Manifest]) -> None:
    """The pod that docs/deploy.md has the user make keeps to the same rules."""
    [loader] = rules.parse_manifests((DEPLOY / "volume-loader.yaml").read_text())
    base[rules.title(loader)] = loader
    assert [violation for check in CHECKS for violation in check(list(base.values()))] == []


def test_docs_name_what_is_there() -> None:
    """Every path under deploy/ in docs/deploy.md exists, and every Secret that the user makes is explained."""
    paths = set(re.findall(r"\bdeploy/[\w./-]+\w", DOCS.partition("## Kubernetes")[2]))
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    for kind, name in USER_MADE:
        assert re.search(rf"create {kind.lower()} \w+ {name} ", DOCS), name


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=ROOT)


def test_lint_passes() -> None:
    """yamllint, Kubernetes' own schemas and checkov have nothing to say."""
    deploy_tool("checkov")
    done = _run("tools/deploy/lint.sh")
    assert done.returncode == 0, done.stdout + done.stderr


BROKEN = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: x, namespace: gkd}
spec:
  selector: {matchLabels: {a: b}}
  template:
    metadata: {labels: {a: b}}
    spec:
      containers:
        - name: x
          image: x:1
          %s
"""
RAY = BROKEN.replace("apps/v1", "ray.io/v1").replace("Deployment", "RayJob")


@pytest.mark.parametrize("template", [BROKEN, RAY], ids=["deployment", "custom resource"])
@pytest.mark.parametrize(
    ("line", "message"), [("imagePolicy: Always", "imagePolicy"), ("ports: [{containerPort: http}]", "'http' is not")]
)
def test_schemas_catch_fields_and_types(template: str, line: str, message: str, tmp_path: Path) -> None:
    """Unknown fields and wrong types, also in the pods of a custom resource."""
    path = tmp_path / "broken.yaml"
    path.write_text(template % line)
    done = _run(deploy_tool("python"), "tools/deploy/validate.py", str(path))
    assert done.returncode == 1
    assert message in done.stderr
    path.write_text(template % "imagePullPolicy: Always")
    assert _run(deploy_tool("python"), "tools/deploy/validate.py", str(path)).returncode == 0


def test_checkov_catches_a_privileged_container(tmp_path: Path) -> None:
    """With the exceptions of our configuration."""
    (tmp_path / "broken.yaml").write_text(BROKEN % "securityContext: {privileged: true}")
    done = _run(deploy_tool("checkov"), "--config-file", "deploy/.checkov.yaml", "--directory", str(tmp_path))
    assert done.returncode == 1
    assert "CKV_K8S_16" in done.stdout


def test_yamllint_catches_a_key_that_stands_twice(tmp_path: Path) -> None:
    """The second one would win in silence."""
    (tmp_path / "broken.yaml").write_text("a: 1\na: 2\n")
    done = _run(deploy_tool("yamllint"), "--strict", "--config-file", ".yamllint", str(tmp_path))
    assert done.returncode == 1
    assert "duplication" in done.stdout
