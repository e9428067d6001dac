"""Figures of methods themselves, from their deployed tensors: what is stored, and which sizes can be reached."""
from __future__ import annotations

from math import log10

from .figures import _percent
from .picture import Picture, svg_of
from .style import _HUES, INK, drawing, families, title
from .weights import BUDGETS, PASSAGES, Reach, Shipped, bytes_text, dim_of

_FLOAT, _CODE = "#2f7fd1", "#d9772b"
MOST = 8                                 # tensors drawn one by one


def shape_text(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{n:,}" for n in shape) or "1"


def storage(method: str, what: Shipped, rows: int, *, command: str = "") -> Picture:
    """The tensors a method ships beside the full table of ``rows`` ids.

    Above, to scale, the full table's outline and what the module fills of it. Below, a bar per stored tensor on a
    logarithmic axis, with its name in the saved file, shape, type, bytes and share of the module.
    """
    held = [t for t in what.tensors if t.bytes]
    shown = held[:MOST] if len(held) > MOST + 1 else held
    rest = held[len(shown):]
    share = what.bytes / what.full
    lines = [(t.name, f"{shape_text(t.shape)} {t.dtype}", t.bytes, t.dtype) for t in shown]
    if rest:
        lines.append((f"{len(rest)} smaller tensors", "", sum(t.bytes for t in rest), rest[0].dtype))
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

        heights = [0.95, 0.6 + 0.46 * len(lines)]
        figure, (strip, ax) = plt.subplots(2, 1, figsize=(7.6, sum(heights)), height_ratios=heights)
        strip.add_patch(plt.Rectangle((0, 0), 100, 1, fill=False, ec=INK, lw=1.2, ls=(0, (4, 2))))
        left = 0.0
        for _, _, size, dtype in lines:
            width = 100 * size / what.full
            strip.add_patch(plt.Rectangle((left, 0), width, 1, fc=_FLOAT if "float" in dtype else _CODE, lw=0,
                                          alpha=0.85))
            left += width
        strip.set(xlim=(-0.6, 100.6), ylim=(-0.1, 2.1))
        strip.axis("off")
        strip.text(0, 1.25, f"{title(method)}: {bytes_text(what.bytes)}, {100 * share:.3g} %", color=INK,
                   weight="bold")
        outline = f"{rows:,} × {dim_of(what.data)} float32, {bytes_text(what.full)}"
        strip.text(100, 1.25, f"outline, to scale: Full, {outline}", color=INK, ha="right")
        for y, (name, shape, size, dtype) in enumerate(reversed(lines)):
            ax.barh(y - 0.17, max(size, 1), left=0.5, height=0.3, color=_FLOAT if "float" in dtype else _CODE,
                    alpha=0.85, lw=0)
            ax.text(0.56, y + 0.08, name, color=INK, weight="bold", va="bottom", fontsize=9.5)
            ax.text(what.full, y + 0.08, ", ".join(p for p in (shape, bytes_text(size), _share(size / what.bytes))
                                                   if p), color=INK, va="bottom", ha="right", fontsize=9.5)
        ax.set_xscale("log")
        ax.set(xlim=(0.5, what.full), ylim=(-0.55, len(lines) - 0.35))
        marks = [(1, "1 B"), (1024, "1 KiB"), (1024 ** 2, "1 MiB"), (1024 ** 3, "1 GiB"), (1024 ** 4, "1 TiB")]
        marks = [(at, text) for at, text in marks if at <= what.full]
        ax.xaxis.set_major_locator(FixedLocator([at for at, _ in marks]))
        ax.xaxis.set_major_formatter(FixedFormatter([text for _, text in marks]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_xlabel("bytes, logarithmic; blue: floating point, orange: integers (codes, maps, indices, hashes)")
        svg = svg_of(figure)
    asked = f"at a budget of {100 * what.budget:g} %" if what.budget else "at its smallest size"
    listed = "; ".join(f"{name} ({shape + ', ' if shape else ''}{bytes_text(size)}, {_share(size / what.bytes)})"
                       for name, shape, size, _ in lines)
    alt = (f"Diagram of what {title(method)} stores {asked}: {bytes_text(what.bytes)} beside the full table's "
           f"{bytes_text(what.full)}. Tensors: {listed}.")
    where = "for DPR's passages" if what.data == PASSAGES else "at Criteo's field sizes"
    return Picture(svg, alt, f"Stored tensors of the deployed module {where}, {asked}.", None, command)


def _share(part: float) -> str:
    if 0 < part < 1e-4:
        return "under 0.01 %"
    return "over 99.99 %" if 0.9999 < part < 1 else f"{100 * part:.2f} %"


def reach(found: dict[str, Reach], *, command: str = "") -> Picture:
    """From the smallest to the largest size of each method, as shares of the full table: what budgets it can serve."""
    family, names = families(), list(found)[::-1]
    low = 0.05
    with drawing():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter, NullLocator

        figure, ax = plt.subplots(figsize=(7.6, 0.9 + 0.3 * len(names)))
        for y, method in enumerate(names):
            r, kind = found[method], family[method]
            colour = _HUES[kind][0] if kind in _HUES else INK
            ax.plot([max(r.smallest, low), r.largest], [y, y], color=colour, lw=1 if r.each else 6,
                    alpha=0.45 if r.each else 0.75, solid_capstyle="butt")
            if r.each:
                ax.plot([s for s in r.each], [y] * len(r.each), color=colour, marker="o", ms=5, ls="")
            if r.smallest < low:
                ax.plot(low, y, marker=">", color=colour, ms=8)
        for b in BUDGETS:
            ax.axvline(100 * b, color=INK, lw=1, ls=(0, (6, 3)), zorder=0)
        ax.set_xscale("log")
        ax.set(xlim=(115, low * 0.92), ylim=(-0.6, len(names) - 0.4))
        ax.set_xticks([100, 50, 25, 10, 5, 1, 0.5, 0.1])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(_percent))
        ax.set_yticks(range(len(names)), [title(m) for m in names])
        ax.set_xlabel("deployed embedding, % of the float32 full table; dashed: the paper's budgets")
        svg = svg_of(figure)
    said = "; ".join(f"{title(m)} from {r.smallest:.3g} % to {r.largest:.3g} %" for m, r in found.items()
                     if log10(max(r.smallest, 1e-9)) > log10(low))
    alt = f"Range chart of the sizes each method can take. Above {low:g} % at the smallest: {said}. The others: below."
    caption = ("Sizes that can be reached at Criteo's field sizes. Bars: nearly any size between; dots: only these; an "
               f"arrow: below {low:g} %. Blue: inter-feature, orange: intra-feature, green: baselines.")
    return Picture(svg, alt, caption, None, command)
