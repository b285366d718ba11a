"""Dashboard and alerts ask for what the teacher really offers: a misspelled metric is an empty panel, or no alarm."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from teacher_service.config import ServiceSettings
from teacher_service.engine.fake import FakeEngine
from teacher_service.errors import all_error_classes
from teacher_service.server import TeacherServer
from teacher_service.telemetry import AnswerSource, Telemetry, build_logger
from trainer import metrics
from trainer.verl_adapter.metrics_port import METRIC, MetricsPort

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "gkd.json").read_text())
RULES = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())["groups"]
OPERATIONS = (DOCKER.parent / "docs" / "operations.md").read_text()
FROM_PROMETHEUS = {"up": {"instance", "job"}}
"""What Prometheus itself knows of every target."""
ADDED_LABELS = {"instance", "job"}
"""Those that Prometheus adds to every sample."""


def panels() -> Iterator[dict[str, Any]]:
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def queries() -> list[tuple[str, str]]:
    """Name and expression of everything that asks Prometheus."""
    shown = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    chosen = [(one["name"], one["query"]["query"]) for one in DASHBOARD["templating"]["list"]]
    alarms = [(rule["alert"], rule["expr"]) for group in RULES for rule in group["rules"]]
    return shown + chosen + alarms


@cache
def offered() -> dict[str, set[str]]:
    """Labels by name of every sample of a teacher that has answered each kind of request, and of a trainer's step."""
    telemetry = Telemetry(build_logger(level="error", log_format="json"))

    async def serve_nothing() -> None:  # gRPC wants an event loop already when it is built
        TeacherServer(ServiceSettings(engine="fake"), FakeEngine(), telemetry)

    asyncio.run(serve_nothing())
    telemetry.engine_loaded("fake", "fast", reason=None, load_s=1.0)
    for source in AnswerSource:
        with telemetry.request("Score") as record:
            record.source, record.num_scored = source, 1
    trainer = MetricsPort("127.0.0.1:0")
    trainer.update({metrics.TEACHER_KNOWLEDGE: 1.0})
    families: list[Metric] = [*telemetry.registry.collect(), *trainer.registry.collect()]
    samples = [sample for family in families for sample in family.samples]
    labels: dict[str, set[str]] = {}
    for sample in samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    return {name: found | ADDED_LABELS for name, found in labels.items()} | FROM_PROMETHEUS


def asked_metrics(expression: str) -> set[str]:
    """The metrics in an expression: words that are no function, no label, no keyword and no text."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    if bare.startswith("label_values("):
        bare = bare.split("(")[1].split(",")[0]
    words = re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)
    return set(words) - {"and", "or", "unless", "bool", "offset"}


def asked_labels(expression: str) -> set[str]:
    """Those that an expression selects or groups by."""
    grouped = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression)
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    return {name.strip() for names in grouped for name in names.split(",")} | set(selected)


@pytest.mark.parametrize(("name", "expression"), queries(), ids=[name for name, _ in queries()])
def test_a_query_names_what_exists(name: str, expression: str) -> None:
    """Its metrics are registered, and have the labels that it uses."""
    metrics = asked_metrics(expression)
    assert metrics, name
    assert metrics <= offered().keys()
    assert asked_labels(expression) <= set.union(*(offered()[metric] for metric in metrics))


def test_the_trainers_metrics_are_called_as_the_trainer_calls_them() -> None:
    """They are one metric's label, which nothing registers."""
    ours = {value for name, value in vars(metrics).items() if name.isupper() and isinstance(value, str)}
    asked = {name for _, expression in queries() for name in re.findall(METRIC + r'\{name="([^"]+)"', expression)}
    assert metrics.TEACHER_KNOWLEDGE in asked
    # tests/e2e look at verl's
    assert asked - ours <= {"timing_s/step", "actor/pg_loss", "actor/grad_norm", "critic/score/mean"}


