"""Write deploy/grafana/coserve.json, the dashboard for whoever watches a server, from the table below."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "coserve.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SELECT = 'job="$job",instance=~"$instance"'
TIERS = f'{SELECT},latency_class=~"$latency_class"'
CLASSES = "coserve_class_requests_total"

Line = tuple[str, str]  # an expression and its legend


@dataclass(frozen=True)
class Panel:
    """One graph ("lines" or "stack"), or one figure ("stat")."""

    kind: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    text: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in the grid of 24 columns."""
        return (3, 4) if self.kind == "stat" else (8, 8)


def figure(title: str, expression: str, unit: str = "short", text: str = "") -> Panel:
    """The newest value of one expression."""
    return Panel("stat", title, unit, ((expression, ""),), text)


def graph(title: str, unit: str, *lines: Line, text: str = "") -> Panel:
    """Lines over time."""
    return Panel("lines", title, unit, lines, text)


def stack(title: str, unit: str, *lines: Line, text: str = "") -> Panel:
    """Areas that add up."""
    return Panel("stack", title, unit, lines, text)


# ------------------------------------------------------------------ expressions


def quantile(q: float, metric: str, by: str = "") -> str:
    """A quantile of a histogram over the interval that the graph has a point for."""
    labels = f"le,{by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{SELECT}}}[$__rate_interval])))"


def rate(metric: str, by: str = "", select: str = SELECT) -> str:
    """Events a second."""
    return f"sum by ({by}) (rate({metric}{{{select}}}[$__rate_interval]))"


def total(metric: str, by: str = "", select: str = SELECT) -> str:
    """A gauge over all servers."""
    return f"sum by ({by}) ({metric}{{{select}}})"


def each(metric: str) -> Line:
    """A gauge by server."""
    return f"{metric}{{{SELECT}}}", "{{instance}}"


def times(metric: str, target: str = "") -> tuple[Line, ...]:
    """Median and tail, and the target beside them where there is one."""
    lines = tuple((quantile(q, metric), f"p{round(100 * q)}") for q in (0.5, 0.9, 0.99))
    wanted = f'max by (latency_class) (coserve_class_target_seconds{{{TIERS},kind="{target}"}} > 0)'
    return (*lines, (wanted, "target {{latency_class}}")) if target else lines


def part(of: str, whole: str) -> str:
    """A share; nothing is drawn where there is nothing to share."""
    return f"{of} / ({whole} > 0)"


# ------------------------------------------------------------------ what is shown

OUTCOME = f'{TIERS},outcome="good"', f'{TIERS},outcome!="aborted"'
GOODPUT = part(*(rate(CLASSES, "latency_class", select) for select in OUTCOME))
CACHE_HITS = part(rate("vllm:prefix_cache_hits_total"), rate("vllm:prefix_cache_queries_total"))
OPEN_JOBS = f'{SELECT},status=~"queued|running|paused|validating_files"'
PHASES = ((quantile(0.9, f"vllm:request_{p}_time_seconds"), p) for p in ("queue", "prefill", "decode"))

