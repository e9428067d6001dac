"""The one place for colours, markers, labels and the settings of every figure."""
from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

from ..extras import need

INK = "#737b85"                 # read on white and on near-black; becomes currentColor inside a page
_HUES = {                       # a family is a range of hues, a method a shade of it; all read on white and near-black
    "inter-feature": ["#2f7fd1", "#1ca3a8", "#6f78e8", "#4aa3df", "#8a63d2", "#3c8fa8", "#5b8def"],
    "intra-feature": ["#d9772b", "#d6504b", "#b08600", "#cf5aa0", "#c0673f", "#e08a5b", "#b5577a"],
    "baseline": ["#2a9d6c", "#7d9b2c", "#4f9a4f"],
}
_OTHER = ["#8c7a6b", "#a0826d", "#7a8c6b"]
_MARKERS = ["o", "s", "D", "^", "v", "P", "X", "*"]
_DASHES = ["-", (0, (5, 1.6)), (0, (1.5, 1.3)), (0, (4, 1.4, 1.2, 1.4))]
TITLES = {
    "full": "Full", "hash_trick": "Hash", "compo": "CompoEmb", "robe": "ROBE", "int_quant": "INT8/16",
    "deeplight": "DeepLight", "autosrh": "AutoSrh", "top_k": "Top-k", "small_dim": "Small dim",
}

RC = {
    "svg.hashsalt": "ecstudy", "svg.fonttype": "none", "savefig.transparent": True, "figure.facecolor": "none",
    "axes.facecolor": "none", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.titlecolor": INK, "grid.color": INK, "grid.alpha": 0.22, "grid.linewidth": 0.6,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 10.5, "axes.titlesize": 11, "axes.labelsize": 10.5, "lines.linewidth": 1.7, "lines.markersize": 6,
    "legend.frameon": False, "figure.constrained_layout.use": True,
}


FULL = "full"


class Look(NamedTuple):
    color: str
    marker: str
    dash: object
    title: str


def title(method: str) -> str:
    """The name a reader knows a method by."""
    return TITLES.get(method, method)


def looks(rows) -> dict[str, Look]:
    """``{method: Look}``: hue by family, shade, marker and dash by method, the same in every figure.

    The order of the registered methods decides, so a figure of two methods draws them as the figure of all does;
    methods that are not registered follow behind.
    """
    from ..registry import table

    family = table()["family"].to_dict()
    for method, name in rows[["method", "family"]].drop_duplicates().itertuples(index=False):
        family.setdefault(method, name)
    seen: dict[str, int] = {}
    out = {FULL: Look(INK, "", "-", title(FULL))}
    for i, (method, name) in enumerate((m, f) for m, f in family.items() if m != FULL):
        nth = seen[name] = seen.get(name, -1) + 1
        hues = _HUES.get(name, _OTHER)
        out[method] = Look(hues[nth % len(hues)], _MARKERS[i % len(_MARKERS)], _DASHES[nth // 3 % len(_DASHES)],
                           title(method))
    return out


@contextmanager
def drawing():
    """Within it matplotlib draws in the study's style, without a display and without touching the user's settings."""
    matplotlib = need("matplotlib", "book")
    with matplotlib.rc_context(RC):
        yield
