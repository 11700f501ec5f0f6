from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from jobs.gauges import GAUGES
from pipeline.stages import ENCODER_METRICS

MONITORING = Path(__file__).resolve().parents[2] / "infra" / "monitoring"


def dashboard_metrics() -> set[str]:
    """Every metric that a query of the dashboard names, as Prometheus has it."""
    dashboard = json.loads((MONITORING / "tokenreel.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert all(re.search(r"ray_tokenreel_\w+", query) for query in queries)
    return {name for query in queries for name in re.findall(r"ray_tokenreel_\w+", query)}


def exported() -> set[str]:
    """What the code exports, as Prometheus has it: Ray puts `ray_` before a name, and `_total` behind a counter's."""
    counters = {"tokenreel_encoder_frames"}
    names = GAUGES.keys() | ENCODER_METRICS.keys()
    return {f"ray_{name}{'_total' if name in counters else ''}" for name in names}


def test_every_query_of_the_dashboard_names_a_metric_that_the_code_exports() -> None:
    assert dashboard_metrics() <= exported()


def test_the_dashboard_shows_what_an_operator_watches() -> None:
    wanted = "tokens_per_s data_wait_share rejected encoder_busy_share frames_per_s shards_done"
    assert {f"ray_tokenreel_{name}" for name in wanted.split()} <= dashboard_metrics()


def test_the_dashboards_shape() -> None:
    dashboard = json.loads((MONITORING / "tokenreel.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, f"{panel['title']} overlaps another panel"
        taken |= cells
    source = yaml.safe_load((MONITORING / "grafana" / "datasource.yml").read_text())["datasources"][0]
    uids = {panel["datasource"]["uid"] for panel in panels} | {
        t["datasource"]["uid"] for p in panels for t in p["targets"]
    }
    assert uids == {source["uid"]}