ROWS: dict[str, tuple[Panel, ...]] = {
    "At a glance": (
        figure("Servers up", 'sum(up{job="$job",instance=~"$instance"})'),
        figure("Engines up", total("coserve_engine_up")),
        figure("Running", total("vllm:num_requests_running"), text="Requests in steps."),
        figure("Waiting", total("vllm:num_requests_waiting"), text="Requests without a place."),
        figure("Tokens/s to readers", rate("vllm:generation_tokens_total")),
        figure(
            "Trained tokens/s",
            rate("coserve_finetune_tokens_total", select=f'{SELECT},kind="trained"'),
            text="Tokens that carried loss.",
        ),
        figure("Training's share", f"avg(coserve_finetune_share{{{SELECT}}})", "percentunit"),
        figure("Failed jobs", total("coserve_finetune_jobs", select=f'{SELECT},status="failed"')),
    ),
    "Latency against targets": (
        graph("Time to first token", "s", *times("vllm:time_to_first_token_seconds", "ttft")),
        graph(
            "Time per token of a request",
            "s",
            *times("vllm:request_time_per_output_token_seconds", "tpot"),
            text="A request's mean after its first token: what the target is held against.",
        ),
        graph("Time between tokens", "s", *times("vllm:inter_token_latency_seconds")),
        graph(
            "Goodput by class",
            "percentunit",
            (GOODPUT, "{{latency_class}}"),
            text="What came and was served within both targets.",
        ),
        graph(
            "Targets missed",
            "reqps",
            (rate("coserve_class_missed_total", "latency_class,kind", TIERS), "{{latency_class}} {{kind}}"),
        ),
        graph("Arrival to last token", "s", *times("vllm:e2e_request_latency_seconds")),
        graph("Queue, prompt, decode (p90)", "s", *PHASES),
        graph(
            "Arrival until the engine takes it in (p99)",
            "s",
            (quantile(0.99, "coserve_arrival_wait_seconds", "step"), "behind {{step}}"),
            text="By the kind of step that a request waited for.",
        ),
    ),
    "Requests": (
        stack(
            "Requests in hand",
            "short",
            (total("vllm:num_requests_running"), "running"),
            (total("vllm:num_requests_waiting_by_reason", "reason"), "waiting: {{reason}}"),
            text="Deferred ones wait for an adapter's weights.",
        ),
        graph(
            "Tokens a second",
            "short",
            (rate("vllm:prompt_tokens_by_source_total", "source"), "prompt: {{source}}"),
            (rate("vllm:generation_tokens_total"), "generated"),
        ),
        stack(
            "Ended by",
            "reqps",
            (rate("vllm:request_success_total", "finished_reason"), "{{finished_reason}}"),
        ),
        stack(
            "By class and outcome",
            "reqps",
            (rate(CLASSES, "latency_class,outcome", TIERS), "{{latency_class}} {{outcome}}"),
        ),
        graph(
            "Prefix cache",
            "percentunit",
            (CACHE_HITS, "hits"),
            text="Part of the prompts' tokens that wasn't computed.",
        ),
        stack("HTTP by status", "reqps", (rate("http_requests_total", "status"), "{{status}}")),
        graph(
            "HTTP by route (p99)",
            "s",
            (quantile(0.99, "http_request_duration_seconds", "handler"), "{{handler}}"),
            text="To the end of the answer, streams included.",
        ),
        stack(
            "gRPC by code",
            "reqps",
            (rate("grpc_server_handled_total", "grpc_method,grpc_code"), "{{grpc_method}} {{grpc_code}}"),
        ),
        graph(
            "gRPC by method (p99)",
            "s",
            (quantile(0.99, "grpc_server_handling_seconds", "grpc_method"), "{{grpc_method}}"),
            text="To the end of the answer, streams included.",
        ),
        stack("Refused", "reqps", (rate("coserve_requests_rejected_total", "reason"), "{{reason}}")),
    ),
    "Fine-tuning": (
        graph("Tokens a second", "short", (rate("coserve_finetune_tokens_total", "kind"), "{{kind}}")),
        graph("Share of the time", "percentunit", each("coserve_finetune_share")),
        graph("Time a step gives to training", "s", each("coserve_step_budget_seconds")),
        stack("Jobs", "short", (total("coserve_finetune_jobs", "status", OPEN_JOBS), "{{status}}")),
        graph("Optimizer steps", "short", (rate("coserve_finetune_steps_total"), "steps/s")),
        stack(
            "What microbatches keep",
            "short",
            (total("coserve_finetune_layers", "policy"), "layers under policy {{policy}}"),
            (rate("coserve_finetune_reclaims_total", "kind"), "{{kind}}s a second"),
            text="A keeps most, C least; requests take memory from microbatches when they need it.",
        ),
    ),
    "Memory": (
        stack("By owner", "bytes", (total("coserve_memory_bytes", "owner"), "{{owner}}")),
        graph(
            "Of the engine, and the limit",
            "bytes",
            (total("coserve_engine_memory_bytes", "kind"), "{{kind}}"),
            (total("coserve_memory_limit_bytes"), "limit"),
            text="Untouched: of the pool, may still come.",
        ),
        graph("KV cache in use", "percentunit", each("vllm:kv_cache_usage_perc")),
        graph("Preemptions", "short", (rate("vllm:num_preemptions_total"), "a second")),
        graph(
            "Memory of the processes",
            "bytes",
            (total("process_resident_memory_bytes"), "server"),
            (total("coserve_engine_process_resident_memory_bytes"), "engine"),
        ),
        graph(
            "Disk under the state directory",
            "bytes",
            (total("coserve_disk_free_bytes"), "free"),
            (total("coserve_disk_size_bytes"), "size"),
        ),
        graph(
            "Cores in use",
            "short",
            (rate("process_cpu_seconds_total"), "server"),
            (rate("coserve_engine_process_cpu_seconds_total"), "engine"),
        ),
    ),
    "Adapters": (
        stack("By tier", "short", (total("coserve_adapters", "tier"), "{{tier}}")),
        graph("Swaps a second", "short", (rate("coserve_adapter_swaps_total", "kind"), "{{kind}}")),
        stack(
            "Requests by adapter",
            "short",
            (total("coserve_adapter_requests", "adapter,state"), "{{adapter}} {{state}}"),
        ),
        stack(
            "Loaded versions",
            "short",
            (total("coserve_adapter_residency", "adapter,tier"), "{{adapter}} ({{tier}})"),
        ),
        graph("Time to publish", "s", *times("coserve_adapter_publish_seconds")),
        stack(
            "Where requests found their adapter",
            "reqps",
            (rate("coserve_adapter_found_total", "tier"), "{{tier}}"),
        ),
        graph(
            "The engine's time with adapters",
            "percentunit",
            (rate("coserve_adapter_engine_seconds_total"), "of a second"),
            text="Spent in steps on moving them.",
        ),
    ),
    "The engine": (
        graph(
            "Time of a step",
            "s",
            (quantile(0.5, "coserve_step_seconds", "kind"), "p50 {{kind}}"),
            (quantile(0.99, "coserve_step_seconds", "kind"), "p99 {{kind}}"),
        ),
        graph("Error of the prediction", "percentunit", *times("coserve_step_prediction_error_ratio")),
        graph("Tokens of a step", "short", *times("vllm:iteration_tokens_total")),
        graph(
            "Restarts in an hour",
            "short",
            (f"increase(coserve_engine_restarts_total{{{SELECT}}}[1h])", "{{instance}}"),
        ),
    ),
}


