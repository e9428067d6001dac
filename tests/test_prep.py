"""Raw logs to the layout: against a plain pandas reference, every option, and every way it can go wrong."""
from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pl = pytest.importorskip("polars")

from ecstudy import paths  # noqa: E402
from ecstudy.data.cardinalities import FIELDS  # noqa: E402
from ecstudy.data.layout import DataError, Dataset  # noqa: E402
from ecstudy.data.prepare import avazu_split, criteo_split, fraction_split, prepare_avazu, prepare_criteo, prepare_table  # noqa: E402

SHARED = Path(os.environ.get("ECSTUDY_SHARED", paths.root().parent / "shared")) / "data" / "ctr"
CRITEO = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def criteo_frame(rows: int, seed: int = 0) -> pd.DataFrame:
    """Criteo-like text columns: skewed hexadecimal values, negative and missing numbers, missing values."""
    random = np.random.default_rng(seed)
    frame = {"label": (random.random(rows) < 0.3).astype(int).astype(str)}
    for i in range(1, 14):
        values = random.integers(-3, 500, rows).astype(str).astype(object)
        frame[f"I{i}"] = np.where(random.random(rows) < 0.2, "", values)
    for i in range(1, 27):
        values = np.array([f"{(7919 * k * i) % 2**32:08x}" for k in random.zipf(1.5, rows) % (5 * i)], object)
        frame[f"C{i}"] = np.where(random.random(rows) < (0.2 if i % 3 == 0 else 0), "", values)
    return pd.DataFrame(frame)


def write_criteo(path: Path, frame: pd.DataFrame) -> Path:
    frame.to_csv(path, sep="\t", header=False, index=False, lineterminator="\n")
    return path


def encode(column: pd.Series) -> np.ndarray:
    """The paper's LabelEncoder: positions in the sorted distinct strings."""
    values = column.replace("", "0").tolist()
    order = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([order[value] for value in values])


def read(dataset: Dataset) -> dict[str, tuple]:
    return {name: tuple(map(np.asarray, (lambda s: (s.ids, s.dense, s.label))(dataset.split(name))))
            for name in ("train", "valid", "test")}


def in_file_order(dataset: Dataset) -> tuple:
    """ids, dense, label of a data set whose splits follow each other: train, test, valid (the paper)."""
    parts = read(dataset)
    return tuple(np.concatenate([parts[s][i] for s in ("train", "test", "valid")]) for i in range(3))


@pytest.fixture
def raw(tmp_path):
    return write_criteo(tmp_path / "train.txt", criteo_frame(700))


def nothing_beside(folder: Path, *allowed: str) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(allowed)


# ---------------------------------------------------------------- splits


def test_criteo_split_gives_the_papers_rows():
    counts = np.bincount(criteo_split(45_840_617), minlength=3)
    assert counts.tolist() == [39_291_958, 3_274_329, 3_274_330]        # train, valid, test


@pytest.mark.parametrize("rows", [14, 15, 20, 21, 1000, 137_139])
def test_criteo_split_is_train_then_test_then_valid(rows):
    splits = criteo_split(rows)
    assert splits.tolist() == sorted(splits, key={0: 0, 2: 1, 1: 2}.get)
    train, valid, test = np.bincount(splits, minlength=3)
    assert train == math.ceil(6 * rows / 7) and test - valid in (0, 1)


