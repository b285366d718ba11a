"""What Kubernetes' schemas don't say about a set of manifests, each rule a function that lists its violations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from tests.support.quantities import parse_quantity

Manifest = dict[str, Any]
Check = Callable[[Sequence[Manifest]], list[str]]

USER_MADE = frozenset({("Secret", "gkd-teacher-token"), ("Secret", "gkd-teacher-tls")})
"""What docs/deploy.md tells the user to make; everything else that is referred to must be in the build."""
CLUSTER_SCOPED = frozenset({"Namespace"})
NAMESPACE = "gkd"

TEACHER = "gkd-teacher"
DEFAULT_DRAIN_S = 30.0
CLOSING_S = 22.0
"""What the service takes, at most, between the end of its drain and its own: to write answers, and for its engine."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?!.*--)(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_TEMPLATES = {
    "Pod": ((),),
    "Deployment": (("spec", "template"),),
    "Job": (("spec", "template"),),
    "RayJob": (
        ("spec", "submitterPodTemplate"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", "*", "template"),
    ),
}
"""Where each kind holds the pods that it makes; `*` stands for every element of a list."""


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod, or a template of pods, within the manifest that makes it."""

    owner: str
    """`Kind/name` of that manifest, and where in it."""
    labels: Mapping[str, str]
    """Its labels."""
    spec: Mapping[str, Any]
    """Its PodSpec."""

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """All containers, init containers first."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> list[Mapping[str, Any]]:
        """What its containers declare."""
        return [port for container in self.containers for port in container.get("ports", [])]

    def has_port(self, port: object) -> bool:
        """Whether a container declares it, by name or by number."""
        return any(port in (one.get("name"), one["containerPort"]) for one in self.ports)


def parse_manifests(text: str) -> list[Manifest]:
    """All objects of a YAML stream."""
    return [one for one in yaml.safe_load_all(text) if one is not None]


def read_tree(folder: Path) -> list[Manifest]:
    """A kustomization's resources as they are written, without any transformation but names of generated ConfigMaps.

    For checks that run also where there is no kustomize; no patch, image, label or component is applied.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": one["name"]}}
        for one in kustomization.get("configMapGenerator", [])
    ]
    for resource in kustomization.get("resources", []):
        path = folder / resource
        found += read_tree(path) if path.is_dir() else parse_manifests(path.read_text())
    return found


def title(manifest: Manifest) -> str:
    """`Kind/name`."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def pods(manifests: Sequence[Manifest]) -> list[Pod]:
    """Every pod that the manifests make."""
    return [
        Pod(
            owner=title(manifest) if manifest["kind"] != "RayJob" else f"{title(manifest)} {'.'.join(where[1:])}",
            labels=found["metadata"].get("labels", {}),
            spec=found["spec"],
        )
        for manifest in manifests
        for where in _TEMPLATES.get(manifest["kind"], ())
        for found in _follow(manifest, where)
    ]


def _follow(node: Any, where: Sequence[str]) -> Iterator[Any]:
    if not where:
        yield node
    elif where[0] == "*":
        for one in node:
            yield from _follow(one, where[1:])
    elif where[0] in node:
        yield from _follow(node[where[0]], where[1:])


def _of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] == kind]


def _selected(manifests: Sequence[Manifest], labels: Mapping[str, str]) -> list[Pod]:
    return [pod for pod in pods(manifests) if labels.items() <= pod.labels.items()]


