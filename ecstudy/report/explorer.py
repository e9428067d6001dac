"""AUC, bytes and latency of all cells in one figure to explore: plotly from a file of the book, no request to anyone.

What a reader chooses (axes, intervals) stands in plain form elements, so it follows the page from light to dark; the
figure's own ink is a mid-tone read on both. Without scripts the page still has the table and the CSV.
"""
from __future__ import annotations

import json
import math
from html import escape

import pandas as pd

from ..extras import need
from .figures import _where
from .picture import Html, evidence, frame_html
from .style import _DASHES, FAMILIES, FULL, INK, in_order, looks, title
from .summary import cells, check_rows
from .tables import _number, _plus_minus, duration
from .weights import bytes_text

SCRIPT = "../_static/plotly/plotly.min.js"               # from a page in book/
_SYMBOLS = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross",
            "X": "x", "*": "star", "p": "pentagon", "<": "triangle-left", ">": "triangle-right", "h": "hexagon",
            "d": "diamond-tall", "8": "octagon"}
_STROKES = ["solid", "dash", "dot", "dashdot"]           # as near to the dashes of the other figures as plotly comes
X = {"reached_pct": "deployed size, % of the full table", "bytes": "deployed size, bytes",
     "training_pct": "training memory, % of the full table", "latency_ratio": "look-up latency ÷ Full's",
     "time_ratio": "training time ÷ Full's"}
Y = {"auc": "test AUC", "gap": "test AUC − Full's"}
_HALF = {"auc": "auc_half", "gap": "gap_half"}
_GRID = "rgba(115,123,133,0.25)"


def explorer(rows: pd.DataFrame, *, command: str = "", script: str = SCRIPT, name: str = "ec-explorer") -> Html:
    """An interactive figure of all finished cells: a line per method, a point per budget, marker size by latency.

    Axes are chosen from lists (deployed size, training memory, latency, training time; AUC, gap to Full), hovering
    shows the cell, a click in the legend leaves one method and a second click all, a double click adds or removes one.

    Parameters
    ----------
    rows: of one data set, model and dimension.
    script: where the page finds ``plotly.min.js``, as a path relative to it; the book keeps one copy for all pages.
    name: id of the figure in its page.

    Raises ValueError if there are no rows, they mix data sets, models or dimensions, or none finished.
    """
    table = cells(rows)
    done = table[table["status"] == "ok"]
    if not len(done):
        raise ValueError(f"none of the {len(rows)} rows finished (status ok); nothing to draw")
    look, device = looks(check_rows(rows)), ", ".join(dict.fromkeys(rows["device"]))
    order = in_order(done["method"], dict(done[["method", "family"]].itertuples(index=False)))
    figure = need("plotly.graph_objects", "book").Figure(
        [_trace(done[done["method"] == m], look[m], table, device) for m in order], _layout())
    data = json.loads(figure.to_json())
    # templates are plotly's own theme, some kilobytes that nothing here uses
    data["layout"].pop("template", None)
    values = [{c: [_plain(v) for v in done.loc[done["method"] == m].sort_values("reached_pct")[c]]
               for c in (*X, *Y, *_HALF.values())} for m in order]
    best = done[done["method"] != FULL].sort_values("auc").tail(1)
    alt = f"Interactive figure of {len(done)} cells of {len(order)} methods on {_where(rows)}: AUC, bytes, latency."
    if len(best):
        b = best.iloc[0]
        alt += f" The highest compressed cell is {title(b['method'])} at {b['reached_pct']:.3g} %: {b['auc']:.4f}."
    payload = json.dumps(dict(figure=data, values=values, x=X, y=Y, half=_HALF))
    payload = payload.replace("</", "<\\/")                 # a text may not end the script
    caption = (f"All cells on {_where(rows)}. A larger marker is a slower look-up. Choose the axes, hover for the "
               "cell, click a name to see it alone.")
    return Html(f'''<figure class="ec-figure ec-explorer">
<form class="ec-choices">{_choice("x", X, name)}{_choice("y", Y, name)}
<label><input type="checkbox" name="bars"> 95 % intervals</label></form>
<div id="{name}" role="img" aria-label="{escape(alt, quote=True)}" style="width:100%;height:620px"></div>
<noscript><p>This figure needs JavaScript; the table below holds the same cells.</p></noscript>
<figcaption>{escape(caption)}{evidence(rows, command)}</figcaption>
<details><summary>The same cells as a table</summary><div class="ec-scroll">{_as_table(done, order)}</div></details>
<script type="application/json" id="{name}-data">{payload}</script>
<script src="{escape(script, quote=True)}"></script>
<script>{_DRAW.replace("NAME", name)}</script>
</figure>''')


def _choice(axis: str, options: dict[str, str], name: str) -> str:
    listed = "".join(f'<option value="{key}">{escape(text)}</option>' for key, text in options.items())
    return f'<label>{axis} <select name="{axis}" aria-controls="{name}">{listed}</select></label> '


def _plain(value):
    return None if isinstance(value, float) and math.isnan(value) else value


def _size(ratio: float) -> float:
    """Marker diameter in pixels by latency as a multiple of Full's: a hundred times is three times as wide."""
    return 9.0 if math.isnan(ratio) or ratio <= 0 else min(30.0, max(7.0, 9.0 + 9.0 * math.log10(ratio)))


