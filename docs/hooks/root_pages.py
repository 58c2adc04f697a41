"""MkDocs hook: shows BENCHMARKS.md and SCALING.md, which lie beside the README, as pages of the site.

Their links are relative to the root of the repository; here they become relative to `docs/`. Pictures outside `docs/` are copied.
The pages in `docs/` link to the files as they lie in the repository, which a reader of the repository can follow; on the site these
links lead to the pages.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = {"BENCHMARKS.md": "measurements.md", "SCALING.md": "scaling.md", "README.md": "index.md"}  # file -> page
SHOWN = ("BENCHMARKS.md", "SCALING.md")
# File -> page; pages link to the file as ../FILE, those of docs/models/ as ../../FILE.
ABOVE = {**{name: PAGES[name] for name in SHOWN}, "ymplug_jax/core/config.py": "settings.md"}
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """MkDocs calls this with the files of the site; adds the pages and their pictures."""
    from mkdocs.structure.files import File

    for name in SHOWN:
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in set(LINK.findall(text)):
            source = ROOT / target
            if source.is_file() and source.suffix in (".svg", ".png") and not target.startswith("docs/"):
                files.append(File.generated(config, target, abs_src_path=str(source)))
        files.append(File.generated(config, PAGES[name], content=LINK.sub(_link, text)))
    return files


def _link(match: re.Match[str]) -> str:
    target = PAGES.get(match[1], match[1])
    return f"]({target.removeprefix('docs/')}"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with the text of a page of `docs/`; returns it with links to files above as links to their pages."""
    for file, page in ABOVE.items():
        markdown = markdown.replace(f"](../{file}", f"]({page}")
        markdown = markdown.replace(f"](../../{file}", f"](../{page}")  # from docs/models/
    return markdown
