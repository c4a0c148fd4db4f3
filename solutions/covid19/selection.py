"""Which images of the collections are used, and why each of the others is not."""

import logging
import zlib

import numpy as np

from solutions.covid19.layouts import NO_FINDING

log = logging.getLogger(__name__)


def select(table, config, seed):
    """A copy of `read_collections`' table with kept (bool) and reason (str, "" where kept), by SelectionConfig.

    What the tables say comes first (modality, view, finding, devices, age), then the files, then the draw: of each
    collection that has normals alone `config.normals` images, by chance from `seed` and the collection's name, so
    that no other collection changes the draw. An image that two rows name counts once; where they disagree about
    COVID-19 it is left out. Ages and views that cannot be read count as unknown and are told.
    """
    table = table.copy()
    finding = table["finding"].str.casefold()
    young = (table["age"] < config.least_age).to_numpy()
    nothing = table["path"].isna()
    rules = [
        (~table["modality"].isin(["X-ray", ""]), table["modality"]),
        (table["view"] == "lateral", "lateral (" + table["view_said"] + ")"),
        (table["view"] == "other", "view " + table["view_said"]),
        ((table["view"] == "unknown") & (config.unknown_view == "leave"), _unknown("view", table["view_said"])),
        (table["label"] < 0, _unknown("finding", table["finding"])),
        (~table["home"] & (finding != NO_FINDING.casefold()), "not a normal (" + table["finding"] + ")"),
        (table["devices"] & (config.devices == "leave"), "medical device"),
        (young, "age " + table["age"].map("{:.3g}".format)),
        (table["age"].isna() & (config.unknown_age == "leave"), _unknown("age", table["age_said"])),
        (nothing & (table["file_name"] == ""), "no file name"),
        (nothing, "no such file"),
    ]
    table["reason"] = ""
    for applies, words in rules:
        table["reason"] = table["reason"].mask((table["reason"] == "") & applies, words)
    _same_files(table)
    _draw(table, config.normals, seed)
    table["kept"] = table["reason"] == ""
    _tell(table)
    return table


def _unknown(what, said):
    return (f"{what} unknown (" + said + ")").mask(said == "", f"{what} unknown")


def _same_files(table):
    """Of rows that name one file the first stays, or none where they disagree about COVID-19."""
    here = table[table["reason"] == ""]
    files = here["path"].map(str)
    for _, rows in here[files.duplicated(keep=False)].groupby(files, sort=False):
        first = rows.iloc[0]
        if rows["label"].nunique() > 1:
            table.loc[rows.index, "reason"] = "the same file with another label"
        else:
            table.loc[rows.index[1:], "reason"] = f"the same file as {first['image_id']} (row {first['line']})"


def _draw(table, normals, seed):
    here = table[(table["reason"] == "") & ~table["home"]]
    for name, rows in here.groupby("collection", sort=False):
        if normals and len(rows) > normals:
            chosen = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(rows))[normals:]
            table.loc[rows.index[chosen], "reason"] = "not drawn"


def _tell(table):
    for what, odd, said in (
        ("ages", table["age_said"] != "", "age_said"),
        ("views", (table["view"] == "unknown") & (table["view_said"] != ""), "view_said"),
    ):
        if odd.any():
            first = table[odd].iloc[0]
            log.info(
                f"{what} that cannot be read count as unknown: {odd.sum():,}, the first is {first[said]!r} "
                f"({first['table']}, row {first['line']})"
            )
    people = table.loc[table["kept"], ["collection", "patient_id"]].drop_duplicates()
    number = [patient.removeprefix(name + " ") for name, patient in zip(*map(people.get, people), strict=True)]
    shared = people.assign(number=number)
    shared = shared[shared["number"].duplicated(keep=False)]
    if len(shared):
        first = shared["number"].iloc[0]
        names = ", ".join(shared.loc[shared["number"] == first, "collection"])
        log.info(
            f"patient numbers in more than one collection: {shared['number'].nunique():,}, the first is "
            f"{first} ({names}): taken for different people unless an image is in both"
        )
