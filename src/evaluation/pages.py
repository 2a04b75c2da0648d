"""Pages that can be mailed: templates of page/, filled in so that everything is escaped and no path is absolute."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).resolve().parent / "page"
ABSOLUTE = re.compile(r"(?<![\w./~…<-])(?:/[^\s/'\"<>|:;,()]+)*(/[^\s/'\"<>|:;,()]+)/?")


def render(name, paths, **values):
    """Fill in page/NAME.html.j2; its style and script, NAME.css and NAME.js, are written into it. Returns str."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
                              finalize=lambda value: portable(value, paths))
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # the order of sets means something
    style, script = (Markup((HERE / f"{name}.{kind}").read_text()) for kind in ("css", "js"))
    return environment.get_template(f"{name}.html.j2").render(style=style, script=script, **values)


def portable(value, paths):
    """A value of JSON types whose texts name no folder of this machine: what lies under the root is named from there,
    anything else by its last part. Markup is left as it is."""
    if isinstance(value, dict):
        return {portable(key, paths): portable(item, paths) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item, paths) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    if value.startswith("/") and not re.search(r"[:;,]\s", value) and not value.startswith(str(paths.root)):
        return "…/" + value.rstrip("/").rpartition("/")[2]  # a path and nothing else, which may have spaces
    root = re.escape(str(paths.root))
    text = re.sub(rf"(?<![\w./~-]){root}(/|(?![\w.-]))", lambda found: "" if found[1] else "ROOT", value)
    return ABSOLUTE.sub(r"…\1", text)
