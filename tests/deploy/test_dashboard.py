"""The dashboard by the rules of Grafana's classic JSON model, and as its script writes it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from typing import Any

import pytest

from tests.deploy.prometheus import DEPLOY, ROOT

PAGE = DEPLOY / "grafana" / "coserve.json"
BOARD: dict[str, Any] = json.loads(PAGE.read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
UNITS = {"short", "s", "bytes", "percentunit", "reqps"}


def test_the_page_is_what_the_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_dashboard", ROOT / "scripts" / "make_dashboard.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert PAGE.read_text(encoding="utf-8") == module.text(), "run scripts/make_dashboard.py"


def test_the_model_has_what_grafana_wants() -> None:
    assert BOARD["uid"] and BOARD["title"] and BOARD["schemaVersion"] >= 36
    assert set(BOARD) >= {"tags", "time", "refresh", "timezone", "templating", "annotations", "panels"}
    assert "id" not in BOARD and "__inputs" not in BOARD  # it can be provisioned as it is
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids) and all(isinstance(i, int) for i in ids)
    titles = [panel["title"] for panel in BOARD["panels"]]
    assert all(titles) and len(PANELS) > 40


def test_panels_lie_in_the_grid_and_not_over_one_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] >= 0 and grid["w"] > 0 and grid["h"] > 0 and grid["x"] + grid["w"] <= 24
        for x in range(grid["x"], grid["x"] + grid["w"]):
            for y in range(grid["y"], grid["y"] + grid["h"]):
                assert (x, y) not in taken, (panel["title"], taken.get((x, y)))
                taken[x, y] = panel["title"]
    rows = {y for _, y in taken}
    assert rows == set(range(max(rows) + 1))  # and leave no empty line


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['id']}-{panel['title']}")
def test_a_panel(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("timeseries", "stat")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS and panel["fieldConfig"]["overrides"] == []
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    references = [target["refId"] for target in panel["targets"]]
    assert references and len(set(references)) == len(references)
    known = {variable["name"] for variable in BOARD["templating"]["list"]} | {"__rate_interval"}
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"] and target["legendFormat"]
        assert set(re.findall(r"\$(\w+)", target["expr"])) <= known
        assert "$instance" in target["expr"], "a panel that doesn't follow the choice of servers"
        by = re.search(r"by \(([\w,]*)\)", target["expr"])
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert by is None or label in by[1].split(","), (label, target["expr"])
