"""What lies in deploy/ names metrics, flags and files that exist, and is what its schema wants."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml

from deploy.dockerfile import ROOT, read_stages
from vllm_calidrop.metrics import METRICS
from vllm_calidrop.settings.server import ServerSettings

DEPLOY = ROOT / "deploy"
KUBERNETES = "1.34"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/calidrop.json").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
# What Prometheus itself adds to every series, and the series it makes of every target.
TARGET_LABELS = {"job", "instance"}


def exposed_by_vllm() -> dict[str, set[str]]:
    """vLLM's own sample names and their labels, as its installed source declares them."""
    spec = find_spec("vllm.v1.metrics")
    assert spec is not None and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "loggers.py").read_text()
    samples: dict[str, set[str]] = {}
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        kind = re.fullmatch(r"_(counter|gauge|histogram)_cls", getattr(call.func, "attr", ""))
        name = next((keyword.value for keyword in call.keywords if keyword.arg == "name"), None)
        if kind and isinstance(name, ast.Constant):
            endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[kind[1]]
            labels = {"model_name", "engine"} | ({"le"} if kind[1] == "histogram" else set())
            samples |= {name.value + ending: labels for ending in endings}
    return samples


def known_samples() -> dict[str, set[str]]:
    ours = {
        sample: set(metric.labels) | ({"le"} if metric.kind == "histogram" else set())
        for metric in METRICS
        for sample in metric.exposed
    }
    return exposed_by_vllm() | ours | {"up": set()}


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Every PromQL expression in deploy/, Grafana's variables put in."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in alert_rules()}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "5m")
            found[f"panel {panel['title']} {target['refId']}"] = re.sub(r'"\$\w+"', '".*"', expression)
    adapter = yaml.safe_load((DEPLOY / "kubernetes/prometheus-adapter.yaml").read_text())
    for rule in adapter["rules"]["custom"]:
        found[f"adapter {rule['name']['as']}"] = rule["seriesQuery"].replace('namespace!="", pod!=""', "")
    return found


