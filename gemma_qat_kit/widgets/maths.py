"""TeX that a model wrote as MathML, which browsers draw by themselves: no script, and nothing but what is listed here.

`latex2mathml` parses; what it found is written out by this module, because its own writer puts text into the page
unescaped (`\\text{<img …>}`) and keeps `\\href`.
"""

import html
from xml.etree.ElementTree import Element

LONGEST_TEX = 2_000  # characters; more is shown as it was written
_TAGS = frozenset([
    "math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mfrac", "msqrt", "mroot", "msub", "msup", "msubsup",
    "munder", "mover", "munderover", "mmultiscripts", "mprescripts", "none", "mtable", "mtr", "mtd", "mstyle",
    "mpadded", "mphantom", "menclose",
])  # fmt: skip
_ATTRIBUTES = frozenset([
    "display", "displaystyle", "scriptlevel", "mathvariant", "stretchy", "fence", "separator", "lspace", "rspace",
    "accent", "accentunder", "movablelimits", "minsize", "maxsize", "symmetric", "largeop", "form", "linethickness",
    "notation", "columnalign", "rowspacing", "columnspacing", "columnlines", "rowlines", "width", "height", "depth",
])  # fmt: skip


def maths_html(tex: str, *, is_display: bool) -> str:
    """Return MathML of a formula, or the formula as it was written where it is none.

    Args:
        tex: Without its dollars.
        is_display: On a line of its own.
    """
    try:
        from latex2mathml.converter import convert_to_element

        if len(tex) > LONGEST_TEX:
            raise ValueError("too long to be a formula")
        return _written(convert_to_element(tex, display="block" if is_display else "inline"))
    except Exception:  # whatever a model writes: a parser's errors are many, and the formula can still be read
        return f'<code class="gqk-tex">{html.escape(tex)}</code>'


def _written(element: Element) -> str:
    """Return an element as text: known tags and attributes only, everything else in it escaped."""
    inner = _text(element.text) + "".join(_written(child) + _text(child.tail) for child in element)
    if element.tag not in _TAGS:
        return inner
    kept = [f' {name}="{_text(value)}"' for name, value in element.items() if name in _ATTRIBUTES]
    return f"<{element.tag}{''.join(kept)}>{inner}</{element.tag}>"


def _text(text: str | None) -> str:
    return html.escape(html.unescape(text or ""))  # latex2mathml writes symbols as entities