def test_avazu_split_gives_the_papers_rows():
    last, rows = 4_218_938, 40_428_967
    hours = np.full(rows, 14102923, np.int64)
    hours[-last:] = 14103000
    hours[-1000:] = 14103023
    splits = avazu_split(rows, hours)
    assert np.bincount(splits).tolist() == [36_210_029, 2_109_469, 2_109_469]
    assert (splits[-last:-last // 2] == 2).all() and (splits[-last // 2:] == 1).all()


def test_random_split_is_seeded_and_exact():
    a, b, c = (fraction_split(1000, (0.8, 0.1, 0.1), seed) for seed in (1, 1, 2))
    assert np.bincount(a).tolist() == [800, 100, 100]
    assert (a == b).all() and (a != c).any()
    assert fraction_split(10, (0.5, 0.3, 0.2)).tolist() == [0] * 5 + [1] * 3 + [2] * 2


# ---------------------------------------------------------------- criteo against the reference


def test_criteo_equals_the_reference(tmp_path, raw):
    frame = criteo_frame(700)
    dataset = prepare_criteo(raw, tmp_path / "out", name="tiny")
    ids, dense, label = in_file_order(dataset)
    assert dataset.rows == {"train": 600, "valid": 50, "test": 50} and dataset.name == "tiny"
    for field in range(26):
        expected = encode(frame[f"C{field + 1}"])
        assert (ids[:, field] == expected).all()
        assert dataset.cardinalities[field] == expected.max() + 1
    numbers = frame[CRITEO[1:14]].apply(pd.to_numeric).fillna(0).to_numpy()
    expected = np.where(numbers > 0, np.log(np.maximum(numbers, 0) + 1), 0)
    assert dense.dtype == np.float32 and np.allclose(dense, expected, rtol=1e-6)
    assert (label == frame["label"].astype(int)).all()
    counts = np.concatenate([np.bincount(ids[:600, f], minlength=c) for f, c in enumerate(dataset.cardinalities)])
    assert (dataset.counts == counts).all()
    source = dataset.meta["source"]
    assert source["sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()
    assert source["bytes"] == raw.stat().st_size and source["file"] == "train.txt"
    assert source["rows_read"] == 700 and source["rows_rejected"] == 0 and source["reserved"] is None
    nothing_beside(tmp_path, "out", "train.txt")


@pytest.mark.parametrize("chunk_rows", [40, 333])
def test_chunk_size_does_not_change_the_result(tmp_path, raw, chunk_rows):
    options = dict(vocab="train", min_count=2)
    expected = prepare_criteo(raw, tmp_path / "a", **options).fingerprint
    assert prepare_criteo(raw, tmp_path / "b", chunk_rows=chunk_rows, **options).fingerprint == expected


def test_gzip_crlf_and_a_missing_last_newline_change_nothing(tmp_path, raw):
    expected = prepare_criteo(raw, tmp_path / "plain").fingerprint
    text = raw.read_bytes()
    variants = {"zip": gzip.compress(text), "members": gzip.compress(text[:5000]) + gzip.compress(text[5000:]),
                "crlf": text.replace(b"\n", b"\r\n"), "end": text[:-1], "blank": text + b"\n\n"}
    for name, data in variants.items():
        (tmp_path / name).write_bytes(data)
        dataset = prepare_criteo(tmp_path / name, tmp_path / f"out-{name}", max_bad=0, chunk_rows=200)
        assert dataset.fingerprint == expected, name
        assert dataset.meta["source"]["sha256"] == hashlib.sha256(data).hexdigest(), name


def test_vocab_train_sends_unseen_values_to_the_reserved_id(tmp_path, raw):
    frame = criteo_frame(700).replace("", "0")
    dataset = prepare_criteo(raw, tmp_path / "out", vocab="train")
    ids = in_file_order(dataset)[0]
    unseen = 0
    for field in range(26):
        column = frame[f"C{field + 1}"]
        known = sorted(set(column[:600]))
        expected = [known.index(value) + 1 if value in known else 0 for value in column]
        assert ids[:, field].tolist() == expected
        assert dataset.cardinalities[field] == len(known) + 1
        unseen += expected.count(0)
    assert unseen > 0 and (ids[:600] > 0).all()
    assert dataset.meta["source"]["reserved"]["id"] == 0 and dataset.meta["source"]["vocab"] == "train"


@pytest.mark.parametrize("vocab, rows", [("all", 700), ("train", 600)])
def test_min_count_counts_in_the_rows_of_the_vocabulary(tmp_path, raw, vocab, rows):
    frame = criteo_frame(700).replace("", "0")
    dataset = prepare_criteo(raw, tmp_path / "out", vocab=vocab, min_count=5)
    ids = in_file_order(dataset)[0]
    for field in range(26):
        column = frame[f"C{field + 1}"]
        counts = column[:rows].value_counts()
        known = sorted(counts.index[counts >= 5])
        assert ids[:, field].tolist() == [known.index(value) + 1 if value in known else 0 for value in column]
        assert dataset.cardinalities[field] == len(known) + 1


def test_a_field_whose_values_are_all_rare_keeps_only_the_reserved_id(tmp_path):
    frame = criteo_frame(70)
    frame["C5"] = [f"{i:08x}" for i in range(70)]
    dataset = prepare_criteo(write_criteo(tmp_path / "raw", frame), tmp_path / "out", min_count=2)
    assert dataset.cardinalities[4] == 1 and (in_file_order(dataset)[0][:, 4] == 0).all()


def test_criteo_other_splits(tmp_path, raw):
    ids = in_file_order(prepare_criteo(raw, tmp_path / "paper"))[0]
    parts = read(prepare_criteo(raw, tmp_path / "c", split="chronological", fractions=(0.5, 0.2, 0.3)))
    assert (np.concatenate([parts[s][0] for s in ("train", "valid", "test")]) == ids).all()
    assert [len(parts[s][0]) for s in ("train", "valid", "test")] == [350, 140, 210]
    parts = read(prepare_criteo(raw, tmp_path / "r", split="random", seed=3))
    splits = fraction_split(700, (0.8, 0.1, 0.1), 3)
    for code, name in enumerate(("train", "valid", "test")):
        assert (parts[name][0] == ids[splits == code]).all()            # file order within a split


# ---------------------------------------------------------------- malformed rows


BAD = {
    3: (lambda c: c[:20], "20 columns, expected 40"),
    5: (lambda c: [*c, "x"], "41 columns, expected 40"),
    8: (lambda c: ["2", *c[1:]], "label = '2', expected 0 or 1"),
    9: (lambda c: ["", *c[1:]], "label = missing, expected 0 or 1"),
    11: (lambda c: [c[0], "abc", *c[2:]], "I1 = 'abc', expected a number"),
    12: (lambda c: [*c[:13], "inf", *c[14:]], "I13 = 'inf', expected a number"),
    13: (lambda c: [*c[:-1], "a\0b"], "a NUL byte"),
    699: (lambda c: [*c[:-1], "\udcff\udcfe"], "bytes that are not UTF-8"),
}


@pytest.mark.parametrize("chunk_rows", [30, 100_000])
def test_malformed_rows_are_skipped_and_reported_with_line_numbers(tmp_path, raw, chunk_rows):
    lines = raw.read_text().splitlines()
    good = [line for number, line in enumerate(lines, 1) if number not in BAD]
    (tmp_path / "good").write_text("\n".join(good) + "\n")
    for number, (spoil, _) in BAD.items():
        lines[number - 1] = "\t".join(spoil(lines[number - 1].split("\t")))
    lines.insert(1, "")                                                # an empty line is no row but a line
    raw.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=r"8 of 700 rows \(1.14%\) are malformed: line 4: 20 columns"):
        dataset = prepare_criteo(raw, tmp_path / "out", max_bad=0.02, chunk_rows=chunk_rows)
    assert dataset.fingerprint == prepare_criteo(tmp_path / "good", tmp_path / "expected").fingerprint
    source = dataset.meta["source"]
    assert source["rows_read"] == 700 and source["rows_rejected"] == 8
    assert source["rejected_first"] == [dict(line=n + 1, reason=reason) for n, (_, reason) in BAD.items()]
    with pytest.raises(DataError, match=r"8 of 700 rows.*line 4: .*At most 1.00%.*--max-bad"):
        prepare_criteo(raw, tmp_path / "strict", max_bad=0.01)
    nothing_beside(tmp_path, "train.txt", "good", "out", "expected")


def test_text_stays_as_it_is(tmp_path):
    """Quotes, spaces, commas and non-ASCII letters are ordinary characters of a Criteo value."""
    frame = criteo_frame(70)
    values = ['"a', 'b"c"', " x", "x ", "é", "ÿ", "a,b", "'", "Ａ", "x"]
    frame["C1"] = [values[i % 10] for i in range(70)]
    raw = tmp_path / "raw"
    raw.write_text("".join("\t".join(row) + "\n" for row in frame.astype(str).to_numpy()), encoding="utf-8")
    dataset = prepare_criteo(raw, tmp_path / "out", max_bad=0)
    assert (in_file_order(dataset)[0][:, 0] == encode(frame["C1"])).all() and dataset.cardinalities[0] == 10


# ---------------------------------------------------------------- errors leave nothing behind


def spoiled(raw: Path, kind: str) -> Path:
    data = raw.read_bytes()
    zipped = gzip.compress(data)
    path = raw.with_name("raw")
    if kind not in ("absent", "folder"):
        path.write_bytes({
            "empty": b"", "headers only": b"\n\n", "csv": data.replace(b"\t", b","), "few": data[:data.find(b"\n") + 1],
            "truncated gzip": zipped[:len(zipped) // 2], "damaged gzip": zipped[:2000] + b"?" * 50 + zipped[2050:],
            "zip": b"PK\x03\x04" + zipped, "tar": b"\0" * 257 + b"ustar" + b"\0" * 250,
            "no number": data.replace(b"\t", b"\tx", 1000), "binary": np.random.default_rng(0).bytes(100_000),
        }[kind])
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind, message", [
    ("absent", "does not exist"), ("folder", "is a folder"), ("empty", "is empty"), ("headers only", "no rows"),
    ("csv", "have not 40 columns separated by '.t' but mostly 1;"), ("few", "1 rows leave the valid split empty"),
    ("truncated gzip", "damaged or incomplete"), ("damaged gzip", "damaged or incomplete"),
    ("zip", "is an archive"), ("tar", "is an archive"), ("no number", "malformed.*I1 = 'x"), ("binary", "40 columns"),
])
def test_unusable_files(tmp_path, raw, kind, message):
    path = spoiled(raw, kind)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DataError, match=message) as error:
        prepare_criteo(path, tmp_path / "new" / "out", chunk_rows=50)
    assert len(str(error.value).splitlines()) == 1 and "raw" in str(error.value)
    nothing_beside(tmp_path, *before)