def _walk(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every node below, with its path."""
    yield where, node
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield from _walk(value, f"{where}.{key}" if where else f"{key}")


def names(manifests: Sequence[Manifest]) -> list[str]:
    """Names are DNS-1123 subdomains, those of containers and volumes labels, those of ports IANA service names."""
    found = [
        f"{title(one)}: {name!r} is no DNS-1123 name"
        for one in manifests
        for name in (one["metadata"]["name"], one["metadata"].get("namespace", NAMESPACE))
        if not _SUBDOMAIN.fullmatch(name)
    ]
    for pod in pods(manifests):
        labels = [one["name"] for one in (*pod.containers, *pod.spec.get("volumes", []))]
        found += [f"{pod.owner}: {name!r} is no DNS-1123 label" for name in labels if not _LABEL.fullmatch(name)]
        ports = [port["name"] for port in pod.ports if "name" in port]
        found += [f"{pod.owner}: {name!r} is no name of a port" for name in ports if not _PORT_NAME.fullmatch(name)]
    return found


def namespaces(manifests: Sequence[Manifest]) -> list[str]:
    """Everything lies in the one namespace, which is part of the build, and nothing stands twice."""
    wrong = [one for one in manifests if one["kind"] not in CLUSTER_SCOPED]
    wrong = [one for one in wrong if one["metadata"].get("namespace") != NAMESPACE]
    found = [f"{title(one)}: its namespace is {one['metadata'].get('namespace')}" for one in wrong]
    if NAMESPACE not in {one["metadata"]["name"] for one in _of_kind(manifests, "Namespace")}:
        found.append(f"the namespace {NAMESPACE} is not in the build")
    titles = [title(one) for one in manifests]
    return found + [f"{one} stands twice" for one in sorted({one for one in titles if titles.count(one) > 1})]


def quantities(manifests: Sequence[Manifest]) -> list[str]:
    """Quantities parse, and no request is above its limit."""
    found = []
    for manifest in manifests:
        for where, node in _walk(manifest):
            name = where.rpartition(".")[2]
            if name in {"sizeLimit", "averageValue"}:
                found += _quantity_problems(f"{title(manifest)} {where}", {"": node})
            elif name in {"requests", "limits"} and isinstance(node, dict):
                found += _quantity_problems(f"{title(manifest)} {where}", node)
            elif name == "resources" and isinstance(node, dict):
                found += _over_limit(f"{title(manifest)} {where}", node)
    return found


def _quantity_problems(where: str, values: Mapping[str, object]) -> list[str]:
    return [
        f"{where}{'.' * bool(name)}{name}: {value!r} is no quantity"
        for name, value in values.items()
        if _number(value) is None
    ]


def _over_limit(where: str, node: Mapping[str, Mapping[str, object]]) -> list[str]:
    limits = {name: _number(value) for name, value in node.get("limits", {}).items()}
    requests = {name: _number(value) for name, value in node.get("requests", {}).items()}
    return [
        f"{where}: the request of {name} is above its limit"
        for name, number in requests.items()
        if number is not None and (limit := limits.get(name)) is not None and number > limit
    ]


def _number(value: object) -> Decimal | None:
    try:
        return parse_quantity(value)
    except ValueError:
        return None


def selectors(manifests: Sequence[Manifest]) -> list[str]:
    """Deployments select their own pods, Services some pod, and both a label rather than everything."""
    found = []
    for one in _of_kind(manifests, "Deployment"):
        labels = one["spec"]["selector"].get("matchLabels", {})
        own = one["spec"]["template"]["metadata"].get("labels", {})
        if not labels or not labels.items() <= own.items():
            found.append(f"{title(one)}: its selector {labels} does not match its pods' labels {own}")
    for one in _of_kind(manifests, "Service"):
        labels = one["spec"].get("selector", {})
        if not labels or not _selected(manifests, labels):
            found.append(f"{title(one)}: its selector {labels} matches no pod")
    return found


def service_ports(manifests: Sequence[Manifest]) -> list[str]:
    """Each target port of a Service is one of each pod behind it."""
    return [
        f"{title(one)}: {pod.owner} has no port {target}"
        for one in _of_kind(manifests, "Service")
        for port in one["spec"]["ports"]
        for target in [port.get("targetPort", port["port"])]
        for pod in _selected(manifests, one["spec"].get("selector", {}))
        if not pod.has_port(target)
    ]


def probe_ports(manifests: Sequence[Manifest]) -> list[str]:
    """Probes and hooks ask ports that the pod has."""
    return [
        f"{pod.owner}: {where} asks port {node['port']}, which {container['name']} does not have"
        for pod in pods(manifests)
        for container in pod.containers
        for where, node in _walk(container)
        if where.rpartition(".")[2] in {"grpc", "httpGet", "tcpSocket"} and isinstance(node, dict)
        if not pod.has_port(node["port"])
    ]


def grace_periods(manifests: Sequence[Manifest]) -> list[str]:
    """A teacher has time for its preStop hook, its drain and its end before it is killed."""
    found = []
    for pod in pods(manifests):
        for container in pod.spec["containers"]:
            if _image_name(container["image"]) != TEACHER or "command" in container:
                continue
            variables = {one["name"]: one.get("value") for one in container.get("env", [])}
            drain_s = float(variables.get("TEACHER_DRAIN_TIMEOUT_S") or DEFAULT_DRAIN_S)
            pre_stop_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            needed_s, given_s = pre_stop_s + drain_s + CLOSING_S, pod.spec.get("terminationGracePeriodSeconds", 30)
            if not pre_stop_s:
                found.append(f"{pod.owner}: no preStop sleep keeps the replica up while its name is forgotten")
            if given_s < needed_s:
                found.append(f"{pod.owner}: it has {given_s} s to end and may need {needed_s:g} s")
    return found


def references(manifests: Sequence[Manifest]) -> list[str]:
    """Whatever a pod refers to is in the build, or known to be made by the user; mounts have a volume."""
    there = {(one["kind"], one["metadata"]["name"]) for one in manifests} | USER_MADE
    return [
        f"{pod.owner}: {kind} {name} is not there"
        for pod in pods(manifests)
        for kind, name in _referred(pod)
        if (kind, name) not in there
    ] + [
        f"{pod.owner}: {container['name']} mounts {mount['name']}, which is no volume"
        for pod in pods(manifests)
        for container in pod.containers
        for mount in container.get("volumeMounts", [])
        if mount["name"] not in {volume["name"] for volume in pod.spec.get("volumes", [])}
    ]


def _referred(pod: Pod) -> Iterator[tuple[str, str]]:
    if "serviceAccountName" in pod.spec:
        yield "ServiceAccount", pod.spec["serviceAccountName"]
    keys = {"configMap": ("ConfigMap", "name"), "secret": ("Secret", "secretName")}
    keys |= {"persistentVolumeClaim": ("PersistentVolumeClaim", "claimName")}
    for volume in pod.spec.get("volumes", []):
        yield from ((kind, volume[key][name]) for key, (kind, name) in keys.items() if key in volume)
    keys = {"configMapRef": ("ConfigMap", "name"), "secretRef": ("Secret", "name")}
    keys |= {"configMapKeyRef": ("ConfigMap", "name"), "secretKeyRef": ("Secret", "name")}
    for _, node in _walk(pod.containers):
        if isinstance(node, dict):
            yield from ((kind, node[key][name]) for key, (kind, name) in keys.items() if key in node)


def targets(manifests: Sequence[Manifest]) -> list[str]:
    """Disruption budgets cover some pod; autoscalers scale something, the number of which nobody else sets."""
    found = [
        f"{title(one)}: it covers no pod"
        for one in _of_kind(manifests, "PodDisruptionBudget")
        if not _selected(manifests, one["spec"]["selector"]["matchLabels"])
    ]
    for one in _of_kind(manifests, "HorizontalPodAutoscaler"):
        target = "{kind}/{name}".format(**one["spec"]["scaleTargetRef"])
        scaled = [other for other in manifests if title(other) == target]
        if not scaled:
            found.append(f"{title(one)}: there is no {target}")
        found += [
            f"{title(other)}: it sets replicas, as {title(one)} does" for other in scaled if "replicas" in other["spec"]
        ]
    return found


def network_policies(manifests: Sequence[Manifest]) -> list[str]:
    """All pods are denied what no policy allows; policies and their peers select pods; named ports are theirs."""
    policies = _of_kind(manifests, "NetworkPolicy")
    found = []
    if not any(_denies_all(one["spec"]) for one in policies):
        found.append("no policy denies by default")
    for one in policies:
        selected = _selected(manifests, one["spec"]["podSelector"].get("matchLabels", {}))
        if not selected:
            found.append(f"{title(one)}: it covers no pod")
        for direction, key in (("ingress", "from"), ("egress", "to")):
            for rule in one["spec"].get(direction) or []:
                peers = rule.get(key) or []
                if not peers:
                    found.append(f"{title(one)}: a rule for {direction} names no peer, and so allows all")
                local = [peer["podSelector"]["matchLabels"] for peer in peers if peer.keys() == {"podSelector"}]
                found += [
                    f"{title(one)}: its peer {labels} is no pod" for labels in local if not _selected(manifests, labels)
                ]
                ends = (
                    selected if direction == "ingress" else [pod for one in local for pod in _selected(manifests, one)]
                )
                found += [f"{title(one)}: {problem}" for problem in _missing_ports(rule, ends)]
    return found


def _denies_all(spec: Mapping[str, Any]) -> bool:
    both = set(spec["policyTypes"]) == {"Ingress", "Egress"}
    return both and not (spec["podSelector"] or spec.get("ingress") or spec.get("egress"))


def _missing_ports(rule: Mapping[str, Any], ends: Sequence[Pod]) -> list[str]:
    named = [port["port"] for port in rule.get("ports", []) if isinstance(port["port"], str)]
    return [f"{pod.owner} has no port {port}" for port in named for pod in ends if not pod.has_port(port)]


def security(manifests: Sequence[Manifest]) -> list[str]:
    """Pods keep to the restricted standard, and beyond it: no token, no writable root, no variables of Services."""
    found = [
        f"{title(one)}: it does not enforce the restricted standard"
        for one in _of_kind(manifests, "Namespace")
        if one["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted"
    ]
    found += [
        f"{title(one)}: its token is mounted"
        for one in _of_kind(manifests, "ServiceAccount")
        if one.get("automountServiceAccountToken") is not False
    ]
    for pod in pods(manifests):
        found += [f"{pod.owner}: {problem}" for problem in (*_pod_security(pod.spec), *_container_security(pod))]
    return found


def _pod_security(spec: Mapping[str, Any]) -> Iterator[str]:
    context = spec.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "it may run as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "its system calls are not filtered"
    if spec.get("automountServiceAccountToken") is not False:
        yield "a token is mounted"
    if spec.get("enableServiceLinks") is not False:
        yield "Services add variables to its environment"
    yield from (f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    yield from (f"volume {one['name']} is the host's" for one in spec.get("volumes", []) if "hostPath" in one)


def _container_security(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        context = container.get("securityContext", {})
        wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
        wrong = [key for key, value in wanted.items() if context.get(key) is not value]
        wrong += [key for key in ("privileged", "procMount", "runAsUser", "seccompProfile") if key in context]
        if context.get("capabilities") != {"drop": ["ALL"]}:
            wrong.append("capabilities")
        yield from (f"{container['name']}: {key}" for key in wrong)
        writable = [one["mountPath"] for one in container.get("volumeMounts", []) if not one.get("readOnly")]
        home = {one["name"]: one.get("value", "") for one in container.get("env", [])}.get("HOME", "/tmp")  # noqa: S108
        missing = [path for path in ("/tmp", home) if path not in writable]  # noqa: S108 - the container's own
        yield from (f"{container['name']}: {path} is not writable" for path in dict.fromkeys(missing))


def _image_name(image: str) -> str:
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0]


def images(manifests: Sequence[Manifest]) -> list[str]:
    """Images have a digest or a tag, and not the tag that moves."""
    return [
        f"{pod.owner}: image {container['image']} is not pinned"
        for pod in pods(manifests)
        for container in pod.containers
        if "@sha256:" not in container["image"]
        and container["image"].rpartition("/")[2].partition(":")[2] in {"", "latest"}
    ]


CHECKS: tuple[Check, ...] = (
    names,
    namespaces,
    quantities,
    selectors,
    service_ports,
    probe_ports,
    grace_periods,
    references,
    targets,
    network_policies,
    security,
    images,
)
