"""The one place for colours, markers, labels and the settings of every figure."""
from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

from ..extras import need

INK = "#737b85"                 # read on white and on near-black; becomes currentColor inside a page
_HUES = {                       # a family is a range of hues, a method a shade of it; read on white and on near-black
    "inter-feature": ["#2f7fd1", "#148f94", "#8a63d2", "#64798c", "#b46bd6",
                      "#3f8a6e", "#5b6ee0", "#1f8fb8", "#7f6aa8"],
    "intra-feature": ["#d9772b", "#d6504b", "#a88000", "#cf5aa0", "#96705a",
                      "#e0607e", "#b5577a", "#c46a1f", "#a8643c"],
    "baseline": ["#2a9d6c", "#7d9b2c", "#4f9a4f"],
    # drawn by themselves, so in hues far apart
    "post-training": ["#3d74c8", "#c95a4e", "#3a9a54", "#9b62c4", "#b0782a", "#2b93a8", "#d05590", "#808f2a",
                      "#6d7f91", "#a3664a", "#5f6be6", "#2f9c86", "#b8577f"],
}
_OTHER = ["#8c7a6b", "#a0826d", "#7a8c6b"]
_MARKERS = ["o", "s", "D", "^", "v", "P", "X", "*", "p"]
_MORE = [*_MARKERS, "<", ">", "h", "d", "8"]              # of a family of more methods
_DASHES = ["-", (0, (5, 1.6)), (0, (1.5, 1.3)), (0, (4, 1.4, 1.2, 1.4))]
FAMILIES = ("inter-feature", "intra-feature", "baseline", "post-training")
#: what a reader knows a method by, in the order of the paper's tables, which every figure and table keeps
TITLES = {
    "full": "Full",
    "compo": "CompoEmb", "tt_rec": "TT-Rec", "dhe": "DHE", "robe": "ROBE", "dedup": "Dedup", "mgqe": "MGQE",
    "adapt_emb": "AdaptEmb", "dpq": "DPQ", "hash_trick": "Hash",
    "int_quant": "INT8/16", "alpt": "ALPT", "mde": "MDE", "auto_dim": "AutoDim", "opt_embed": "OptEmbed",
    "deeplight": "DeepLight", "autosrh": "AutoSrh",
    "top_k": "Top-k", "small_dim": "Small dim",
    "pq": "PQ", "mag_pq": "MagPQ", "svd": "SVD", "mag_svd": "MagSVD", "prune": "Pruning",
    "opq": "OPQ", "rq": "RQ", "int4": "INT4", "rabitq": "RaBitQ", "pca": "PCA", "pca_pq": "PCA, PQ",
    "rescore": "Two stages",
}
#: methods that train and that the paper does not benchmark: a second block of every table
BEYOND = {
    "double_hash": "DoubleHash", "binary_code": "BinaryCode", "memcom": "MEmCom", "unified": "Unified", "cafe": "CAFE",
    "light_rec": "LightRec", "cel": "CEL", "cce": "CCE", "split": "Split",
    "fiited": "FIITED", "ada_embed": "AdaEmbed", "fp16": "FP16", "post4bits": "Post4Bits", "mixed_prec": "MixedPrec",
    "mpe": "MPE", "pep": "PEP", "mag_prune": "MagPrune", "sseds": "SSEDS", "ham": "HAM", "nis": "NIS",
    "esapn": "ESAPN", "amtl": "AMTL", "auto_emb": "AutoEmb",
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
    """The name a reader knows a method by; ``dedup(block=80)`` is ``Dedup (block=80)``."""
    name, bracket, rest = method.partition("(")
    name = TITLES.get(name) or BEYOND.get(name, name)
    return f"{name} ({rest.replace(chr(39), '')}" if bracket else name


def beyond(method: str) -> bool:
    """Whether a method or spec stands in the second block of tables (:data:`BEYOND`)."""
    return method.partition("|")[0].partition("(")[0] in BEYOND


def in_order(methods, family: dict[str, str] | None = None) -> list[str]:
    """``methods`` without repetition: Full, then by family in the paper's order, those of :data:`BEYOND` by family
    after these, others behind in the order given.

    ``family`` adds to the registered methods' families.
    """
    family = (family or {}) | families()
    place = {method: i for i, method in enumerate((*TITLES, *BEYOND))}
    found = list(dict.fromkeys(methods))

    def key(method: str):
        name = method.partition("|")[0].partition("(")[0]
        kind = family.get(name) or family.get(method, "")
        return (name != FULL, beyond(method), FAMILIES.index(kind) if kind in FAMILIES else len(FAMILIES),
                place.get(name, len(place)), found.index(method))

    return sorted(found, key=key)


def families() -> dict[str, str]:
    """``{method: family}`` of the registered methods."""
    from ..registry import table

    return table()["family"].to_dict()


def looks(rows) -> dict[str, Look]:
    """``{method: Look}``: hue by family, shade, marker and dash by method, the same in every figure.

    The order of the registered methods decides, so a figure of two methods draws them as the figure of all does;
    methods that are not registered follow behind.
    """
    known = families()
    family = {method: known[method] for method in in_order(known)}
    for method, name in rows[["method", "family"]].drop_duplicates().itertuples(index=False):
        family.setdefault(method, name)
    seen: dict[str, int] = {}
    out = {FULL: Look(INK, "", "-", title(FULL))}
    for method, name in ((m, f) for m, f in family.items() if m != FULL):
        nth = seen[name] = seen.get(name, -1) + 1
        hues, markers = _HUES.get(name, _OTHER), _MARKERS if name != "post-training" else _MORE
        shift = 3 * (FAMILIES.index(name) if name in FAMILIES else 1)    # families in one figure begin apart
        out[method] = Look(hues[nth % len(hues)], markers[(nth + shift + nth // len(hues)) % len(markers)],
                           _DASHES[nth // 3 % len(_DASHES)], title(method))
    return out


@contextmanager
def drawing():
    """Within it matplotlib draws in the study's style, without a display and without touching the user's settings."""
    matplotlib = need("matplotlib", "book")
    with matplotlib.rc_context(RC):
        yield
