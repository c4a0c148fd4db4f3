"""Select the images of the collections to use, with a reason for each unused one; find duplicates."""

import zlib

import imagehash
import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import radius_neighbors_graph

from common.errors import log
from solutions.covid19.collections import NO_FINDING

SIDE = 16  # side of the hash, which has 256 bits


def select(table, config, seed, excluded=""):
    """Return the table of `read_collections` with the column `reason`: why a row is not used, "" if it is used.

    Rows are excluded by the user's list (`excluded`), by their table entries, for missing files, then at random:
    `config.normals` images of each collection of normals are drawn, seeded by `seed` and the collection's name.
    """
    finding, absent, view_said = table["finding"].str.casefold(), table["path"].isna(), table["view_said"]
    rules = [
        (excluded != pd.Series("", table.index), excluded),
        (~table["modality"].isin(["X-ray", ""]), table["modality"]),
        (table["view"] == "lateral", "lateral (" + view_said + ")"),
        (table["view"] == "other", "view " + view_said),
        ((table["view"] == "unknown") & (config.unknown_view == "leave"), _describe_unknown("view", view_said)),
        (table["label"] < 0, _describe_unknown("finding", table["finding"])),
        (~table["home"] & (finding != NO_FINDING.casefold()), "not a normal (" + table["finding"] + ")"),
        (table["devices"] & (config.devices == "leave"), "medical device"),
        (table["age"] < config.least_age, "age " + table["age"].map("{:.3g}".format)),
        (table["age"].isna() & (config.unknown_age == "leave"), _describe_unknown("age", table["age_said"])),
        (absent & (table["file_name"] == ""), "no file name"),
        (absent, "no such file"),
    ]
    table = table.assign(reason="")
    for applies, words in rules:
        table["reason"] = table["reason"].mask((table["reason"] == "") & applies, words)
    here = table[(table["reason"] == "") & ~table["home"]]
    for name, rows in here.groupby("collection", sort=False):
        if config.normals and len(rows) > config.normals:
            order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(rows))
            table.loc[rows.index[order[config.normals :]], "reason"] = "not drawn"
    for what, odd, said in (
        ("ages", table["age_said"] != "", "age_said"),
        ("views", (table["view"] == "unknown") & (table["view_said"] != ""), "view_said"),
    ):
        for row in table[odd][:1].itertuples():
            text = f"{odd.sum():,}, the first is {getattr(row, said)!r} ({row.table}, row {row.line})"
            log.info(f"unreadable {what} count as unknown: {text}")
    return table


def _describe_unknown(what, said):
    return (f"{what} unknown (" + said + ")").mask(said == "", f"{what} unknown")


def find_duplicates(images, share):
    """Return the pairs of images whose hashes differ in at most `share` of their bits: a table of a, b, distance.

    images: uint8 squares. The hash is `imagehash.phash` of the lowest 16 × 16 frequencies.
    """
    bits = [imagehash.phash(Image.fromarray(np.asarray(image)), SIDE).hash.ravel() for image in images]
    if len(bits) < 2:
        return pd.DataFrame({"a": [], "b": [], "distance": []}).astype({"a": "int64", "b": "int64"})
    near = coo_array(radius_neighbors_graph(np.array(bits), share, mode="distance", metric="hamming"))
    pairs = pd.DataFrame({"a": near.row, "b": near.col, "distance": near.data}).astype({"a": "int64", "b": "int64"})
    return pairs[pairs["a"] < pairs["b"]].sort_values(["a", "b"], ignore_index=True)


def drop_duplicates(table, pairs):
    """Return the table of `select` with reasons for duplicate images, given pairs of its index (a, b).

    The first image of each linked group is kept, home collections before others; a group whose images disagree about
    COVID-19 is left out. All patients of a group get the alphabetically first of their patient_ids, in all their rows.
    """
    table = table.copy()
    for group in _link_groups(pairs["a"], pairs["b"]):
        rows = table.loc[table.index.isin(group)].sort_values("home", ascending=False, kind="stable")
        rows = rows[rows["reason"] == ""]
        if rows["label"].nunique() > 1:
            table.loc[rows.index, "reason"] = "same image with another label"
        elif len(rows):
            first = rows.iloc[0]
            table.loc[rows.index[1:], "reason"] = f"same image as {first['image_id']} ({first['collection']})"
    patients = table["patient_id"]
    linked = _link_groups(patients.loc[pairs["a"]], patients.loc[pairs["b"]])
    return table.assign(patient_id=patients.replace({name: min(group) for group in linked for name in group}))


def _link_groups(a, b):
    """Return the groups of linked values, lists of at least two; a and b are the two ends of each link."""
    codes, names = pd.factorize(np.concatenate([np.asarray(a), np.asarray(b)]))
    links = coo_array((np.ones(len(a)), np.split(codes, 2)), shape=(len(names), len(names)))
    of = connected_components(links, directed=False)[1] if len(a) else codes
    groups = [names[of == number].tolist() for number in np.unique(of)]
    return [group for group in groups if len(group) > 1]