@pytest.mark.parametrize("options, message", [
    (dict(vocab="test"), "vocab 'test', expected 'all' or 'train'"), (dict(min_count=0), "min_count 0"),
    (dict(max_bad=2), "max_bad 2"), (dict(chunk_rows=0), "chunk_rows 0"), (dict(split="half"), "split 'half'"),
    (dict(split="random", fractions=(0.5, 0.5, 0.5)), "sum to 1"), (dict(fractions=(0.5, 0.5)), "three shares"),
])
def test_bad_options_are_named_before_work_starts(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        prepare_criteo(tmp_path / "absent", tmp_path / "out", **options)


def test_an_existing_folder_is_replaced_only_on_request(tmp_path, raw):
    first = prepare_criteo(raw, tmp_path / "out")
    with pytest.raises(DataError, match="exists.*--overwrite"):
        prepare_criteo(raw, tmp_path / "out")
    again = prepare_criteo(raw, tmp_path / "out", vocab="train", overwrite=True)
    assert again.fingerprint != first.fingerprint == Dataset.open(
        prepare_criteo(raw, tmp_path / "copy").folder).fingerprint
    with pytest.raises(DataError, match="malformed"):                   # a failure keeps the old folder
        prepare_criteo(spoiled(raw, "no number"), tmp_path / "out", overwrite=True)
    assert Dataset.open(tmp_path / "out").fingerprint == again.fingerprint
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="not a prepared data set"):
        prepare_criteo(raw, tmp_path / "mine", overwrite=True)
    inside = tmp_path / "out" / "train.txt"
    inside.write_bytes(raw.read_bytes())
    with pytest.raises(DataError, match="lies in"):
        prepare_criteo(inside, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("limit, fails", [(1000, True), (15_000, True), (62_000, True), (63_000, False)])
def test_a_full_disk_is_one_clear_error(tmp_path, raw, limit, fails):
    """A limit on the size of a file acts like a full disk: while reading, and while rows are written (62,528 bytes)."""
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        prepare_criteo(raw, tmp_path / "out", chunk_rows=100)
        message = ""
    except DataError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert message.startswith("no room left on the disk") == fails, message
    nothing_beside(tmp_path, "train.txt", *([] if fails else ["out"]))


def test_an_interruption_leaves_nothing_behind(tmp_path, raw):
    for stop in ("read", "encode", "write"):
        def interrupt(stage, fraction):
            if stage == stop and fraction > 0.3:
                raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            prepare_criteo(raw, tmp_path / "deep" / "out", progress=interrupt, chunk_rows=50)
        nothing_beside(tmp_path, "train.txt")


# ---------------------------------------------------------------- progress


def test_progress_is_quiet_unless_asked(tmp_path, raw, capfd):
    prepare_criteo(raw, tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    prepare_criteo(raw, tmp_path / "b", progress=True)
    shown = capfd.readouterr().err
    assert all(stage in shown for stage in ("read", "encode", "write")) and "100%" in shown
    seen = []
    prepare_criteo(raw, tmp_path / "c", progress=lambda *report: seen.append(report), chunk_rows=50)
    assert list(dict.fromkeys(stage for stage, _ in seen)) == ["read", "encode", "write"]
    assert all(0 <= fraction <= 1 for _, fraction in seen) and seen[-1] == ("write", 1.0)


# ---------------------------------------------------------------- avazu


def write_avazu(path: Path, rows: int = 480, days: int = 4) -> pd.DataFrame:
    random = np.random.default_rng(1)
    frame = {"id": [str(10**18 + i) for i in range(rows)], "click": random.integers(0, 2, rows).astype(str),
             "hour": [f"1410{21 + i * days // rows:02d}{(i * 24 * days // rows) % 24:02d}" for i in range(rows)]}
    for name in FIELDS["avazu"][0][1:]:
        frame[name] = [f"{v:x}" for v in random.zipf(1.6, rows) % 50]
    frame = pd.DataFrame(frame)
    frame.to_csv(path, index=False)
    return frame


def test_avazu_equals_the_reference(tmp_path):
    frame = write_avazu(tmp_path / "train.csv")
    dataset = prepare_avazu(tmp_path / "train.csv", tmp_path / "out")
    assert dataset.fields == list(FIELDS["avazu"][0]) and dataset.dense == []
    assert dataset.rows == {"train": 360, "valid": 60, "test": 60}
    ids, dense, label = in_file_order(dataset)
    assert (ids == np.stack([encode(frame[f]) for f in dataset.fields], axis=1)).all() and dense.shape == (480, 0)
    assert (label == frame["click"].astype(int)).all()
    hours = dataset.cardinalities[0]
    assert hours == 96 and (dataset.counts[72:hours] == 0).all()        # the last day's hours: never trained


def test_avazu_last_day_need_not_be_contiguous(tmp_path):
    frame = write_avazu(tmp_path / "train.csv").sample(frac=1, random_state=0)
    frame.to_csv(tmp_path / "shuffled.csv", index=False)
    parts = read(prepare_avazu(tmp_path / "shuffled.csv", tmp_path / "out"))
    expected = encode(frame["hour"])
    last = np.flatnonzero(frame["hour"].str[:6] == "141024")
    assert (parts["test"][0][:, 0] == expected[last[:60]]).all()
    assert (parts["valid"][0][:, 0] == expected[last[60:]]).all()
    assert (parts["train"][0][:, 0] == np.delete(expected, last)).all()


def test_avazu_hour_can_be_split(tmp_path):
    frame = write_avazu(tmp_path / "train.csv")
    dataset = prepare_avazu(tmp_path / "train.csv", tmp_path / "out", split_hour=True)
    assert dataset.fields == ["day", "hour_of_day", *FIELDS["avazu"][0][1:]]
    ids = in_file_order(dataset)[0]
    assert (ids[:, 0] == encode(frame["hour"].str[:6])).all() and (ids[:, 1] == encode(frame["hour"].str[6:])).all()
    assert dataset.cardinalities[:2] == [4, 24]


def test_avazu_errors(tmp_path):
    frame = write_avazu(tmp_path / "raw.csv")
    cases = {
        "no column 'click'": frame.drop(columns="click"), "hour = '2014', expected YYMMDDHH": frame.assign(hour="2014"),
        "of more than one day": frame.assign(hour="14102100"),
        "header names 'C1' twice": frame.rename(columns={"id": "C1"}),
    }
    for message, wrong in cases.items():
        wrong.to_csv(tmp_path / "wrong.csv", index=False)
        with pytest.raises(DataError, match=message):
            prepare_avazu(tmp_path / "wrong.csv", tmp_path / "out")
    nothing_beside(tmp_path, "raw.csv", "wrong.csv")


# ---------------------------------------------------------------- tables


def own_table(rows: int = 200) -> pd.DataFrame:
    random = np.random.default_rng(2)
    return pd.DataFrame(dict(
        when=random.integers(0, 50, rows), user=random.integers(0, 30, rows),
        site=[["a", "b, c", 'say "d"', "two\nlines", "é"][i] for i in random.integers(0, 5, rows)],
        price=np.where(random.random(rows) < 0.1, np.nan, random.normal(5, 3, rows)), click=random.integers(0, 2, rows),
        other="x"))


OWN = dict(label="click", categorical=["user", "site"], numeric=["price"], time="when")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "csv.gz", "semicolon", "headless"])
def test_tables_of_every_kind_are_sorted_by_time(tmp_path, kind):
    frame, path, options = own_table(), tmp_path / f"log.{kind}", {}
    if kind == "parquet":
        pl.DataFrame({name: frame[name].tolist() for name in frame}).write_parquet(path)
    elif kind == "headless":
        frame.to_csv(path, index=False, header=False)
        options = dict(columns=list(frame))
    else:
        frame.to_csv(path, index=False, sep={"tsv": "\t", "semicolon": ";"}.get(kind, ","))
    dataset = prepare_table(path, tmp_path / "out", chunk_rows=10, numeric_transform="none", **OWN, **options)
    assert dataset.rows == {"train": 160, "valid": 20, "test": 20}
    expected = frame.sort_values("when", kind="stable")
    parts = read(dataset)
    ids, dense, label = (np.concatenate([parts[s][i] for s in ("train", "valid", "test")]) for i in range(3))
    assert (ids[:, 0] == encode(expected["user"].astype(str))).all()
    assert (ids[:, 1] == encode(expected["site"])).all() and (label == expected["click"]).all()
    assert np.allclose(dense[:, 0], expected["price"].fillna(0), rtol=1e-6)
    assert dataset.meta["source"]["order"] == "time" and dataset.meta["source"]["options"]["label"] == "click"


