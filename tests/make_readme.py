"""README.md from nbs/index.ipynb without Quarto; with --check, only say whether it is up to date."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

TOP = Path(__file__).resolve().parent.parent


def readme() -> str:
    nb = nbformat.read(TOP / "nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if c.cell_type != "raw" and not re.match(r"#\|\s*(hide\b|include: false)", c.source)]
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean removes it, and code blocks would lose their colours
    for c in nb.cells:
        if c.cell_type == "code":
            c.source = re.sub(r"^#\|.*\n?", "", c.source, flags=re.M)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]:
        sys.exit("nbs/index.ipynb shows a picture as output; README.md has nowhere to keep it: link a file instead")
    # seen from the top, what lies beside the notebook is in nbs/, and ../ is here
    text = re.sub(r'(\]\(|(?:src|href)=")(?!\w+:|#|/)(\.\./)?', lambda m: m[1] + ("" if m[2] else "nbs/"), text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    path, text = TOP / "README.md", readme()
    if sys.argv[1:] != ["--check"]:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit("README.md does not match nbs/index.ipynb; say: make -B README.md")
