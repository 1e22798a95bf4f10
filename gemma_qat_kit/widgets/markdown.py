"""Markdown that a model wrote, as HTML that can do nothing: no HTML of its own, no image, no address but a web page's.

markdown-it-py reads CommonMark and tables with HTML switched off, so that every tag in the result is one that it made.
"""

import re
import threading
import urllib.parse
from functools import lru_cache

from gemma_qat_kit.widgets.look import escape, visible
from gemma_qat_kit.widgets.maths import LONGEST_TEX, maths_html

LONGEST_MARKDOWN = 200_000  # characters; a longer text is shown as it was written
_LONGEST_CODE = 20_000  # characters that are coloured
_LONGEST_BLOCK = 8_000  # characters that are drawn again with each new word
_MATHS = (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))  # open, close, display
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
# The thread of an answer and the page's loop both draw. pygments puts another module in its own place while it is
# imported, so the second thread to import it found nothing there; lexers and the parser's rules are made at first use.
_one_at_a_time = threading.Lock()


def markdown_html(text: str) -> str:
    """Return a text in Markdown as HTML.

    Args:
        text: Anything: what is not seen is left out (`look.visible`), tags are shown as they were written.
    """
    text = visible(text)
    if len(text) > LONGEST_MARKDOWN:
        return f'<pre class="gqk-plain">{escape(text)}</pre>'
    with _one_at_a_time:
        parser = _parser()
    return parser.render(text)


class StreamedMarkdown:
    """Markdown that is still being written: what came is drawn once, only the last block again and again."""

    def __init__(self):
        self._text, self._start, self._done = "", 0, ""

    def html(self, text: str) -> str:
        """Return the HTML of a text of which the last call had the beginning."""
        if not text.startswith(self._text):
            self.__init__()
        self._text = text
        end = _end_of_whole_blocks(text, self._start)
        if end > self._start:
            self._done += markdown_html(text[self._start : end])
            self._start = end
        rest = text[self._start :]
        if len(rest) > _LONGEST_BLOCK:
            return f'{self._done}<pre class="gqk-plain">{escape(rest)}</pre>'
        return self._done + markdown_html(rest)


def _end_of_whole_blocks(text: str, start: int) -> int:
    """Return where the last blank line outside of code and maths ends; what follows may still change."""
    end, position, fence, is_maths = start, start, "", False
    for line in text[start:].splitlines(keepends=True):
        position += len(line)
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1].startswith(fence) and not line.strip(" \n" + fence[0]):
                fence = ""
        elif mark:
            fence = mark[1]
        else:
            is_maths ^= line.count("$$") % 2 == 1
        if not (line.strip() or fence or is_maths):
            end = position
    return end


@lru_cache(maxsize=1)
def _parser():
    from markdown_it import MarkdownIt

    parser = MarkdownIt("js-default", {"html": False, "highlight": _highlighted})
    parser.options["maxNesting"] = 30  # brackets in brackets take a time of length times depth
    parser.validateLink = _is_web_page
    parser.inline.ruler.before("escape", "maths", _read_maths)
    parser.add_render_rule("maths", lambda self, tokens, i, options, env: _maths(tokens[i]))
    parser.add_render_rule("image", _no_image)
    parser.add_render_rule("link_open", _link)
    parser.render("its rules are in order from here on")
    return parser


def _is_web_page(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return False


def _read_maths(state, silent: bool) -> bool:
    """Take a formula between dollars or brackets, as markdown-it's inline rules do."""
    if state.src[state.pos] not in "$\\":
        return False
    start, close, is_display = _opening(state.src, state.pos)
    end = state.src.find(close, start, min(state.posMax, start + LONGEST_TEX)) if close else -1
    if end <= start or (close == "$" and not _is_formula(state.src, start, end)):
        return False
    if not silent:
        token = state.push("maths", "math", 0)
        token.content, token.markup = state.src[start:end], "display" if is_display else "inline"
    state.pos = end + len(close)
    return True


def _opening(text: str, at: int) -> tuple[int, str, bool]:
    """Return where a formula that opens here starts, what closes it, and whether it has a line of its own."""
    for opening, close, is_display in _MATHS:
        if text.startswith(opening, at):
            return at + len(opening), close, is_display
    return at, "", False


def _is_formula(text: str, start: int, end: int) -> bool:
    """Tell a formula between single dollars from two prices in a sentence, by pandoc's rule."""
    inner = text[start:end]
    is_tight = not inner[0].isspace() and not inner[-1].isspace() and inner[-1] != "\\"
    return is_tight and "\n\n" not in inner and not text[end + 1 : end + 2].isdigit()


def _maths(token) -> str:
    return maths_html(token.content.strip(), is_display=token.markup == "display")


def _no_image(renderer, tokens, index: int, options, env) -> str:
    """Say that there is a picture: loading it would tell somebody's server who reads this."""
    token = tokens[index]
    what = f"{escape(token.content)}, {escape(token.attrGet('src'))}"
    return f'<span class="gqk-no-image">[picture, not loaded: {what}]</span>'


def _link(renderer, tokens, index: int, options, env) -> str:
    """Open a link that says where it leads."""
    url = str(tokens[index].attrGet("href"))
    host = escape(urllib.parse.urlsplit(url).hostname or "")
    return f'<a href="{escape(url)}" data-host="{host}" target="_blank" rel="noopener noreferrer nofollow">'


def _highlighted(code: str, language: str, attributes: str) -> str:
    """Return code with its words coloured, or an empty text to leave it as it is."""
    if not language or len(code) > _LONGEST_CODE:
        return ""
    with _one_at_a_time:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import get_lexer_by_name
        from pygments.util import ClassNotFound

        try:
            return highlight(code, get_lexer_by_name(language), HtmlFormatter(nowrap=True))
        except ClassNotFound:
            return ""
