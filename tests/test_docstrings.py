"""Every public name says what it is; the public face also says what goes in and what can go wrong."""

import ast
import re
from pathlib import Path

import pytest

import gemma_qat_kit
from gemma_qat_kit import widgets

PACKAGE = Path(gemma_qat_kit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FACE = {name: module.replace(".", "/") for name, module in gemma_qat_kit._MODULE_OF.items()}
FACE |= {name: f"widgets/{module}" for name, module in widgets._MODULES.items()}


def _public(path):
    """Name and node of each public function, class, method and property of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                is_setter = any(isinstance(each, ast.Attribute) for each in getattr(inner, "decorator_list", ()))
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_") and not is_setter:
                    yield f"{node.name}.{inner.name}", inner


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_public_name_has_a_docstring_of_whole_sentences(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for name, node in _public(path):
        first = (ast.get_docstring(node) or "").split("\n\n")[0].rstrip()
        assert first, f"{name} has no docstring"
        assert first.endswith((".", ":", "?")), f"{name}: {first}"


@pytest.mark.parametrize("name", FACE)
def test_the_public_face_names_its_parameters_and_its_errors(name):
    node = dict(_public(PACKAGE / f"{FACE[name]}.py"))[name]
    words = ast.get_docstring(node)
    maker = node
    if isinstance(node, ast.ClassDef):
        maker = next((each for each in node.body if getattr(each, "name", "") == "__init__"), None)
    taken = [each.arg for each in (*maker.args.args, *maker.args.kwonlyargs)] if maker else []
    assert [each for each in taken if each != "self" and not re.search(rf"\b{each}\b", words)] == []
    if isinstance(node, ast.FunctionDef) and any(isinstance(each, ast.Raise) and each.exc for each in ast.walk(node)):
        assert "Raises:" in words