# ------------------------------------------------------------------ Grafana's model of it


def target(place: int, line: Line) -> dict[str, Any]:
    """One query."""
    expression, legend = line
    return {
        "refId": chr(ord("A") + place),
        "datasource": SOURCE,
        "expr": expression,
        "legendFormat": legend or "__auto",
    }


def drawn(panel: Panel) -> tuple[dict[str, Any], dict[str, Any]]:
    """`fieldConfig.defaults.custom` and `options`."""
    if panel.kind == "stat":
        shown = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {}, {"colorMode": "value", "graphMode": "area", "reduceOptions": shown, "textMode": "auto"}
    custom = {
        "drawStyle": "line",
        "fillOpacity": 25 if panel.kind == "stack" else 0,
        "lineWidth": 1,
        "showPoints": "never",
        "stacking": {"group": "A", "mode": "normal" if panel.kind == "stack" else "none"},
    }
    legend = {"calcs": ["mean", "max"], "displayMode": "table", "placement": "bottom", "showLegend": True}
    return custom, {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def placed(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    """A panel at its place."""
    custom, options = drawn(panel)
    return {
        "id": number,
        "type": "stat" if panel.kind == "stat" else "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.size[0], "h": panel.size[1]},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": options,
        "targets": [target(place, line) for place, line in enumerate(panel.lines)],
    }


def panels() -> list[dict[str, Any]]:
    """All rows from the top, each panel beside or below the one before."""
    made: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        grid = {"x": 0, "y": y, "w": 24, "h": 1}
        head = {"type": "row", "title": title, "collapsed": False, "gridPos": grid, "panels": []}
        made.append({"id": len(made) + 1, **head})
        x, y, height = 0, y + 1, 0
        for panel in row:
            width, height = panel.size
            if x + width > 24:
                x, y = 0, y + height
            made.append(placed(len(made) + 1, panel, x, y))
            x += width
        y += height
    return made


def variable(name: str, label: str, metric: str, many: bool = True) -> dict[str, Any]:
    """A choice among the values of a label."""
    query = f"label_values({metric}, {name})"
    all_of_them = {"allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": many,
        "includeAll": many,
        **(all_of_them if many else {}),
    }


def dashboard() -> dict[str, Any]:
    """The whole page, in Grafana's classic JSON model."""
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    variables = [
        source,
        variable("job", "Job", "coserve_engine_up", many=False),
        variable("instance", "Server", 'coserve_engine_up{job="$job"}'),
        variable("latency_class", "Class", f'{CLASSES}{{job="$job"}}'),
    ]
    return {
        "uid": "coserve",
        "title": "coserve",
        "description": "Chat and fine-tuning on one copy of the weights.",
        "tags": ["coserve", "llm"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "version": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": variables},
        "panels": panels(),
    }


def text() -> str:
    """What the file holds."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write the file; returns 0."""
    PAGE.write_text(text(), encoding="utf-8")
    print(f"{PAGE.name}: {len(panels())} panels and rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
