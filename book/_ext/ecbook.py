"""What the book needs beyond _config.yml: local MathJax and plotly, two theme options, a version stamp in the footer.

Theme options stand here because ``html_theme_options`` in _config.yml would replace all that jupyter-book sets.
"""
from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from ecstudy.report.stamp import facts


# folder under _static: the package that carries the script, and where in it
SCRIPTS = {"mathjax": ("sphinx-mathjax-offline", "static/mathjax/tex-svg.js"),
           "plotly": ("plotly", "package_data/plotly.min.js")}


def local_scripts(app, config) -> None:
    """Copy the scripts the pages load, once for all of them, so that reading the book asks nothing of the network."""
    for folder, (package, place) in SCRIPTS.items():
        source = Path(importlib.util.find_spec(package).origin).parent / place
        target = Path(app.srcdir) / "book" / "_static" / folder / source.name
        if not target.is_file() or target.stat().st_size != source.stat().st_size:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def theme(app) -> None:
    now = facts()
    text = f"ecstudy {now['ecstudy']}, commit {now['commit']}, built {now['built']} with torch {now['torch']}"
    for options in (app.config.html_theme_options, app.builder.theme_options):
        options["navbar_persistent"] = []                  # one search, in the side bar
        options["extra_footer"] = f"<p>{text}</p>"


def once(app, pagename, templatename, context, doctree) -> None:
    """Scripts in the page are kept once: a constant declared twice stops the second script with an error."""
    seen, kept = set(), []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        if not body or body not in seen:
            kept.append(script)
        seen.add(body)
    context["script_files"] = kept


def setup(app):
    app.connect("config-inited", local_scripts)
    app.connect("builder-inited", theme)
    app.connect("html-page-context", once, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
