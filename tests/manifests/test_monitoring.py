"""The PodMonitor and the dashboard: they ask for metrics that are exported, from pods that are there."""

import json
import re

import pytest

from tests.manifests.conftest import ROOT
from tests.manifests.rules import METRICS, pods

EXPORTED = {
    "embedshard_samples_per_second",
    "embedshard_loss",
    "embedshard_step_seconds",
    "embedshard_bytes_read_total",
    "embedshard_checkpoint_seconds",
    "embedshard_restarts_total",
    "embedshard_bad_rows_total",
}
"""What training exports; Ray puts `ray_` before it, and `_total` after a counter that lacks it."""


def dashboard():
    return json.loads((ROOT / "k8s" / "monitoring" / "grafana-dashboard.json").read_text())


def expressions():
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]


def asked():
    """The names of metrics in the dashboard's queries: whatever stands before a selector in braces."""
    return {name for expression in expressions() for name in re.findall(r"([a-z_]+)\{", expression)}


def test_every_metric_of_training_is_shown():
    assert {name for name in asked() if "embedshard" in name} == {f"ray_{name}" for name in EXPORTED}


def test_rays_metrics_are_ones_that_ray_exports():
    pytest.importorskip("ray", reason="ray is not installed: pip install -r requirements/ray.txt")
    from ray.dashboard.modules.metrics.dashboards import default_dashboard_panels, train_dashboard_panels

    known = set()
    for module in (default_dashboard_panels, train_dashboard_panels):
        with open(module.__file__) as file:
            known |= set(re.findall(r"(ray_[a-z_]+)\{", file.read()))
    assert len(known) > 30
    assert {name for name in asked() if "embedshard" not in name} - known == set()


def test_the_dashboard_is_whole():
    """Unique panels that do not overlap, one data source, a query each, counters as rates or sums."""
    board = dashboard()
    assert board["uid"] == "embedshard"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)
    variables = {variable["name"] for variable in board["templating"]["list"]}
    for panel in panels:
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"
    for expression in expressions():
        assert set(re.findall(r"\$(\w+)", expression)) <= variables | {"__rate_interval"}
        assert expression.count("(") == expression.count(")")
        assert 'ray_cluster=~"$cluster"' in expression


def test_the_monitor_finds_the_pods(render):
    """Its selector fits the labels of every Ray pod, its ports are named by their containers and open to Prometheus."""
    [monitor] = [document for document in render("monitoring") if document["kind"] == "PodMonitor"]
    selector = monitor["spec"]["selector"]["matchLabels"]
    for folder in ("base", "interactive", "overlays/spot"):
        named = {}
        for pod in pods(render(folder)):
            if pod.role in ("head", "worker"):
                labels = pod.labels | {"ray.io/is-ray-node": "yes"}  # which KubeRay adds
                assert selector.items() <= labels.items()
                ports = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
                assert "metrics" in ports
                named |= ports
        endpoints = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert {named[name] for name in endpoints} == METRICS


def test_grafana_is_given_the_dashboard(render):
    [config_map] = [document for document in render("monitoring") if document["kind"] == "ConfigMap"]
    assert config_map["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(config_map["data"]["embedshard.json"]) == dashboard()
