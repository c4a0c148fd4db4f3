"""The site's pages: the READMEs, at the same relative paths, so that their links hold, and a page for each package."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "notebooks/README.md", "solutions/*/README.md")
API = {  # pages of the reference; common/*.py is the engine
    "": "Engine: what every solution does alike",
    "data": "Data: from files to pixels",
    "phantom": "Phantoms: synthetic radiographs",
    "nn": "Networks and losses",
    "train": "Training",
    "infer": "Prediction",
    "post": "Masks and boxes",
    "metrics": "Metrics: scores, intervals, tests",
    "submit": "Submissions",
    "report": "The page of a run",
    "kaggle": "Kaggle",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#]+?)/?(#[^)]*)?\)")


def on_files(files, config):
    """Add the pages, the pictures that they show, and the reference."""
    pages = {"index.md": ROOT / "README.md"}
    pages |= {str(path.relative_to(ROOT)): path for pattern in PAGES for path in sorted(ROOT.glob(pattern))}
    pages |= {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "docs" / "images").glob("*"))}
    for name, path in pages.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for package, title in API.items():
        modules = sorted(path.stem for path in (ROOT / "common" / package).glob("*.py") if path.stem != "__init__")
        prefix = ".".join(filter(None, ("common", package)))
        text = "\n\n".join([f"# {title}", *(f"::: {prefix}.{module}" for module in modules)])
        files.append(File.generated(config, f"api/{package or 'engine'}.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links to README.md to the start page, and make those to other files of the repository plain text."""
    here = ROOT if page.file.src_uri == "index.md" else (ROOT / page.file.src_uri).parent

    def resolve(match):
        text, target, part = match.groups()
        if "://" in target:
            return match[0]
        place = (here / target).resolve()
        place = place / "README.md" if place.is_dir() and (place / "README.md").is_file() else place
        if not place.is_relative_to(ROOT) or not place.exists():
            return match[0]  # a broken link, which --strict reports
        name = str(place.relative_to(ROOT))
        name = "index.md" if name == "README.md" else name
        if files.get_file_from_path(name) is None:
            return text
        up = "../" * page.file.src_uri.count("/")
        return f"[{text}]({up}{name}{part or ''})"

    return LINK.sub(resolve, markdown)