def _trace(own: pd.DataFrame, look, table: pd.DataFrame, device: str) -> dict:
    own = own.sort_values("reached_pct")
    method, family = own["method"].iloc[0], own["family"].iloc[0]
    heading = "uncompressed" if method == FULL else {"baseline": "baselines"}.get(family, family)
    rank = 0 if method == FULL else FAMILIES.index(family) + 1 if family in FAMILIES else len(FAMILIES) + 1
    return dict(
        type="scatter", mode="lines+markers", name=look.title, x=own["reached_pct"].tolist(), y=own["auc"].tolist(),
        legendgroup=heading, legendgrouptitle=dict(text=heading), legendrank=1 + 100 * rank,
        line=dict(color=look.color, width=1.4, dash=_STROKES[_DASHES.index(look.dash)]),
        marker=dict(color=look.color, symbol=_SYMBOLS.get(look.marker, "circle-open"), opacity=0.9,
                    size=[_size(r) for r in own["latency_ratio"]], line=dict(width=0)),
        error_y=dict(type="data", array=[_plain(h) for h in own["auc_half"]], visible=False, thickness=1, width=3),
        text=[_hover(cell, method, device) for cell in own.to_dict("records")], hovertemplate="%{text}<extra></extra>")


def _hover(cell: dict, method: str, device: str) -> str:
    budget = "its own size" if math.isnan(cell["budget"]) or method == FULL else f"budget {100 * cell['budget']:g} %"
    lines = [f"<b>{escape(title(method))}</b>, {budget}", f"spec {escape(method)}, {cell['seeds']} "
             f"seed{'s' * (cell['seeds'] != 1)}", f"AUC {_plus_minus(cell['auc'], cell['auc_half'])}"]
    if method != FULL and not math.isnan(cell["gap"]):
        lines.append(f"AUC − Full {_plus_minus(cell['gap'], cell['gap_half'], sign='+')}")
    lines += [f"deployed {cell['reached_pct']:.3g} %, {bytes_text(cell['bytes'])}",
              f"training memory {_number(cell['training_pct'], ' %')}",
              f"latency {_number(cell['latency_ms'], ' ms')}, {_number(cell['latency_ratio'], '×')} Full's ({device})",
              f"training {duration(cell['seconds'])}"]
    return "<br>".join(lines)


def _layout() -> dict:
    axis = dict(gridcolor=_GRID, zeroline=False, linecolor=INK, showline=True, ticks="outside", tickcolor=INK,
                color=INK)
    return dict(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font=dict(color=INK, size=13, family="inherit"),
        margin=dict(l=70, r=10, t=34, b=60), modebar=dict(bgcolor="rgba(0,0,0,0)", color=INK, activecolor="#2f7fd1"),
        hovermode="closest", hoverlabel=dict(align="left"),
        xaxis=axis | dict(type="log", title=dict(text=X["reached_pct"]), tickformat="~g"),
        yaxis=axis | dict(title=dict(text=Y["auc"])),
        legend=dict(itemclick="toggleothers", itemdoubleclick="toggle", groupclick="toggleitem", font=dict(size=12),
                    tracegroupgap=6))


def _as_table(done: pd.DataFrame, order: list[str]) -> str:
    place = {m: i for i, m in enumerate(order)}
    done = done.sort_values(["method", "budget"], key=lambda c: c.map(place) if c.name == "method" else -c)
    return frame_html(pd.DataFrame([{
        "Method": title(c["method"]), "Budget": "" if math.isnan(c["budget"]) else f"{100 * c['budget']:g} %",
        "AUC": _plus_minus(c["auc"], c["auc_half"]),
        "AUC − Full": "" if c["method"] == FULL else _plus_minus(c["gap"], c["gap_half"], sign="+"),
        "Deployed": _number(c["reached_pct"], " %"), "Training memory": _number(c["training_pct"], " %"),
        "Latency ÷ Full": _number(c["latency_ratio"], "×"), "Time ÷ Full": _number(c["time_ratio"], "×"),
    } for c in done.to_dict("records")]), index=False)


# A page may load require.js (notebooks with widgets): plotly then registers there and not as a global.
_DRAW = """
(function () {
  var box = document.getElementById("NAME"), form = box.parentNode.querySelector("form");
  var all = JSON.parse(document.getElementById("NAME-data").textContent);
  function draw(Plotly) {
    function show() {
      var x = form.x.value, y = form.y.value, bars = form.bars.checked;
      Plotly.restyle(box, {
        x: all.values.map(function (v) { return v[x]; }),
        y: all.values.map(function (v) { return v[y]; }),
        "error_y.array": all.values.map(function (v) { return v[all.half[y]]; }),
        "error_y.visible": bars
      });
      Plotly.relayout(box, {"xaxis.title.text": all.x[x], "yaxis.title.text": all.y[y],
                            "xaxis.autorange": true, "yaxis.autorange": true});
    }
    Plotly.newPlot(box, all.figure.data, all.figure.layout, {
      responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]
    });
    form.addEventListener("change", show);
    form.addEventListener("submit", function (event) { event.preventDefault(); });
  }
  if (window.Plotly) { draw(window.Plotly); }
  else if (window.require) { require(["plotly"], draw); }
  else { box.textContent = "The script of this figure was not found; the table below holds the same cells."; }
})();
"""
