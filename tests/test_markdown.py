"""What a model writes becomes HTML that does nothing, whatever it is, and still reads as Markdown."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from gemma_qat_kit.widgets.markdown import LONGEST_MARKDOWN, StreamedMarkdown, markdown_html
from gemma_qat_kit.widgets.maths import LONGEST_TEX, maths_html

TAGS = set("p h1 h2 h3 em strong s code pre ul ol li blockquote hr br table thead tbody tr th td a span".split())  # noqa: SIM905
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "handler": "<img src=x onerror=alert(1)>",
    "svg": "<svg/onload=alert(1)>",
    "link": "[a](javascript:alert(1)) [b](data:text/html,<script>alert(1)</script>) <javascript:alert(1)>",
    "reference": "[a][b]\n\n[b]: javascript:alert(1)",
    "title": '[a](https://e.com "x\\" onmouseover=\\"alert(1)")',
    "picture": "![a](https://e.com/p.png) ![b](data:image/svg+xml,<svg onload=alert(1)>)",
    "fence": '```x" onclick="alert(1)\n<b>\n```',
    "maths": r"$\text{<img src=x onerror=alert(1)>}$ $\href{javascript:alert(1)}{x}$ $\style{a}{b}$",
    "entity": "&lt;script&gt; &#60;b&#62; $&lt;b&gt;$",
    "comment": "<!-- --><!DOCTYPE x><?php ?>",
    "unclosed": "<b\n\n`<b\n\n$<b",
}

RACE = """
import sys, threading
from gemma_qat_kit.widgets.markdown import markdown_html
sys.setswitchinterval(1e-6)
text = "# T\\n\\n```python\\nprint(1)\\n```\\n\\n$\\\\frac{1}{2}$"
start, drawn = threading.Barrier(4), []
def draw():
    start.wait()
    drawn.append(markdown_html(text))
threads = [threading.Thread(target=draw) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(drawn) == 4 and set(drawn) == {markdown_html(text)} and 'class="nb"' in drawn[0], drawn
"""


def _tags(html):
    return re.findall(r"<(/?\w[\w-]*)([^>]*)>", html)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_tag_of_the_model_survives(text):
    html = markdown_html(text)
    for name, attributes in _tags(re.sub(r"<math.*?</math>", "", html)):
        assert name.strip("/") in TAGS
        assert not re.search(r"\son\w+\s*=", re.sub(r'"[^"]*"', '""', attributes))
    assert "javascript:" not in "".join(re.findall(r'(?:href|src)="([^"]*)"', html))
    assert "<img" not in html
    for formula in re.findall(r"<math.*?</math>", html):
        assert not {"href", "style", "src"} & {
            key for part in ElementTree.fromstring(formula).iter() for key in part.attrib
        }


def test_markdown_reads_as_markdown():
    html = markdown_html("# T\n\n- **b** `c`\n\n|a|\n|-|\n|1|\n\n```python\nx = 1\n```\n\n[k](https://e.com/a)")
    assert all(part in html for part in ("<h1>T</h1>", "<strong>b</strong>", "<code>c</code>", "<td>1</td>"))
    assert 'class="mi"' in html
    assert 'href="https://e.com/a" data-host="e.com" target="_blank" rel="noopener noreferrer nofollow"' in html


@pytest.mark.parametrize("text", ["$x^2$", r"\(x^2\)", "$$x^2$$", "\\[\nx^2\n\\]"])
def test_formulas_become_mathml(text):
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in markdown_html(text)


@pytest.mark.parametrize("text", ["It costs $5 and $6.", "$ 1$", r"\$1$", "$", "a$$b", "$a\n\nb$"])
def test_prices_stay_prices(text):
    assert "<math" not in markdown_html(text)


@pytest.mark.parametrize("tex", [r"\frac{", "{" * 3000, r"\left(", "", "a" * (LONGEST_TEX + 1)])
def test_a_formula_that_cannot_be_read_is_shown_as_written(tex):
    assert maths_html(tex, is_display=False) == f'<code class="gqk-tex">{tex}</code>'


@pytest.mark.parametrize("unit", ["\\(", "$$", "$a", "> ", "*a ", "`", "|a", "- a\n", "[a](b", "<b>", "\\text{"])
def test_a_hundred_thousand_characters_are_drawn_with_known_tags_only(unit):
    html = markdown_html(unit * (100_000 // len(unit)))
    without_maths = re.sub(r"<math.*?</math>", "", html, flags=re.DOTALL)
    assert {name.strip("/") for name, _ in _tags(without_maths)} <= TAGS
    assert html.startswith("<")


def test_a_longer_text_is_shown_as_it_was_written():
    assert markdown_html("# <b>" + "x" * LONGEST_MARKDOWN).startswith('<pre class="gqk-plain"># &lt;b&gt;xxx')


def test_terminal_colours_and_reordering_go():
    assert markdown_html("\x1b[31ma\x1b[0m\u202eb\u2066c") == "<p>abc</p>\n"


def test_a_stream_ends_as_the_whole_would_and_draws_each_block_once(monkeypatch):
    text = "# T\n\nOne *two*.\n\n```python\na = 1\n\nb = 2\n```\n\n$$\na\n$$\n\nlast"
    drawn = []
    monkeypatch.setattr(
        "gemma_qat_kit.widgets.markdown.markdown_html", lambda part: drawn.append(part) or markdown_html(part)
    )
    streamed = StreamedMarkdown()
    for end in range(1, len(text) + 1):
        html = streamed.html(text[:end])
    assert html == markdown_html(text)
    assert drawn.count("# T\n\n") == 1
    assert not any(part.startswith("# T") for part in drawn[20:])
    assert streamed.html("another") == markdown_html("another")


def test_a_block_without_end_is_not_drawn_again_and_again():
    html = StreamedMarkdown().html("# T\n\n" + "*a* " * 3000)
    assert html.startswith("<h1>T</h1>")
    assert "<em>" not in html


def test_threads_that_draw_the_first_answer_together_all_find_what_they_need():
    subprocess.run([sys.executable, "-c", RACE], check=True, timeout=60)
