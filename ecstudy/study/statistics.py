"""From rows to statements: learning rates chosen on validation, differences to Full with two sources of error,
equivalence, adjustment for many methods, ranks over blocks.

**Pairing.** A difference is taken between two runs of the same seed on the same test rows.

**Two sources of error.** The mean difference ``d`` over ``S`` seeds would be another one with other seeds (weights,
order of rows) and with other test rows. The first is estimated by the scatter over seeds, ``sd**2 / S``; the second by
DeLong's variance of the difference of seed-averaged components (:func:`ecstudy.measure.delong_paired`), ``rows_se**2``.
Seeds and rows are drawn independently, so the variances add: ``se**2 = sd**2 / S + rows_se**2``. What seeds and rows do
together (a seed that suits just these rows) is in both terms, so the sum errs on the wide side, by at most ``sd**2 /
S``. Quantiles are Student's with ``(S - 1) (se**2 / (sd**2 / S))**2`` degrees of freedom (Satterthwaite 1946, the part
of the rows taken as known): ``S - 1`` where seeds make all the error, nearly the normal where rows do.

Tests, intervals and verdicts need scipy (extra ``book``).
"""
from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .. import paths
from ..extras import need
from ..measure.auc import Paired, auc, components, paired
from . import store
from .row import CellError, frame, known

FULL = "full"
MARGIN = 0.001                           # a difference of AUC that the paper calls considerable
FEWEST_BLOCKS = 6                        # the chi-square of Friedman's test is too coarse below
SOURCES = ("all", "seeds")
_PLACE = ["dataset", "model", "dim"]

#: Columns of :func:`contrasts`; differences, errors and bounds are of AUC.
CONTRAST = tuple("""dataset model dim method family budget reference status seeds difference sd half low high rows_se
    total_low total_high se df sources margin p_difference p_difference_holm p_equivalence p_equivalence_holm verdict
    pairs""".split())
VERDICTS = ("equivalent", "better", "worse", "undecided")


# -- rows: named by spec, one learning rate, one per seed --------------------------------------------------------------