def test_dates_order_rows_too(tmp_path):
    frame = own_table()
    stamp = pd.Timestamp("2026-01-31 23:00") + pd.to_timedelta(frame["when"] * 37, unit="min")
    expected = prepare_table(_csv(tmp_path, frame), tmp_path / "numbers", **OWN).fingerprint
    for name, form in (("space", "%Y-%m-%d %H:%M:%S"), ("iso", "%Y-%m-%dT%H:%M:%SZ"), ("minutes", "%Y-%m-%d %H:%M")):
        path = _csv(tmp_path, frame.assign(when=stamp.dt.strftime(form)))
        assert prepare_table(path, tmp_path / name, **OWN).fingerprint == expected, name
    path = tmp_path / "log.parquet"
    pl.DataFrame({name: frame.assign(when=stamp)[name].tolist() for name in frame}).write_parquet(path)
    assert prepare_table(path, tmp_path / "dates", **OWN).fingerprint == expected


def _csv(folder: Path, frame: pd.DataFrame) -> Path:
    frame.to_csv(folder / "log.csv", index=False)
    return folder / "log.csv"


@pytest.mark.parametrize("split", ["chronological", "random"])
def test_standard_numbers_take_their_statistics_from_training_rows(tmp_path, split):
    frame = own_table()
    frame["price"] += 1e6                                               # a large mean must not cancel
    options = OWN | dict(numeric_transform="standard", split=split)
    parts = read(prepare_table(_csv(tmp_path, frame), tmp_path / "out", **options))
    ordered = frame.sort_values("when", kind="stable")["price"].to_numpy()
    splits = fraction_split(200, (0.8, 0.1, 0.1), 0 if split == "random" else None)
    train = ordered[splits == 0]
    for code, name in enumerate(("train", "valid", "test")):
        expected = np.nan_to_num((ordered[splits == code] - np.nanmean(train)) / np.nanstd(train))
        assert np.allclose(parts[name][1][:, 0], expected, atol=1e-5)


