"""What the widgets share in looks: colours from the host's theme, safe text, status lines and errors."""

import html
import re
import unicodedata

from gemma_qat_kit.errors import KitError
from gemma_qat_kit.progress import Progress
from gemma_qat_kit.units import readable_bytes

# Every colour is one of JupyterLab's own variables, with a fallback that reads on light and on dark (Colab, VS Code).
STYLE = """<style>
.gqk-panel-box {
  border: 1px solid var(--jp-border-color2, rgba(127, 127, 127, .4)); border-radius: 6px; padding: 12px;
  color: var(--jp-ui-font-color1, inherit); font-family: var(--jp-ui-font-family, system-ui, sans-serif);
}
.gqk-panel-box .widget-label, .gqk-panel-box .widget-html-content { color: inherit; }
.gqk-text { font-size: var(--jp-ui-font-size1, 13px); line-height: 1.5; overflow-wrap: anywhere; }
.gqk-text code {
  font-family: var(--jp-code-font-family, monospace); font-size: 1em; padding: 1px 5px; border-radius: 3px;
  background: rgba(127, 127, 127, .15); color: inherit;
}
.gqk-quiet { color: var(--jp-ui-font-color2, inherit); }
.gqk-panel-box .widget-label { text-align: left; }
.gqk-facts { display: grid; grid-template-columns: 80px minmax(0, 1fr); gap: 4px 8px; margin: 6px 0; }
.gqk-bar {
  height: 12px; margin: 5px 0 3px; border: 1px solid var(--jp-border-color1, rgba(127, 127, 127, .6));
  border-radius: 3px; overflow: hidden; background: rgba(127, 127, 127, .12);
}
.gqk-bar > div {
  height: 100%; box-sizing: border-box; border-right: 2px solid var(--jp-ui-font-color1, #888);
  box-shadow: inset 0 0 0 1px rgba(127, 127, 127, .8);
}
.gqk-error { border-left: 4px solid #D55E00; padding-left: 10px; }
.gqk-error p, .gqk-status p { margin: 0; }
.gqk-error p:first-child { font-weight: 600; }
</style>"""
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # ECMA-48: a control sequence, such as a colour
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Kept although they are format characters: two joiners without which Persian, Hindi and some emoji come apart.
_JOINERS = "\u200c\u200d"


def visible(text: object) -> str:
    """Return a text without what is not seen: terminal colours, control and format characters.

    Some of them (Unicode categories Cc, Cf, Cs, Zl, Zp) reorder or hide the text around them: a model could show
    something other than what it wrote.
    """
    text = _TERMINAL.sub("", str(text))
    if text.isascii() and text.isprintable():  # most of what is shown ten times a second
        return text
    return "".join(c for c in text if c in "\n\t" + _JOINERS or unicodedata.category(c) not in _UNSAFE_CATEGORIES)


def escape(text: object) -> str:
    """Turn text that somebody else wrote into HTML that shows what is `visible` of it and does nothing else."""
    return html.escape(visible(text))


def status_html(text: str) -> str:
    """Draw a status line that screen readers announce."""
    return f'<div class="gqk-text gqk-status" role="status" aria-live="polite">{escape(text)}</div>'


def error_html(error: BaseException) -> str:
    """Draw an error where the eye already is, its three parts on three lines."""
    if isinstance(error, KitError):
        parts = [error.wrong, error.allowed, error.next_step]
    else:
        parts = [f"{type(error).__name__}: {error}"]
    lines = "".join(f"<p>{escape(part)}</p>" for part in parts if part)
    return f'<div class="gqk-text gqk-error" role="alert">{lines}</div>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, opacity: float) -> str:
    """Draw a line of an SVG."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'


def amount_done(progress: Progress | None) -> str:
    """Say how much of a long job is done, in its own unit: "512 MiB of 1.00 GiB", "64 of 256 tokens"."""
    if progress is None or not progress.done_bytes:
        return ""
    is_bytes = progress.unit == "B"
    show = readable_bytes if is_bytes else "{:,}".format
    total = f" of {show(progress.total_bytes)}" if progress.total_bytes else ""
    return f"{show(progress.done_bytes)}{total}{'' if is_bytes else f' {progress.unit}'}"
