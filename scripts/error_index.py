"""Write docs/errors.md, the index of the kit's errors: what each says, what to do about it, and where it comes from.

Read from the source, so nothing is listed that is not raised: `python scripts/error_index.py`. A test compares the file
with what this would write.
"""

import ast
import html
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gemma_qat_kit"
PAGE = ROOT / "docs" / "errors.md"
INTRODUCTION = """# Errors

Every error of the kit has three parts: what is wrong, what is allowed, and what to do next. Each is a `KitError` and
one of Python's own classes as well, so `except ValueError` works. In a panel the same three parts stand where you are
looking. Words in braces are values of the moment. This page is written by `scripts/error_index.py`.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written.")


def render() -> str:
    """Return the page: one section for each class, one row for each message."""
    classes = {node.name: node for node in ast.parse((PACKAGE / "errors.py").read_text()).body
               if isinstance(node, ast.ClassDef) and node.name != "KitError"}  # fmt: skip
    rows = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "errors.py":
            for name, row in _messages(ast.parse(path.read_text(encoding="utf-8")), classes):
                rows[name].add((path.relative_to(PACKAGE).with_suffix("").as_posix(), *row))
    return INTRODUCTION + "".join(_section(node, rows[name]) for name, node in classes.items())


def _section(node: ast.ClassDef, rows: set[tuple[str, str, str]]) -> str:
    lines = [f"\n## {node.name}\n", f"{ast.get_docstring(node).splitlines()[0]} Also a `{node.bases[-1].id}`.\n"]
    lines += ["| It says | What to do | From |", "|---|---|---|"]
    lines += [f"| {says} | {to_do} | `{module}` |" for module, says, to_do in sorted(rows)]
    return "\n".join(lines) + "\n"


def _messages(tree: ast.AST, classes: dict[str, ast.ClassDef]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the class of every error that is made here, what it says, and what it says to do."""
    for node in ast.walk(tree):
        name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
        if name in classes and len(node.args) == 3:
            wrong, allowed, to_do = map(_text, node.args)
            yield name, (_cell(f"{wrong} {allowed}"), _cell(to_do))
        elif name == "unknown_name":
            yield (
                "UnknownNameError",
                (_cell(f"Unknown {_text(node.args[0])} {{value}}. Known: …"), "Take the name it suggests."),
            )


def _text(node: ast.AST) -> str:
    """What an argument becomes: literal text, a value's name in braces, and both texts of a choice."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(_text, node.values))
        case ast.FormattedValue():
            return f"{{{_name(node.value)}}}"
        case ast.IfExp():
            return f"{_text(node.body)} / {_text(node.orelse)}".removesuffix(" / ")
        case ast.BinOp():
            return _text(node.left) + _text(node.right)
    return f"{{{_name(node)}}}"


def _name(node: ast.AST) -> str:
    match node:
        case ast.Name():
            return node.id.strip("_")
        case ast.Attribute():
            return node.attr.strip("_")
        case ast.Subscript():
            return _name(node.value)
        case ast.Call() if node.args:
            return _name(node.args[0])
    return "…"


def _cell(text: str) -> str:
    """One cell of a table: Markdown shows it as it is, and nothing in it is taken for HTML."""
    escaped = re.sub(r"([\\|*_`])", r"\\\1", html.escape(text, quote=False))
    return " ".join(escaped.split())


if __name__ == "__main__":
    main()