def test_table_labels(tmp_path):
    frame = own_table()
    expected = prepare_table(_csv(tmp_path, frame), tmp_path / "a", **OWN).fingerprint
    for name, label in (("float", frame["click"].astype(float)), ("bool", frame["click"].astype(bool))):
        assert prepare_table(_csv(tmp_path, frame.assign(click=label)), tmp_path / name, **OWN).fingerprint == expected
    stars = frame.assign(click=frame["click"] * 2 + 3)
    assert prepare_table(_csv(tmp_path, stars), tmp_path / "t", label_threshold=4, **OWN).fingerprint == expected
    with pytest.raises(DataError, match="click = '[35]', expected 0 or 1"):
        prepare_table(_csv(tmp_path, stars), tmp_path / "u", **OWN)


def test_distinct_keeps_the_first_row_of_each_pair(tmp_path):
    frame = own_table().drop(columns="when")
    options = dict(label="click", categorical=("user", "site"), distinct=("user", "site"), vocab="train", chunk_rows=3)
    dataset = prepare_table(_csv(tmp_path, frame), tmp_path / "out", **options)
    kept = frame.drop_duplicates(["user", "site"])
    assert len(kept) < len(frame) and dataset.meta["source"]["rows_dropped"] == len(frame) - len(kept)
    options.pop("distinct")
    assert prepare_table(_csv(tmp_path, kept), tmp_path / "b", **options).fingerprint == dataset.fingerprint


