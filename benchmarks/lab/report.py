"""One HTML file of what the laboratory has found: it needs no network, and works from a file."""

from __future__ import annotations

import html
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from lab.experiments import EXPERIMENTS, SHORT
from lab.predict import Costs, step_of
from lab.profiles import profile
from lab.rows import cells, foretold, setting, worst
from lab.scale import STATED
from lab.served import round_of

__all__ = ["write"]

_STYLE = """
:root { color-scheme: light dark; --edge: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
.wide { overflow-x: auto; } th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--edge); text-align: right; }
th { cursor: pointer; position: sticky; top: 0; background: Canvas; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
figure { margin: 1.5rem 0; background: #fff; color: #234; border-radius: .5rem; padding: .5rem; }
small { opacity: .75; }
"""
_SORT = """
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const table = head.closest("table"), at = [...head.parentNode.children].indexOf(head);
  const value = row => { const text = row.children[at].textContent, number = parseFloat(text);
    return isNaN(number) ? text : number };
  const down = head.dataset.down = head.dataset.down === "1" ? "" : "1";
  const rows = [...table.tBodies[0].rows].sort((a, b) => { const x = value(a), y = value(b);
    return (x > y ? 1 : x < y ? -1 : 0) * (down ? 1 : -1) });
  rows.forEach(row => table.tBodies[0].append(row));
}));
"""
_LAYOUT: dict[str, Any] = {"template": "plotly_white", "height": 420, "margin": {"t": 20, "l": 60, "r": 20, "b": 50}}


def write(
    path: Path,
    results: Sequence[dict[str, Any]],
    published: dict[str, Any] | None = None,
    scale: dict[str, Any] | None = None,
) -> None:
    """Writes the report of experiments, as `running.run` gives them, and of tables of efficiencies in print and of many
    ranks."""
    errors = sorted(abs(row["error"]) for result in results for row in foretold(result))
    by_name = {result["name"]: result for result in results}
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>ringred: the scaling laboratory</title><style>{_STYLE}</style><body>",
        "<h1>Which of these scales, on which network, and why?</h1>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in _answer(results, errors)),
        _figure(_diagonal(results), first=True),
    ]
    if "scaling" in by_name:
        parts += ["<h2>Efficiency over hosts</h2>", _figure(_scaling(by_name["scaling"]))]
    if scale is not None:
        parts += ["<h2>What would thousands of ranks do?</h2>", _figure(_scale(scale))]
        parts.append(f"<details><summary>All models, in percent</summary>{_table(**scale)}</details>")
    if (drawn := _timeline(by_name)) is not None:
        parts += ["<h2>One step of ResNet-50</h2>", _figure(drawn)]
    if "steps" in by_name:
        parts += ["<h2>What the busiest host's port carries in a step</h2>", _figure(_traffic(by_name["steps"]))]
    for result in results:
        way = {"torch": "Gloo's point-to-point", "mpi": "Open MPI's TCP"}[result["by"]]
        parts.append(f"<h2>{html.escape(result['question'])}</h2>")
        parts.append(f"<p>{html.escape(setting(result))} ({way}); {result['date']}.</p>")
        if "training" not in result["rows"][0]:
            parts.append(_figure(_bars(result)))
        parts.append(_table(*cells(result)))
    if published is not None:
        parts += ["<h2>Efficiencies in print, and simulated (in percent)</h2>", _table(**published)]
    parts += ["<h2>The ten worst predictions</h2>", _table(*worst(results))]
    parts.append("<p>More: benchmarks/results/lab.md, where the simulator is wrong.</p>")
    machines = "; ".join(dict.fromkeys(result["machine"] for result in results))
    parts.append(
        f"<p><small>{html.escape(machines)}; shared with others; <code>python benchmarks/lab.py run</code>, "
        f"<code>published</code>, <code>scale</code>, <code>report</code>. All hosts are namespaces of one machine: "
        f"beyond its cores' speed nothing is told of real ones. Where models are 20 times slower than their profile, "
        f"500 Mbit/s stand for 10 Gbit/s; what a message, a call, a copy and the encryption of a byte cost is not "
        f"slowed down, and counts for a twentieth of what it would there. The baseline of an efficiency is one rank "
        f"alone: the times of the profile, or of a real model while all hosts compute by themselves. Only the "
        f"parameter server steps an optimizer. MiB sent and received: by the port of the busiest host in a step, "
        f"headers as well. Reducing: how long reductions were under way; hidden: the part of it by which the step was "
        f"not longer. Late: how long after its time a replayed layer came at most.</small></p>"
        f"<script>{_SORT}</script></body></html>"
    )
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text("\n".join(parts))
    unfinished.replace(path)


