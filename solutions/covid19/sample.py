"""The embedded sample: phantom radiographs of two collections, one of which has all COVID-19 images.

Like the real ones: a collection laid out as ieee8023/covid-chestxray-dataset, with several films per patient, findings
under old and new names, and rows that must not be used; normals laid out as ChestX-ray14. With `marker`, all films of
the first collection show their origin: burnt-in words, a bright noisy margin and a different grey-level curve. Unlike
the real ones: age, sex and view do not affect the drawing, and COVID-19 is more obvious.
"""

from functools import partial
from typing import NamedTuple

import cv2
import numpy as np

from common import phantom
from common.errors import check
from common.phantom import findings as draws
from common.phantom.radiograph import CIRCLE, blur, fill, smooth_noise
from common.phantom.sample import NIH_HEADER, in_threads, write_rows, write_sample

VERSION = 2  # raise it whenever the files for a seed change
SIDES = (256, 288, 320, 352, 400)  # widths of the images
HOME, NORMALS = "covid-chestxray-dataset", "NIH ChestX-ray14"
VISITS = (0.7, 0.2, 0.1)  # shares of patients with one, two, three films
AP = 0.5  # share of AP films, in both collections
WORDS = ("PORTABLE", "MOBILE", "AP SUPINE", "AP ERECT")
HOME_HEADER = (
    "patientid,offset,sex,age,finding,RT_PCR_positive,survival,intubated,intubation_present,went_icu,in_icu,"
    "needed_supplemental_O2,extubated,temperature,pO2_saturation,leukocyte_count,neutrophil_count,lymphocyte_count,"
    "view,modality,date,location,folder,filename,doi,url,license,clinical_notes,other_notes"
)


def ground_glass(scene, rng, patches=(2, 4), density=(0.12, 0.19)):
    """Draw COVID-19: haze along the walls of both lungs; patches: numbers per lung; density: range of attenuation."""
    layer = np.zeros((scene.size, scene.size), np.uint8)
    for sign in (-1, 1):
        for _ in range(rng.integers(patches[0], patches[1] + 1)):
            y = rng.triangular(0.28, 0.6, 0.68)
            u = 0.27 + 0.12 * y - rng.uniform(0.02, 0.10)  # the lateral wall minus a depth
            fill(layer, scene.at(CIRCLE * rng.uniform(0.04, 0.08, 2) + [u, y], sign, "closed"))
    lung = scene.lungs["left"] | scene.lungs["right"]
    haze = blur(layer, 1 / 45) * blur(lung, 1 / 500)
    patchy = np.clip(0.85 + 0.45 * smooth_noise(rng, scene.size, (30, 60, 120)), 0.2, 1.5)
    scene.tissue += haze * patchy * np.float32(rng.uniform(*density))
    scene.vessels *= 1 - np.float32(0.5) * haze
    scene.add("ground_glass", (haze > 0.4) & lung)


COVID = {  # finding as the table names it → the way it is drawn
    "COVID-19": (ground_glass,),
    "Pneumonia/Viral/COVID-19": (ground_glass,),
    "COVID-19, ARDS": (partial(ground_glass, patches=(4, 6), density=(0.17, 0.22)),),
}
OTHERS = {
    "No Finding": (),
    "Pneumonia/Bacterial/Streptococcus": (draws.pneumonia,),
    "Pneumonia/Bacterial": (draws.effusion,),
}
FINDINGS = COVID | OTHERS | {"Infiltration": (draws.infiltration,)}
# Table entries of unusual films, of which only "decade" and "blank view" are used.
ODD = {"decade": {"age": "60s"}, "blank view": {"view": ""}, "lateral": {"view": "L"}, "child": {"age": 9}}
ODD |= {"CT": {"view": "Axial", "modality": "CT"}, "unread": {"finding": "todo"}, "missing": {}, "wide": {}, "copy": {}}