def test_missing_cells_of_a_table(tmp_path):
    frame = own_table().assign(site=["NA", "", "\\N", "a"] * 50, price=["NA", "", "1", "nan"] * 50)
    dataset = prepare_table(_csv(tmp_path, frame), tmp_path / "out", missing=("", "NA", "\\N"),
                            numeric_transform="none", **OWN)
    assert dataset.cardinalities[1] == 2 and dataset.meta["source"]["missing"] == ""
    assert set(read(dataset)["train"][1][:, 0]) == {0.0, 1.0}


@pytest.mark.parametrize("change, message", [
    (dict(categorical=["user", "shop"]), "no column 'shop'; it has when, user, site"),
    (dict(categorical=[]), "no categorical column"), (dict(categorical=["user", "user"]), "'user' twice"),
    (dict(numeric=["click"]), "the label 'click' is among the numeric columns"),
    (dict(time="site"), "site = .*a number|date"),
    (dict(numeric=["site"]), "malformed.*site = .* expected a number"),
    (dict(distinct=["price"]), "distinct names 'price'"),
    (dict(numeric_transform="sqrt"), "numeric_transform 'sqrt'"),
    (dict(split="paper"), "split 'paper', expected one of"),
    (dict(separator="#"), "separator '#'"),
])
def test_table_errors(tmp_path, change, message):
    path = _csv(tmp_path, own_table())
    with pytest.raises(DataError, match=message):
        prepare_table(path, tmp_path / "out", **(OWN | change))
    nothing_beside(tmp_path, "log.csv")