def test_the_check_notices_a_wrong_name() -> None:
    """Metric and label alike: the tests above would pass on anything otherwise."""
    assert asked_metrics("sum by (le) (rate(teacher_tokens_totl[5m])) / 2") == {"teacher_tokens_totl"}
    assert not asked_metrics("teacher_tokens_totl") <= offered().keys()
    assert asked_labels('sum by (reson) (x{methd="a"})') == {"reson", "methd"}


def test_every_metric_is_on_the_dashboard() -> None:
    """A new one gets a panel, or somebody looks for it in vain."""
    shown = set.union(*(asked_metrics(target["expr"]) for panel in panels() for target in panel["targets"]))
    base = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in offered()}
    wanted = {re.sub(r"_created$", "", name) for name in base if f"{name}_total" not in base}
    assert wanted == {name.removesuffix("_bucket") for name in shown}


def test_every_metric_is_in_the_docs() -> None:
    """Under the name that Prometheus has it; and what the docs name exists."""
    text = OPERATIONS.partition("## Traces")[0]
    told = set(re.findall(r"(?<![./\w])(?:teacher|trainer)_\w+\b", text)) - {"teacher_service"}
    assert told == {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in offered() if name != "up"} - {
        re.sub(r"_total$", "", name) for name in offered() if name.endswith("_total")
    }


def test_a_rate_is_taken_of_what_only_grows() -> None:
    """The rate of a gauge is a number without meaning."""
    for name, expression in queries():
        for metric in re.findall(r"rate\((\w+)", expression):
            assert metric.endswith(("_total", "_bucket")), name


def test_alerts_name_reasons_that_exist() -> None:
    """A reason is a word of the table of errors; a label's value is checked by nobody else."""
    known = {one.reason for one in all_error_classes()}
    asked = [re.findall(r'reason=~?"([^"]*)"', rule["expr"]) for group in RULES for rule in group["rules"]]
    reasons = {reason for found in asked for values in found for reason in values.split("|")}
    assert reasons
    assert reasons <= known


def test_alerts_say_what_to_do() -> None:
    """Each has a severity, a time that it must hold, a summary, a remedy, and a section of its own in the runbook."""
    sections = re.findall(r"^### (\w+)$", OPERATIONS.partition("## Alerts")[2], re.MULTILINE)
    assert sections == [rule["alert"] for group in RULES for rule in group["rules"]]
    for rule in (rule for group in RULES for rule in group["rules"]):
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["for"]
        assert {"summary", "description"} <= rule["annotations"].keys()
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_panels_have_room_of_their_own() -> None:
    """No two of them overlap, and ids are unique: Grafana would move or drop one."""
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_grafana_finds_its_data_and_its_dashboard() -> None:
    """The provisioned source has the id that panels name, and compose mounts the folder that is provisioned."""
    provisioning = DOCKER / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels()} == {source["uid"]}
    [provider] = yaml.safe_load((provisioning / "dashboards" / "gkd.yml").read_text())["providers"]
    compose = yaml.safe_load((DOCKER.parent / "compose.yaml").read_text())
    assert f"./docker/grafana/dashboards:{provider['options']['path']}:ro" in compose["services"]["grafana"]["volumes"]


def test_prometheus_looks_where_teachers_are() -> None:
    """The name that compose gives all teachers, on the port of HTTP, and the rules that lie beside."""
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    scrape, of_trainer = config["scrape_configs"]
    [lookup] = scrape["dns_sd_configs"]
    assert (scrape["job_name"], lookup["port"]) == ("teacher", ServiceSettings(engine="fake").http_port)
    compose = yaml.safe_load((DOCKER.parent / "compose.yaml").read_text())
    for name in ("teacher", "teacher-replica"):
        assert compose["services"][name]["networks"]["private"]["aliases"] == lookup["names"]
    [lookup] = of_trainer["dns_sd_configs"]
    command = compose["services"]["trainer"]["command"]
    assert f"0.0.0.0:{lookup['port']}" == command[command.index("--metrics-address") + 1]
    assert lookup["names"] == ["trainer"]
    assert [(DOCKER / "prometheus" / file).is_file() for file in config["rule_files"]] == [True]