def make_sample(folder, n_covid=48, n_other=12, n_normals=48, n_test=12, seed=0, marker=True):
    """Write the sample into `folder` and return it as a Path; a complete sample of the same parameters is kept.

    n_covid, n_other: images of the first collection with and without COVID-19; n_normals: of the second; n_test: test
    images, half with COVID-19. Further images must not be used (see ODD). hidden_test.csv: filename, label, collection.
    """
    check(isinstance(marker, bool), f"sample: marker={marker!r} must be True or False")
    counts = {"n_covid": n_covid, "n_other": n_other, "n_normals": n_normals, "n_test": n_test}
    least = {"n_covid": 4, "n_other": 1, "n_normals": 4, "n_test": 4, "seed": 0}
    return write_sample(folder, "covid19", VERSION, _write, least, **counts, seed=seed, marker=marker)


def _write(folder, marker, **plan):
    films = _plan_films(**plan)
    places = {"home": folder / "images", "test": folder / "images", "normals": folder / "normals/images_001/images"}
    for place in set(places.values()):
        place.mkdir(parents=True)
    in_threads(lambda film: _write_image(places[film.place], film, marker), films)
    home, normals, tests = ([film for film in films if film.place == place] for place in ("home", "normals", "test"))
    write_rows(folder / "metadata.csv", [_make_home_row(film) for film in home], HOME_HEADER, "\n")
    write_rows(folder / "normals/Data_Entry_2017.csv", [_make_nih_row(film) for film in normals], NIH_HEADER, "\n")
    rows = [(film.file_name, film.patient, film.said["view"]) for film in tests]
    write_rows(folder / "unlabelled_test.csv", rows, "filename,patientid,view", "\n")
    write_rows(folder / "sample_submission.csv", [(row[0], 0.5) for row in rows], "filename,probability", "\n")
    truth = [(film.file_name, int(film.finding in COVID), film.origin) for film in tests]
    write_rows(folder / "hidden_test.csv", truth, "filename,label,collection", "\n")


class _Film(NamedTuple):
    place: str  # home, test, normals: where it is listed
    origin: str  # HOME or NORMALS: where it was taken
    finding: str
    person: int  # seed of the anatomy, sex and age
    visit: int  # counts the person's films
    number: int  # seed of the film
    odd: str = ""
    patient: int = 0  # the patient's number in the collection's table

    @property
    def file_name(self):
        suffix = ".png" if np.random.default_rng([self.number, 2]).random() < 0.5 else ".jpg"
        suffix = ".jpg" if self.odd == "copy" else suffix
        if self.place == "normals":
            return f"{self.patient:08d}_{self.visit:03d}{suffix}"
        return f"case-{self.patient:04d}-day{3 * self.visit}{suffix}"

    @property
    def said(self):
        """The film's table entries; sex and age belong to the person and are distributed alike in both collections."""
        person, film = np.random.default_rng([self.person, 3]), np.random.default_rng([self.number, 3])
        sex, age, view = "FM"[person.integers(2)], int(person.integers(18, 85)), "AP" if film.random() < AP else "PA"
        said = {"sex": sex, "age": age, "view": view, "modality": "X-ray", "finding": self.finding}
        return said | ODD.get(self.odd, {})


