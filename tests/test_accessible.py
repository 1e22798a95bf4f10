"""The checks of names, keys, contrast and width say so when a panel lacks them."""

import accessible
import pytest
from lab import CHROMIUM, chromium_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install the package `chromium`"),
]
GOOD = (
    '<label>Size <select><option>E2B</option></select></label> <button>Load</button> <p style="color:#767676">Quiet</p>'
)
BAR = '<rect width="90" height="40" fill="{}"/><text x="5" y="25" fill="white">31B</text>'
DRAWN = f'<svg role="img" aria-label="31B" width="90" height="40">{BAR}</svg>'
SLIDER = (
    '<div class="widget-hslider"><label class="widget-label">{}</label><div role="slider" tabindex="0">.</div></div>'
)
BAD = {
    "a button without a name": (accessible.check_names, "<button></button>"),
    "a picture without a name": (accessible.check_names, '<svg role="img" width="9" height="9"></svg>'),
    "a slider without a label": (accessible.check_names, SLIDER.format(" ")),
    "grey on white, a shade too light": (accessible.check_contrast, '<p style="color:#787878">Quiet</p>'),
    "black that is faded": (accessible.check_contrast, '<div style="opacity:.5"><p>Quiet</p></div>'),
    "white on a pale bar": (accessible.check_contrast, DRAWN.format("#56B4E9")),
    "a button that Tab passes by": (
        accessible.check_keyboard,
        '<button>Load</button><button tabindex="-1">Stop</button>',
    ),
    "a field that keeps Tab": (accessible.check_keyboard, '<input onkeydown="return false"><button>Load</button>'),
    "a row that sticks out": (accessible.check_width, '<div style="width:500px">wide</div>'),
    "a button that sticks out": (accessible.check_width, '<button style="position:absolute;left:280px">Load</button>'),
}


@pytest.fixture(scope="module")
def page():
    with chromium_page(viewport={"width": 640, "height": 480}) as (page, _, _):
        yield page


def _panel(page, content):
    page.set_content(
        f'<body style="background:white"><main style="width:300px;position:relative">{content}</main></body>'
    )
    return page.locator("main")


@pytest.mark.parametrize("content", [GOOD, DRAWN.format("#000"), SLIDER.format("Context")])
def test_a_good_panel_passes(page, content):
    for check in (accessible.check_names, accessible.check_contrast, accessible.check_keyboard, accessible.check_width):
        check(_panel(page, content))


@pytest.mark.parametrize("what", BAD)
def test_a_bad_panel_does_not(page, what):
    check, content = BAD[what]
    with pytest.raises(AssertionError):
        check(_panel(page, content))