def by_spec(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with ``method`` naming the whole spec: ``compo|int8`` is a method of its own."""
    if "spec" not in rows:
        return rows
    return rows.assign(method=rows["spec"].where(rows["spec"].fillna("").ne(""), rows["method"]))


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows at the learning rate that validation chose, per data set, model, dimension, method and budget.

    Learning rates are compared by mean validation AUC over the seeds they have in common (a sweep with ``tune`` tries
    all of them on its first seed); a run that diverged counts 0.5, which is chance. A rate that finished no run drops
    out; where the others have no seed in common, those with most seeds are compared, by the seeds each has. Ties go to
    the smaller rate. The selection reads ``valid_auc`` alone and never a test column. Cells that never finished keep
    all their rows, which say why.
    """
    if rows.empty or rows["lr"].nunique(dropna=False) <= 1:
        return rows
    rows = rows.reset_index(drop=True)
    named, keep = by_spec(rows), pd.Series(True, index=rows.index)
    for _, group in named.groupby(_keys(rows, "budget"), dropna=False, sort=False):
        if group["lr"].nunique() > 1 and (best := _best_rate(group)) is not None:
            keep[group.index] = group["lr"].eq(best)
    return rows[keep]


def _keys(rows: pd.DataFrame, *more: str) -> list[str]:
    return [c for c in (*_PLACE, "method", *more) if c in rows]


def _best_rate(group: pd.DataFrame) -> float | None:
    """The learning rate of best validation among the rows of one method at one budget; None if no run finished."""
    seen = group[group["status"].isin(["ok", "diverged"])]
    value = seen["valid_auc"].where(seen["status"].eq("ok"), 0.5)
    table = seen.assign(value=value).pivot_table(index="lr", columns="seed", values="value", aggfunc="max")
    table = table.loc[table.index.isin(seen.loc[seen["status"].eq("ok"), "lr"])]
    if table.empty:
        return None
    common = table.dropna(axis=1)
    if common.shape[1] == 0:
        counts = table.notna().sum(axis=1)
        common = table[counts.eq(counts.max())]
    return float(common.mean(axis=1).idxmax())               # the index rises, so ties go to the smaller rate


def best_by_validation(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per method, budget and seed (and data set, model, dimension): at the learning rate of :func:`chosen`, and
    of several runs there the one with the best validation AUC (never the test AUC)."""
    keys = _keys(rows, "budget", "seed")
    rows = chosen(rows)
    order = rows.assign(_ok=rows["status"].eq("ok")).sort_values(
        ["_ok", "valid_auc"], ascending=False, na_position="last", kind="stable")
    kept = order.drop_duplicates(keys).drop(columns="_ok")
    return kept.sort_values(keys, ascending=[k != "budget" for k in keys], ignore_index=True)   # large budgets first


# -- one mean and its interval -----------------------------------------------------------------------------------------

def t_interval(values, level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of the Student t-interval of ``values`` [n]; the half width is NaN below two values."""
    x = np.asarray([v for v in values if v is not None and not pd.isna(v)], dtype=float)
    if len(x) == 0:
        return math.nan, math.nan
    if len(x) == 1:
        return float(x[0]), math.nan
    quantile = need("scipy.stats", "book").t.ppf(0.5 + level / 2, len(x) - 1)
    return float(x.mean()), float(quantile * x.std(ddof=1) / math.sqrt(len(x)))


def two_sided(difference: float, se: float, df: float) -> float:
    """p of no difference: ``difference / se`` against Student's t. With ``se`` 0 it is 1 for 0 and 0 for another."""
    if not se > 0:
        return math.nan if math.isnan(se) else float(difference == 0)
    return float(2 * need("scipy.stats", "book").t.sf(abs(difference) / se, df))


def equivalence(difference: float, se: float, df: float, margin: float = MARGIN) -> float:
    """p of two one-sided tests (Schuirmann 1987): small when the difference lies within +-``margin``.

    The larger of the two one-sided p; it is below 0.05 where the 90 % interval lies within the margin.
    """
    if not se > 0:
        return math.nan if math.isnan(se) else float(abs(difference) >= margin)
    t = need("scipy.stats", "book").t
    return float(max(t.sf((margin + difference) / se, df), t.sf((margin - difference) / se, df)))


def holm(p) -> np.ndarray:
    """p-values [n] adjusted by Holm's step-down method; NaN stays NaN and does not count."""
    p = np.asarray(p, dtype=float)
    out, order = np.full(len(p), math.nan), np.argsort(p, kind="stable")[:np.count_nonzero(~np.isnan(p))]   # NaN last
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return out


# -- differences to a reference ----------------------------------------------------------------------------------------

def contrasts(rows: pd.DataFrame, reference: str = FULL, *, margin: float = MARGIN, level: float = 0.95,
              sources: str = "all") -> pd.DataFrame:
    """Test AUC of every method at every budget minus the reference's, paired by seed: one line each, :data:`CONTRAST`.

    Rows of several learning rates are first reduced to the one chosen on validation (:func:`best_by_validation`). A
    reference of one budget (Full) stands beside every budget, another one beside its own at the same budget.

    * ``difference``, ``sd``: mean and standard deviation over ``seeds``; ``half``, ``low``, ``high``: its t-interval at
      ``level`` over seeds, for these very test rows.
    * ``rows_se``: standard error from the test rows, where the logits of all paired runs are at hand, or
      ``results/contrasts.csv`` holds it for the very same runs; ``total_low``, ``total_high``: the interval with both
      sources (formula in the module's docstring). Intervals are not adjusted for the number of methods.
    * ``p_difference`` (two-sided) and ``p_equivalence`` (two one-sided tests at ``margin``) use ``se`` with ``df``
      degrees of freedom: both ``sources`` where ``rows_se`` is there, seeds alone otherwise or with
      ``sources="seeds"``. ``sources`` says which: ``seeds+rows`` or ``seeds``.
    * ``p_difference_holm`` and ``p_equivalence_holm``: either kind adjusted by Holm over the methods of one data set,
      model, dimension and budget; the unadjusted are beside them.
    * ``verdict`` at 5 % of the adjusted p-values: ``equivalent`` (also where the difference is not zero but within the
      margin), ``better``, ``worse``, ``undecided``; empty where the method did not finish, ``status`` says why.

    Below two common seeds everything but ``difference`` and ``rows_se`` is NaN and the verdict ``undecided``.
    Raises CellError for an unknown ``sources`` or a ``margin`` or ``level`` out of range.
    """
    known("sources", sources, SOURCES)
    if not margin > 0:
        raise CellError(f"margin {margin!r}: expected a difference of AUC above 0, as {MARGIN}")
    if not 0 < level < 1:
        raise CellError(f"level {level!r}: expected between 0 and 1, as 0.95")
    rows = best_by_validation(by_spec(rows)) if len(rows) else rows
    published, lines = _published_errors(), []
    for place, block in rows.groupby(_PLACE, sort=False):
        ok = block["status"].eq("ok") & block["auc"].notna()
        one = block.loc[ok & block["method"].eq(reference), "budget"].nunique(dropna=False) == 1
        test = _TestRows()
        of_reference = {(0 if one else _key(r["budget"]), r["seed"]): r
                        for r in block[ok & block["method"].eq(reference)].to_dict("records")}
        for (method, budget), group in block[block["method"].ne(reference)].groupby(["method", "budget"], sort=False,
                                                                                    dropna=False):
            done = group[ok[group.index]].to_dict("records")
            pairs = [(r, other) for r in done
                     if (other := of_reference.get((0 if one else _key(budget), r["seed"]))) is not None]
            line = dict(zip(_PLACE, place)) | dict(
                method=method, family=group["family"].iloc[0], budget=budget, reference=reference,
                status="ok" if done else group["status"].iloc[0], margin=margin, sources="", verdict="", pairs="")
            lines.append(line | (_difference(pairs, test, published, level, margin, sources) if pairs else
                                 dict(seeds=0, verdict="undecided" if done else "")))
    table = pd.DataFrame(lines, columns=CONTRAST)
    for name in ("p_difference", "p_equivalence"):
        adjusted = table.groupby([*_PLACE, "budget"], dropna=False)[name].transform(holm) if len(table) else []
        table[f"{name}_holm"] = np.asarray(adjusted, dtype=float)
    differs, same = table["p_difference_holm"].lt(0.05), table["p_equivalence_holm"].lt(0.05)
    told = table["seeds"].gt(0)
    table.loc[told, "verdict"] = np.select(
        [same, differs & table["difference"].gt(0), differs], ["equivalent", "better", "worse"], "undecided")[told]
    return table


def _key(budget) -> float:
    return -1.0 if pd.isna(budget) else float(f"{budget:.9g}")


def _difference(pairs, test: _TestRows, published: dict, level: float, margin: float, sources: str) -> dict:
    """The measured part of a line, from the paired rows (method, reference) of one method at one budget."""
    gaps = np.array([a["auc"] - b["auc"] for a, b in pairs])
    n, mean = len(gaps), float(gaps.mean())
    sd = float(gaps.std(ddof=1)) if n > 1 else math.nan
    if sd < 1e-12:
        sd = 0.0                                             # equal up to the rounding of a sum
    ids = hash_of_pairs(pairs)
    rows_se = _error_of_rows(pairs, test, mean)
    if math.isnan(rows_se) and ids in published and abs(published[ids][0] - mean) < 3e-6:
        rows_se = published[ids][1]
    line = dict(seeds=n, difference=mean, sd=sd, rows_se=rows_se, pairs=ids)
    if n < 2:
        return line
    t = need("scipy.stats", "book").t
    of_seeds = sd / math.sqrt(n)
    half = float(t.ppf(0.5 + level / 2, n - 1)) * of_seeds
    line |= dict(half=half, low=mean - half, high=mean + half)
    se, df = combined(of_seeds, rows_se, n)
    if not math.isnan(se):
        reach = float(t.ppf(0.5 + level / 2, df)) * se
        line |= dict(total_low=mean - reach, total_high=mean + reach)
    both = sources == "all" and not math.isnan(se)
    if not both:
        se, df = of_seeds, n - 1.0
    return line | dict(se=se, df=df, sources="seeds+rows" if both else "seeds", p_difference=two_sided(mean, se, df),
                       p_equivalence=equivalence(mean, se, df, margin))


def combined(seeds_se: float, rows_se: float, seeds: int) -> tuple[float, float]:
    """Standard error of both sources and its degrees of freedom (Satterthwaite), from those of either; NaN if one is.
    """
    se = math.hypot(seeds_se, rows_se)
    if math.isnan(se):
        return math.nan, math.nan
    return se, (seeds - 1) * (se / seeds_se) ** 4 if seeds_se > 0 else math.inf


def hash_of_pairs(pairs) -> str:
    """16 hexadecimal digits that name the very runs of a difference, whatever their order."""
    text = ",".join(sorted(f"{a['run_id']}-{b['run_id']}" for a, b in pairs))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _error_of_rows(pairs, test: _TestRows, mean: float) -> float:
    """DeLong's standard error of the seed-averaged difference; NaN unless all logits are there and are of these runs.
    """
    found = test.paired(pairs)
    # rows keep six digits of AUC; logits that say another difference are of another run
    return found.se if found is not None and abs(found.difference - mean) < 3e-6 else math.nan


class _TestRows:
    """Labels and structural components of the test rows of one block (data set, model, dimension)."""

    def __init__(self):
        self.labels, self.kept = {}, {}

    def label(self, row: dict) -> np.ndarray | None:
        key = (row["dataset"], row["data_fingerprint"])
        if key not in self.labels:
            self.labels[key] = _test_labels(*key)
        return self.labels[key]

    def components(self, row: dict, keep: bool) -> np.ndarray | None:
        """Of one run; those of the reference are kept, because every method is compared with them."""
        if (id := row["run_id"]) in self.kept:
            return self.kept[id]
        found = test_logits(row, self.label(row))
        found = None if found is None else components(*found)
        if keep:
            self.kept[id] = found
        return found

    def paired(self, pairs) -> Paired | None:
        """As :func:`ecstudy.measure.delong_paired` over the seeds of ``pairs``; None where logits are missing."""
        total = 0
        for a, b in pairs:
            ours, other = self.components(a, keep=False), self.components(b, keep=True)
            if ours is None or other is None or len(ours) != len(other):
                return None
            total = total + (ours - other)
        label = self.label(pairs[0][0])
        return None if min(label.sum(), (~label).sum()) < 2 else paired(label, total / len(pairs))


def test_logits(row, label=None) -> tuple[np.ndarray, np.ndarray] | None:
    """Labels bool [N] and logits float32 [N] of the test rows of a run (a row of results), for paired comparisons.

    None where no logits were kept, the data is not at hand or is not the data of the run (fingerprint), or the logits
    do not give the row's AUC to six digits. ``label`` are the test labels where known.
    """
    logit = store.logits(row["run_id"])
    if logit is None:
        return None
    if label is None:
        label = _test_labels(row["dataset"], row["data_fingerprint"])
    if label is None or len(label) != len(logit):
        return None
    return (label, logit) if abs(auc(label, logit) - row["auc"]) < 2e-6 else None


def _test_labels(dataset: str, fingerprint: str) -> np.ndarray | None:
    from ..data import DataError, open_dataset

    try:
        data = open_dataset(dataset)
    except (DataError, OSError):
        return None
    return np.asarray(data.split("test").label) == 1 if data.fingerprint == fingerprint else None


test_logits.__test__ = False             # a function about test rows, no test


# -- published differences ---------------------------------------------------------------------------------------------

_WHOLE = ("dim", "seeds")
_DIGITS = dict(budget=15, rows_se=17)           # what is read again, so that publishing twice writes the same
_TEXT = ("dataset", "model", "method", "family", "reference", "status", "sources", "verdict", "pairs")


def publish_contrasts(section: str | None = None, path: str | Path | None = None, **options) -> Path:
    """Write the differences of a section's rows (default: ``results/contrasts.csv``), beside those of other cells.

    The file brings the error from test rows to where logits are not: :func:`contrasts` finds it there by the ids of the
    very runs compared. ``options`` are those of :func:`contrasts`. Raises CellError if nothing can be compared.
    """
    path = Path(path) if path is not None else paths.results() / "contrasts.csv"
    rows = store.results(section)
    table = contrasts(rows[rows["task"].isin(["ctr", ""])], **options)
    table = table[table["seeds"].gt(0)]
    if table.empty:
        raise CellError(f"section {section!r}: no method and reference with a seed in common; nothing to publish")
    before = read_contrasts(path) if path.is_file() else pd.DataFrame(columns=CONTRAST)
    keys = [*_PLACE, "method", "budget", "reference"]
    both = pd.concat([part for part in (before, table) if len(part)]).drop_duplicates(keys, keep="last")
    both = both.sort_values(keys, ascending=[k != "budget" for k in keys], ignore_index=True)
    with store._whole(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CONTRAST)
        for line in both.to_dict("records"):
            writer.writerow([line[c] if c in _TEXT else int(line[c]) if c in _WHOLE else
                             "" if pd.isna(line[c]) else f"{line[c]:.{_DIGITS.get(c, 6)}g}" for c in CONTRAST])
    return path


def read_contrasts(path: str | Path) -> pd.DataFrame:
    """A published table of :func:`contrasts`. Raises CellError naming the file if it is another kind of table."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != CONTRAST:
            raise CellError(f"{path}: not a table of contrasts; expected the columns {', '.join(CONTRAST)}")
        try:
            lines = [{c: v if c in _TEXT else int(v) if c in _WHOLE else float(v or "nan") for c, v in line.items()}
                     for line in reader]
        except (TypeError, ValueError) as error:
            raise CellError(f"{path}, line {reader.line_num}: {error}") from None
    return pd.DataFrame(lines, columns=CONTRAST)


def _published_errors() -> dict[str, tuple[float, float]]:
    """Difference and error from test rows by the ids of the runs, from ``results/contrasts.csv``."""
    path = paths.results() / "contrasts.csv"
    if not path.is_file():
        return {}
    table = read_contrasts(path).dropna(subset="rows_se")
    return {p: (d, e) for p, d, e in zip(table["pairs"], table["difference"], table["rows_se"])}


# -- ranks over blocks -------------------------------------------------------------------------------------------------

class TooFew(ValueError):
    """Too few blocks, methods or seeds for the statistic; the message says how many there are and are needed."""


class Ranks(NamedTuple):
    """Average ranks over blocks.

    ``average``: Series method -> mean rank (1 is best), rising. ``auc``: DataFrame [blocks, methods]. ``statistic``,
    ``p``: Friedman's chi-square. ``critical``: Nemenyi's critical difference of two average ranks at ``level``.
    ``left_out``: methods that did not reach every block.
    """

    average: pd.Series
    auc: pd.DataFrame
    statistic: float
    p: float
    critical: float
    level: float
    left_out: tuple[str, ...]


def ranks(rows: pd.DataFrame, *, level: float = 0.05, fewest: int = FEWEST_BLOCKS) -> Ranks:
    """Friedman's test and Nemenyi's critical difference over blocks: every data set, model, dimension and budget.

    A block's value is the mean test AUC over seeds; ties share the mean rank. Full, which has no budget, is not
    ranked, and methods that lack a block are left out (and named). Source: Demsar, JMLR 7 (2006). Budgets of one data
    set are not independent samples of data sets: p tells that ranks agree over the blocks at hand, not over data.

    Raises
    ------
    TooFew
        For fewer than ``fewest`` blocks (six) or fewer than three methods that reached all of them.
    """
    rows = best_by_validation(by_spec(rows)) if len(rows) else rows
    rows = rows[rows["method"].ne(FULL) & rows["model"].ne("none")] if len(rows) else rows
    blocks = rows.groupby([*_PLACE, "budget"], sort=False)
    shared = blocks["method"].transform("nunique").gt(1) if len(rows) else []    # a size that one method has alone
    rows = rows[shared] if len(rows) else rows
    count = rows.groupby([*_PLACE, "budget"]).ngroups if len(rows) else 0
    if count < fewest:
        raise TooFew(f"{count} block{'s' * (count != 1)} (data set x model x dimension x budget), needed are at least "
                     f"{fewest}: with fewer, Friedman's test and critical differences mean little")
    table = rows[rows["status"].eq("ok")].pivot_table(index=[*_PLACE, "budget"], columns="method", values="auc")
    table = table.reindex(rows[[*_PLACE, "budget"]].drop_duplicates().apply(tuple, axis=1))
    table.index.names = [*_PLACE, "budget"]
    whole = table.dropna(axis=1)
    left_out = tuple(m for m in dict.fromkeys(rows["method"]) if m not in whole)
    if whole.shape[1] < 3:
        raise TooFew(f"{whole.shape[1]} methods reached all {count} blocks, needed are at least three")
    stats = need("scipy.stats", "book")
    average = whole.rank(axis=1, ascending=False).mean().sort_values(kind="stable")
    if (whole.nunique(axis=1) == 1).all():
        statistic, p = 0.0, 1.0                              # all methods alike in every block
    else:
        statistic, p = stats.friedmanchisquare(*(whole[m].round(12) for m in whole))
    k = whole.shape[1]
    critical = stats.studentized_range.ppf(1 - level, k, np.inf) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * count))
    return Ranks(average, whole, float(statistic), float(p), float(critical), level, left_out)


def kendall(rows_a: pd.DataFrame, rows_b: pd.DataFrame, *, level: float = 0.95, draws: int = 2000,
            seed: int = 0) -> pd.DataFrame:
    """Do two settings (models, say) rank the methods alike? Kendall's tau-b per budget, and its mean over budgets.

    Returns ``budget methods seeds_a seeds_b tau low high p``, the last line being the mean, with NaN as budget. A
    method's value is its mean test AUC over the seeds that all compared methods have; a method with a single seed is
    left out where others have more (``methods`` counts those compared). ``low``, ``high`` is the
    percentile interval of ``draws`` resamplings of seeds, within either setting and alike for all methods of it; it
    says how far seeds decide the agreement, not other data. With few seeds it is narrow at best: three seeds have ten
    resamplings that differ. NaN below two seeds. ``p`` is scipy's, of no association. Full is not ranked.

    Raises TooFew if fewer than three methods finished at a common budget in both settings.
    """
    tables = [_by_seed(rows) for rows in (rows_a, rows_b)]
    random, lines, means = np.random.default_rng(seed), [], []
    for budget in sorted(set(tables[0]) & set(tables[1]), reverse=True):
        own = [_repeated(table[budget]) for table in tables]
        methods = [m for m in own[0] if m in own[1]]
        if len(methods) < 3:
            continue
        pair = [_common(table[methods]) for table in own]
        point = need("scipy.stats", "book").kendalltau(pair[0].mean(axis=0), pair[1].mean(axis=0))
        line = dict(budget=budget, methods=len(methods), seeds_a=len(pair[0]), seeds_b=len(pair[1]),
                    tau=float(point.statistic), p=float(point.pvalue))
        if min(len(own) for own in pair) > 1:
            drawn = [random.multinomial(len(x), np.full(len(x), 1 / len(x)), size=draws) @ x / len(x) for x in pair]
            means.append(tau_b(*drawn))
            line["low"], line["high"] = np.nanquantile(means[-1], [(1 - level) / 2, (1 + level) / 2])
        lines.append(line)
    if not lines:
        raise TooFew("no budget at which three methods finished in both settings; nothing to compare")
    last = dict(budget=math.nan, methods=max(li["methods"] for li in lines), seeds_a=min(li["seeds_a"] for li in lines),
                seeds_b=min(li["seeds_b"] for li in lines), tau=float(np.mean([li["tau"] for li in lines])))
    if len(means) == len(lines):
        last["low"], last["high"] = np.nanquantile(np.mean(means, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return pd.DataFrame([*lines, last], columns=["budget", "methods", "seeds_a", "seeds_b", "tau", "low", "high", "p"])


def tau_b(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row: a, b [R, M] -> [R]; NaN where a row is constant."""
    i, j = np.triu_indices(a.shape[1], 1)
    a, b = np.sign(a[:, i] - a[:, j]), np.sign(b[:, i] - b[:, j])
    scale = np.sqrt((a != 0).sum(axis=1) * (b != 0).sum(axis=1, dtype=float))
    return np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def _by_seed(rows: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """``{budget: DataFrame [seeds, methods]}`` of test AUC, Full left out."""
    rows = best_by_validation(by_spec(rows)) if len(rows) else frame([])
    for column in _PLACE:
        if rows[column].nunique() > 1:
            raise CellError(f"rows of several {column}s {sorted(rows[column].unique())}: a setting has one")
    rows = rows[rows["status"].eq("ok") & rows["method"].ne(FULL)]
    return {_key(budget): group.pivot_table(index="seed", columns="method", values="auc")
            for budget, group in rows.groupby("budget")}


def _repeated(table: pd.DataFrame) -> pd.DataFrame:
    """Without the methods of a single seed, unless all have one."""
    several = table.notna().sum().gt(1)
    return table.loc[:, several] if several.any() else table


def _common(table: pd.DataFrame) -> np.ndarray:
    """Values [seeds, methods] at the seeds that all methods have; where there is none, their means as one row."""
    whole = table.dropna()
    return whole.to_numpy() if len(whole) else table.mean().to_numpy()[None]