def _answer(results: Sequence[dict[str, Any]], errors: Sequence[float]) -> list[str]:
    """Three sentences."""
    return list(filter(None, (_of_the_line(results), _of_a_step(results), _of_predictions(errors))))


def _of_the_line(results: Sequence[dict[str, Any]]) -> str:
    even = [row for result in results if result["name"].startswith("reduce") for row in result["rows"]]
    even = even or [row for result in results if result["name"].startswith("short") for row in result["rows"]]
    least = min(4 << 20, max((row["nbytes"] for row in even), default=0))
    told = []
    for hosts in sorted({row["hosts"] for row in even}):
        parts = []
        for way in ("ring", "halving_doubling", "torus", "double_tree", "central"):
            of = [
                row["of_line"] for row in even if (row["hosts"], row["way"]) == (hosts, way) and row["nbytes"] >= least
            ]
            if of:
                parts.append(f"{way.replace('_', '-')} {statistics.median(of):.0%}")
        if parts:
            told.append(f"between {hosts} hosts {', '.join(parts)}")
    return (
        f"All-reduces from {least / 2**20:g} MiB on use of the line, in the median, {'; '.join(told)}: of a ring each "
        f"port passes less than twice the data in either direction, however many hosts there are, and the port of one "
        f"server (central) all data of every other host."
        if told
        else ""
    )


def _of_a_step(results: Sequence[dict[str, Any]]) -> str:
    ways = {"ring": "a ring", "central": "one server's traffic", "servers:sync": "a parameter server on each host"}
    found: dict[tuple[str, int], dict[str, float]] = {}
    for result in results:
        if result["name"] in ("steps", "steps-others", "server", "servers-others"):
            for row in result["rows"]:
                found.setdefault((row["case"], row["hosts"]), {})[row["way"]] = row["efficiency"]
    told = [
        f"{model} on {hosts} hosts " + ", ".join(f"{of[way]:.0%} by {name}" for way, name in ways.items() if way in of)
        for (model, hosts), of in found.items()
        if "ring" in of and len(of.keys() & ways.keys()) > 1
    ]
    return f"A training step keeps of one rank's speed alone: {'; '.join(told)}." if told else ""


def _of_predictions(errors: Sequence[float]) -> str:
    if not errors:
        return ""
    return (
        f"The simulator is {statistics.median(errors):.0%} off in the median of {len(errors)} cases that it was not "
        f"fitted to, and more than {errors[int(0.9 * len(errors))]:.0%} in the worst tenth."
    )


def _figure(figure: go.Figure, first: bool = False) -> str:
    """With its title as a caption, which wraps on a narrow page."""
    caption = html.escape(figure.layout.title.text)
    figure.update_layout(title=None, legend={"orientation": "h", "y": -0.2})
    options = {"responsive": True, "displayModeBar": False}
    drawn: str = plotly.io.to_html(figure, full_html=False, include_plotlyjs=first, config=options)
    return f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>"


def _diagonal(results: Sequence[dict[str, Any]]) -> go.Figure:
    figure = go.Figure(layout={**_LAYOUT, "title": "Predicted against measured, all cases that nothing was fitted to"})
    least, most = 1e9, 0.0
    for result in results:
        rows = foretold(result)
        measured, predicted = [1e3 * row["seconds"] for row in rows], [1e3 * row["predicted"] for row in rows]
        names = [f"{row['case']} {row['way']}" for row in rows]
        figure.add_scatter(x=measured, y=predicted, text=names, mode="markers", name=result["name"])
        least, most = min([least, *measured]), max([most, *measured])
    figure.add_scatter(
        x=[least, most], y=[least, most], mode="lines", name="equal", line={"color": "#888", "dash": "dot"}
    )
    figure.update_xaxes(type="log", title="measured ms")
    figure.update_yaxes(type="log", title="predicted ms")
    return figure