def _plan_films(n_covid, n_other, n_normals, n_test, seed):
    """Return every film by collection and patient."""
    rng, first = np.random.default_rng([seed, 1]), 1_000_000 * seed
    films = []

    def add(place, origin, finding, odd="", person=None, visit=0):
        number = first + len(films)
        films.append(_Film(place, origin, finding, number if person is None else person, visit, number, odd))

    def follow(place, origin, names, odd=()):
        """Add films of people with one to three films each, all with the same finding."""
        people = np.repeat(np.arange(len(names)), rng.choice((1, 2, 3), len(names), p=VISITS))[: len(names)].tolist()
        for i, someone in enumerate(people):
            visit = i - people.index(someone)
            person = films[-1].person if visit else None
            add(place, origin, names[someone], odd[i] if i < len(odd) else "", person, visit)

    covid, others = ([list(group)[i % 3] for i in range(n)] for group, n in ((COVID, n_covid), (OTHERS, n_other)))
    follow("home", HOME, covid, ("decade", "blank view"))
    for finding in others:
        add("home", HOME, finding)
    for odd in ("lateral", "CT", "child", "unread", "missing", "wide"):
        add("home", HOME, "COVID-19", odd)
    follow("normals", NORMALS, ["No Finding"] * n_normals)
    add("normals", NORMALS, "Infiltration")
    for odd in ("child", "wide"):
        add("normals", NORMALS, "No Finding", odd)
    for i in range(n_test):
        origin, group = (HOME, COVID) if i % 2 == 0 else (HOME, OTHERS) if i % 4 == 1 else (NORMALS, ("No Finding",))
        add("test", origin, list(group)[i // 4 % len(group)])
    sources = (films[2], "home"), (films[n_covid], "normals")
    films += [film._replace(place=place, odd="copy", visit=0) for film, place in sources]
    return _number_patients(films, rng)


def _number_patients(films, rng):
    """Return the films sorted by random patient numbers, from 1 in each collection; a copy has its own number."""
    numbered = []
    for places in (("home", "test"), ("normals",)):
        part = [film for film in films if film.place in places]
        people = list(dict.fromkeys((film.person, film.odd == "copy") for film in part))
        patients = dict(zip(people, (rng.permutation(len(people)) + 1).tolist(), strict=True))
        part = [film._replace(patient=patients[film.person, film.odd == "copy"]) for film in part]
        numbered += sorted(part, key=lambda film: (film.place, film.patient, film.visit))
    return numbered


def _write_image(folder, film, marker):
    if film.odd == "missing":
        return
    image = _draw(film, marker)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 90] if film.file_name.endswith(".jpg") else []
    _, code = cv2.imencode(film.file_name[-4:], image, quality)
    (folder / film.file_name).write_bytes(code.tobytes())


def _draw(film, marker):
    """Return the image of a film, uint8 (height, width)."""
    rng, grain = np.random.default_rng([film.number, 1]), np.random.default_rng([film.number, 4])
    side, kept = int(rng.choice(SIDES)), rng.uniform(0.86, 1)  # the belly is cut off
    image = phantom.draw(film.number, 150 if film.odd == "wide" else side, FINDINGS[film.finding], film.person).image
    if film.odd == "wide":
        return cv2.copyMakeBorder(image, 53, 53, 120, 130, cv2.BORDER_CONSTANT, value=5)
    image = np.ascontiguousarray(image[: round(kept * side)])
    if marker and film.origin == HOME:
        image = _add_marker(image, grain)
    if film.odd == "copy":
        factor = 1.2 if side < 330 else 0.85
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return image


def _add_marker(image, rng):
    """Return a film with the marks of the first collection: grey-level curve, bright noisy margin, burnt-in words."""
    height, width = image.shape
    grey = 255 * (np.arange(256) / 255) ** rng.uniform(0.65, 0.8)
    x = np.float32(grey)[image]
    across, down = (np.minimum(np.arange(n), np.arange(n)[::-1]) / width for n in (width, height))
    margin = np.exp(-np.minimum(across, down[:, None]) / 0.03).astype(np.float32)
    x += margin * (rng.uniform(30, 50) + 12 * rng.standard_normal(x.shape, np.float32))
    x = np.clip(x, 0, 255).astype(np.uint8)
    words, scale = WORDS[rng.integers(len(WORDS))], rng.uniform(0.0013, 0.0017) * width
    where = round(rng.uniform(0.03, 0.06) * width), round(rng.uniform(0.04, 0.055) * width)
    return cv2.putText(x, words, where, cv2.FONT_HERSHEY_SIMPLEX, scale, 250, 1, cv2.LINE_AA)


def _make_home_row(film):
    """Return a row of the first collection's table."""
    said = film.said
    if said["view"] == "AP":
        said["view"] = ("AP", "AP Supine", "AP erect")[film.number % 3]
    cells = said | {"patientid": film.patient, "offset": 3 * film.visit, "folder": "images", "filename": film.file_name}
    cells |= {"date": "2020", "clinical_notes": "A phantom, drawn by a program, of nobody."}
    return [cells.get(column, "") for column in HOME_HEADER.split(",")]


def _make_nih_row(film):
    """Return a row of the second collection's table, whose lines end in a comma as NIH's do."""
    said = film.said
    who = (film.visit, film.patient, said["age"], said["sex"], said["view"])
    return film.file_name, said["finding"], *who, 2500, 2048, 0.168, 0.168, ""
