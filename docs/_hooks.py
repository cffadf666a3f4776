"""Pages of the site that are files elsewhere in the repository, so that each text stands in one place.

A link from a page under docs/ to such a file, or between two of them, leads to its page; one to any other file of the
repository becomes the file's name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "reference/README.md": "reference.md",
    "bench/evidence.md": "evidence-tables.md",
    "bench/README.md": "benchmarks.md",
    "findings/README.md": "findings.md",
    "tests/README.md": "testing.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/results/evidence.png": "assets/evidence.png",
    ".github/assets/inspect.png": "assets/inspect.png",
    ".github/assets/report.png": "assets/report.png",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def rewritten(text: str, source: str, place: str) -> str:
    """The text of the repository's file `source`, shown at `place` under docs/, with links as the site has them."""

    def link(found: re.Match) -> str:
        image, label, target, anchor = found.groups(default="")
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if path in PAGES:
            there = PAGES[path]
        elif path.startswith("docs/"):
            there = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            return f"{label} (`{path}`)" if path not in label else label
        else:
            return found[0]
        return f"{image}[{label}]({os.path.relpath(there, os.path.dirname(place) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.M | re.S)  # no link is in code
    return "".join(part if part.startswith("`") else LINK.sub(link, part) for part in parts)


def on_files(files, config):
    for source, place in PAGES.items():
        path = ROOT / source
        if path.suffix == ".md":
            files.append(File.generated(config, place, content=rewritten(path.read_text(), source, place)))
        else:
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in PAGES.values():
        return markdown
    return rewritten(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