def selectors(node: Any) -> Iterator[Any]:
    """The vector selectors of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "vs"):
        child = getattr(node, name, None)
        if child is not None:
            yield from selectors(child)
    for child in getattr(node, "args", None) or ():
        yield from selectors(child)


def grouped_by(expression: str) -> set[str]:
    lists = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression)
    return {label.strip() for group in lists for label in group.split(",") if label.strip()}


@pytest.mark.parametrize("where", expressions())
def test_every_metric_and_label_exists(where: str) -> None:
    expression, known = expressions()[where], known_samples()
    found = list(selectors(promql_parser.parse(expression)))
    assert {selector.name for selector in found} == set(re.findall(r"\b(?:calidrop|vllm):\w+|\bup\b", expression))
    labels = set(TARGET_LABELS)
    for selector in found:
        assert selector.name in known, f"{where}: no metric {selector.name}"
        used = {matcher.name for matcher in selector.matchers.matchers}
        assert used <= known[selector.name] | TARGET_LABELS, f"{where}: {selector.name} has no label {used}"
        labels |= known[selector.name]
    assert grouped_by(expression) <= labels, where


def test_a_metric_that_is_not_there_is_found() -> None:
    (selector,) = selectors(promql_parser.parse("sum by (layer) (rate(calidrop:recomputation_total[5m])) > 1"))
    assert selector.name not in known_samples()
    assert {"vllm:num_requests_waiting", "vllm:num_preemptions_total"} <= exposed_by_vllm().keys()


def test_the_dashboard_shows_every_metric() -> None:
    shown = " ".join(expressions().values())
    missing = [metric.family for metric in METRICS if not any(sample in shown for sample in metric.exposed)]
    assert missing == []
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "model", "instance", "engine"}
    for name in ("model", "instance", "engine"):
        metric = re.fullmatch(r"label_values\((\S+), \w+\)", variables[name]["definition"])
        assert metric and metric[1] in known_samples()
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_every_alert_says_what_and_for_whom() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 6
    guide = (ROOT / "docs/operations.md").read_text()
    tested = yaml.safe_load((DEPLOY / "prometheus/alerts.test.yml").read_text())["tests"]
    for rule in rules:
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["alert"] in guide, f"docs/operations.md does not say what to do about {rule['alert']}"
        assert any(rule["alert"] == check["alertname"] for test in tested for check in test["alert_rule_test"])


def test_compose_mounts_what_exists_and_waits_long_enough_to_stop() -> None:
    server = COMPOSE["services"]["server"]
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    stages = read_stages()
    assert server["build"]["target"] in stages and (DEPLOY / server["build"]["context"]).resolve() == ROOT
    on_gpu = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]["server"]
    assert on_gpu["build"]["target"] in stages
    assert int(server["stop_grace_period"].removesuffix("s")) > shutdown_timeout(server["command"])


def shutdown_timeout(arguments: list[str]) -> int:
    (given,) = [argument for argument in arguments if argument.startswith("--shutdown-timeout=")]
    return int(given.partition("=")[2])


def test_prometheus_scrapes_the_composed_server_and_grafana_finds_it() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}] and job["job_name"] == "calidrop"
    assert scraped["rule_files"] == ["alerts.yml"]
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert provisioned["datasources"][0]["url"] == "http://prometheus:9090"
    boards = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/calidrop.yaml").read_text())
    assert any(
        volume.endswith(f":{boards['providers'][0]['options']['path']}:ro")
        for volume in COMPOSE["services"]["grafana"]["volumes"]
    )


# Kubernetes


def manifests() -> dict[str, Any]:
    listed = yaml.safe_load((DEPLOY / "kubernetes/kustomization.yaml").read_text())["resources"]
    return {name: yaml.safe_load((DEPLOY / "kubernetes" / name).read_text()) for name in listed}


@pytest.mark.parametrize("name", manifests())
def test_manifests_are_what_kubernetes_takes(name: str) -> None:
    """By the schemas of that release, unknown fields refused."""
    kubernetes_validate.validate(manifests()[name], KUBERNETES, strict=True)


def test_a_wrong_manifest_is_refused() -> None:
    wrong = manifests()["deployment.yaml"]
    wrong["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_manifests_belong_together() -> None:
    found = manifests()
    pod = found["deployment.yaml"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"].items()
    for selector in (
        found["deployment.yaml"]["spec"]["selector"]["matchLabels"],
        found["service.yaml"]["spec"]["selector"],
        found["pdb.yaml"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert found["service.yaml"]["spec"]["ports"][0]["targetPort"] in ports
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {(probe["path"], probe["port"]) for probe in probes} == {("/health", "http")}
    stage = read_stages()["gpu"]
    assert str(ports["http"]) == stage.last("EXPOSE") == pod["metadata"]["annotations"]["prometheus.io/port"]
    assert str(pod["spec"]["securityContext"]["runAsUser"]) == stage.last("USER")
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"] if len(volume) > 1 and
              "persistentVolumeClaim" in volume]  # fmt: skip
    assert claims == [found["cache.yaml"]["metadata"]["name"]]
    assert stage.last("VOLUME") in {mount["mountPath"] for mount in container["volumeMounts"]}
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    assert grace > shutdown_timeout(container["args"]) + container["lifecycle"]["preStop"]["sleep"]["seconds"]
    scaled = found["hpa.yaml"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == found["deployment.yaml"]["metadata"]["name"]
    adapter = yaml.safe_load((DEPLOY / "kubernetes/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert scaled["metrics"][0]["pods"]["metric"]["name"] in {rule["name"]["as"] for rule in adapter}


# Flags


def engine_fields() -> set[str]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def check_arguments(arguments: list[str]) -> None:
    """vLLM knows every flag, and our own part of --additional-config is taken."""
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument.removeprefix("--").partition("=")
            assert name.replace("-", "_") in engine_fields(), argument
            if name == "additional-config":
                ServerSettings.from_additional_config(json.loads(value))


def test_flags_are_vllms() -> None:
    check_arguments(COMPOSE["services"]["server"]["command"])
    (container,) = manifests()["deployment.yaml"]["spec"]["template"]["spec"]["containers"]
    check_arguments(container["args"])
    for stage in ("cpu", "gpu"):
        words = json.loads(str(read_stages()[stage].last("CMD")))
        check_arguments([word for word in words if word != "--served-model-name"])
    stack = yaml.safe_load((DEPLOY / "production-stack/values.yaml").read_text())["servingEngineSpec"]
    for model in stack["modelSpec"]:
        check_arguments(model["vllmConfig"]["extraArgs"])
    ray = yaml.safe_load((DEPLOY / "ray-serve/serve.yaml").read_text())["applications"][0]
    for model in ray["args"]["llm_configs"]:
        given = model["engine_kwargs"]
        assert given.keys() <= engine_fields() and given["attention_backend"] == "CALIDROP"
        ServerSettings.from_additional_config(given["additional_config"])


def test_operations_explain_every_metric() -> None:
    guide = (ROOT / "docs/operations.md").read_text()
    assert [metric.family for metric in METRICS if f"`{metric.family}" not in guide] == []