def test_quotes_that_are_never_closed(tmp_path):
    frame = own_table().assign(site="a")
    path = _csv(tmp_path, frame)
    lines = path.read_text().splitlines()
    lines[50] = lines[50].replace(",a,", ',"a,')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 51: "):
        prepare_table(path, tmp_path / "out", chunk_rows=1, **OWN)
    dataset = prepare_table(path, tmp_path / "out", quote=None, **OWN)
    assert dataset.cardinalities[1] == 2
    nothing_beside(tmp_path, "log.csv", "out")


def test_a_damaged_parquet_file(tmp_path):
    own = pl.DataFrame(own_table().to_dict("list"))
    own.write_parquet(tmp_path / "log.parquet")
    data = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(data[:len(data) // 2])
    with pytest.raises(DataError, match="log.parquet"):
        prepare_table(tmp_path / "log.parquet", tmp_path / "out", **OWN)
    own.with_columns(site=pl.concat_list("user", "when")).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match="log.parquet"):
        prepare_table(tmp_path / "log.parquet", tmp_path / "out", **OWN)
    nothing_beside(tmp_path, "log.parquet")


# ---------------------------------------------------------------- scripts and real data


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script of data_prep as ``__main__``: exit code, stdout, stderr."""
    def run(name: str, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(paths.PACKAGE.parent / "data_prep" / f"{name}.py"), run_name="__main__")
        return stop.value.code, *capsys.readouterr()
    return run


def test_scripts(tmp_path, raw, script):
    code, out, err = script("criteo", raw, "--out", tmp_path / "out", "--vocab", "train", "--min-count", "2")
    assert code == 0 and "train 600, valid 50, test 50 rows, 26 fields" in out and not err
    expected = prepare_criteo(raw, tmp_path / "expected", vocab="train", min_count=2).fingerprint
    assert Dataset.open(tmp_path / "out").fingerprint == expected
    code, out, err = script("criteo", raw, "--out", tmp_path / "out")
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1 and not out
    code, out, err = script("table", _csv(tmp_path, own_table()), "--label", "click", "--categorical", "user,site",
                            "--numeric", "price", "--time", "when", "--out", tmp_path / "own",
                            "--fractions", "0.5,0.25,0.25")
    assert code == 0 and "train 100, valid 50, test 50 rows, 2 fields" in out, err
    write_avazu(tmp_path / "train.csv")
    assert script("avazu", tmp_path / "train.csv", "--out", tmp_path / "avazu", "--split-hour")[0] == 0
    assert Dataset.open(tmp_path / "avazu").fields[:2] == ["day", "hour_of_day"]


@pytest.mark.parametrize("name", ["criteo", "avazu", "table", "epinions"])
def test_help_names_every_option(script, name):
    code, out, _ = script(name, "--help")
    assert code == 0 and "--out" in out and "--overwrite" in out and "None" not in out


def test_the_real_criteo_sample(tmp_path):
    path = SHARED / "criteo_kaggle_137k.tsv.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not there (set ECSTUDY_SHARED)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = prepare_criteo(path, tmp_path / "out", max_bad=0)
    assert dataset.rows == {"train": 117_548, "valid": 9_795, "test": 9_796}
    assert sum(dataset.cardinalities) == 316_179 + 12                   # 12 fields have missing values: an id each
    label = in_file_order(dataset)[2]
    assert round(float(label.mean()), 4) == 0.2568
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["source"]["rows_read"] == 137_139


def test_the_epinions_recipe(tmp_path, script):
    path = SHARED / "epinions_ratings.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not there (set ECSTUDY_SHARED)")
    assert script("epinions", path, "--out", tmp_path / "out")[0] == 0
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.cardinalities == [18_564, 262_614, 27] and dataset.meta["source"]["rows_dropped"] == 8_205
    assert dataset.rows == {"train": 609_436, "valid": 76_180, "test": 76_179}
    raw = pl.read_parquet(path).unique(["user", "item"], keep="first")
    assert sum(int(np.asarray(dataset.split(s).label).sum()) for s in dataset.rows) == (raw["rating"] >= 4).sum()