def _bars(result: dict[str, Any]) -> go.Figure:
    steps = "efficiency" in result["rows"][0]
    what = "efficiency" if steps else "of_line"
    title = "Efficiency of a step (one rank alone = 1)" if steps else "Bus bandwidth, as a part of the line's rate"
    figure = go.Figure(layout={**_LAYOUT, "title": title, "barmode": "group"})
    several = len(result["networks"]) > 1
    for way in dict.fromkeys(row["way"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["way"] == way]
        cases = [f"{row['case']}, {row['hosts']} hosts" if several else row["case"] for row in rows]
        figure.add_bar(x=cases, y=[row[what] for row in rows], name=way)
    return figure


def _scaling(result: dict[str, Any]) -> go.Figure:
    """Measured, and predicted as dots."""
    figure = go.Figure(layout={**_LAYOUT, "title": "Efficiency of a step (one rank alone = 1); dotted: predicted"})
    for case, way in dict.fromkeys((row["case"], row["way"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["case"], row["way"]) == (case, way)]
        hosts, name = [row["hosts"] for row in rows], f"{case}, {way}"
        figure.add_scatter(x=hosts, y=[row["efficiency"] for row in rows], name=name, mode="lines+markers")
        if rows[0]["predicted"] is not None:
            told = [row["efficiency"] * row["seconds"] / row["predicted"] for row in rows]
            figure.add_scatter(x=hosts, y=told, name=f"{name}, predicted", mode="lines", line={"dash": "dot"})
    figure.update_xaxes(title="hosts", type="log", dtick=0.30103)
    figure.update_yaxes(rangemode="tozero")
    return figure


def _traffic(result: dict[str, Any]) -> go.Figure:
    """Bytes of the busiest host in each direction, by way, of the first model."""
    first = result["rows"][0]["case"]
    rows = [row for row in result["rows"] if row["case"] == first and row["way"] != "alone"]
    figure = go.Figure(layout={**_LAYOUT, "title": f"{first}: MiB a step, headers as well", "barmode": "group"})
    for what in ("sent", "received"):
        figure.add_bar(x=[row["way"] for row in rows], y=[row[what] / 2**20 for row in rows], name=what)
    return figure


def _timeline(results: Mapping[str, dict[str, Any]]) -> go.Figure | None:
    """When the buckets of one step are reduced by a ring, and what goes to a server and comes from it, by the costs of
    an experiment with one rank on each host; where encryption was not calibrated, by one server's traffic."""
    known = ("servers-others", "servers", "stragglers", "steps", "short")
    name = next((name for name in known if results.get(name, {}).get("costs")), None)
    if name is None:
        return None
    (network,) = EXPERIMENTS.get(name, SHORT).networks
    model, costs, dilation = profile("resnet50"), Costs(**results[name]["costs"][0]), 20.0
    title = f"Predicted, with costs of {network}, models 20 times slower: when data is ready (dashes), and on its way"
    title += "; last comes what is pulled from servers" if costs.cipher else ""
    figure = go.Figure(layout={**_LAYOUT, "title": title, "barmode": "overlay"})
    ways = {"ring": step_of(model, dilation, "ring", costs, network)}
    if costs.cipher:
        ways["one server"] = round_of("server", model, dilation, costs, network)
        ways["a server on each host"] = round_of("servers", model, dilation, costs, network)
    else:
        ways["central"] = step_of(model, dilation, "central", costs, network)
    for way, step in ways.items():
        begins, lasts = [begin for begin, _ in step.times], [end - begin for begin, end in step.times]
        figure.add_bar(y=[way] * len(lasts), x=lasts, base=begins, orientation="h", name=f"{way}: {step.seconds:.1f} s")
        marker = {"symbol": "line-ns-open", "size": 18, "color": "#234"}
        figure.add_scatter(x=list(step.ready), y=[way] * len(step.ready), mode="markers", marker=marker, name="ready")
    figure.for_each_trace(lambda trace: trace.update(showlegend=trace.name != "ready"))
    figure.add_vline(x=model.seconds * dilation, line_dash="dot", annotation_text="backward ends")
    figure.update_xaxes(title="seconds since the step began", rangemode="tozero")
    return figure


def _scale(table: dict[str, Any]) -> go.Figure:
    """Of ResNet-50."""
    figure = go.Figure(layout={**_LAYOUT, "title": f"ResNet-50: efficiency of a step, simulated; {STATED}"})
    ranks = [int(head.split()[0]) for head in table["heads"][2:]]
    for model, way, *efficiencies in table["rows"]:
        if model == "resnet50":
            figure.add_scatter(x=ranks, y=[float(one) / 100 for one in efficiencies], name=way, mode="lines+markers")
    figure.update_xaxes(title="ranks", type="log")
    figure.update_yaxes(rangemode="tozero")
    return figure


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
