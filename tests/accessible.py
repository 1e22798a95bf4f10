"""What a panel owes to people who do not use a mouse, or do not see well: checked in the page that is open."""

import re

LEAST_CONTRAST, LEAST_CONTRAST_OF_BIG_TEXT = 4.5, 3.0  # WCAG 2.2, 1.4.3, level AA
NEEDS_NAME = "button|checkbox|combobox|group|img|link|listbox|option|radio|slider|spinbutton|switch|tab|textbox"
CONTROLS = "button, input:not([type=hidden]), select, textarea, a[href], summary, [role=slider], [tabindex]"
# Every text with too little contrast, as "text: ratio": its colour over whatever lies behind it, opacity included.
_PALE = r"""([panel, normal, big]) => {
  const parse = text => {
    const found = text.match(/[\d.]+/g)?.map(Number) ?? [0, 0, 0, 0];
    const scale = text.startsWith("color(") ? 255 : 1;
    return [...found.slice(0, 3).map(value => value * scale), found[3] ?? 1];
  };
  const over = (top, below) => top.slice(0, 3).map((value, i) => value * top[3] + below[i] * (1 - top[3]));
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, share, i) => sum + share * linear(colour[i] / 255), 0);
  const parents = element => element ? [element, ...parents(element.parentElement)] : [];
  const behind = element => parents(element).reverse().reduce((colour, each) =>
    over(parse(getComputedStyle(each).backgroundColor), colour), [255, 255, 255]);
  const drawnUnder = (text, box) => {
    const layers = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    return layers.filter(each => each.ownerSVGElement && /^(rect|circle|polygon|path)$/.test(each.tagName))
      .filter(each => text.compareDocumentPosition(each) & Node.DOCUMENT_POSITION_PRECEDING).reverse();
  };
  const pale = [], walker = document.createTreeWalker(panel, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || element.closest("style, script, option, title, [aria-hidden=true]")) continue;
    if (element.closest(":disabled, .mod-disabled") || element.matches(":has(:disabled)")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!box.width || !box.height || style.visibility === "hidden") continue;
    const isDrawn = Boolean(element.ownerSVGElement);
    let ground = behind(isDrawn ? element.ownerSVGElement.parentElement : element);
    if (isDrawn) {
      element.scrollIntoView({ block: "center" });
      for (const shape of drawnUnder(element, element.getBoundingClientRect())) {
        const fill = getComputedStyle(shape), colour = parse(fill.fill);
        colour[3] *= fill.fillOpacity * fill.opacity;
        if (fill.fill !== "none") ground = over(colour, ground);
      }
    }
    const colour = parse(isDrawn ? style.fill : style.color);
    if (isDrawn && style.stroke !== "none") ground = parse(style.stroke).slice(0, 3);  // a halo
    const seen = parents(element).reduce((share, each) => share * getComputedStyle(each).opacity, colour[3]);
    const [a, b] = [over([...colour.slice(0, 3), seen], ground), ground].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), size = parseFloat(style.fontSize);
    const isBig = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (isBig ? big : normal)) pale.push(`${node.data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return pale;
}"""
# The enabled controls of a panel that are seen, numbered in the page, and those among them outside of its box.
_NUMBER = """([panel, controls]) => {
  const box = panel.getBoundingClientRect(), outside = [];
  const seen = [...panel.querySelectorAll(controls)].filter(each =>
    each.getClientRects().length && !each.closest(":disabled, [aria-disabled=true], [disabled]") && each.tabIndex >= 0);
  document.querySelectorAll("[data-gqk-control]").forEach(each => each.removeAttribute("data-gqk-control"));
  seen.forEach((each, i) => { each.dataset.gqkControl = i; });
  for (const each of seen) {
    const { left, right } = each.getBoundingClientRect();
    if (left < box.left - 1 || right > box.right + 1) outside.push(each.outerHTML.slice(0, 80));
  }
  return [seen.length, outside];
}"""
# Controls that no key reaches: not in the order of Tab, and no neighbour of one that arrow keys move on from.
_UNREACHABLE = """([panel, controls]) => [...panel.querySelectorAll(controls)].filter(each =>
  each.getClientRects().length && each.tabIndex < 0 && !each.disabled && !each.closest("[aria-hidden=true]")
  && each.matches("button, input, select, textarea, a"))
  .map(each => each.outerHTML.slice(0, 120))"""


_LABELS = """sliders => sliders.map(slider => {
  const widget = slider.closest(".widget-slider, .widget-hslider, .widget-inline-hbox");
  return widget?.querySelector(".widget-label")?.textContent ?? "";  // innerText is empty out of view
})"""


def check_names(panel):
    """Every control and picture has a role and a name, as a screen reader is told them."""
    lines = panel.aria_snapshot().splitlines()
    nameless = [line for line in lines if re.match(rf"\s*- ({NEEDS_NAME})\b(?! [\"/])", line)]
    # ipywidgets names none of its sliders; what is written beside each stands in for that.
    labels = panel.locator("[role=slider], input[type=range]").evaluate_all(_LABELS)
    unnamed = [line for line in nameless if not line.strip().startswith("- slider")]
    assert unnamed == [], f"no name: {unnamed}"
    named = [label for label in labels if label.strip()]
    assert len(nameless) <= len(named), f"a slider without a label: {nameless}, {labels}"


def check_contrast(panel):
    """Every text stands out from what is behind it."""
    limits = [LEAST_CONTRAST, LEAST_CONTRAST_OF_BIG_TEXT]
    pale = panel.page.evaluate(_PALE, [panel.element_handle(), *limits])
    assert pale == [], f"too pale: {pale}"


def check_keyboard(panel):
    """Tab goes through every control of the panel, one after the other, and out of it again."""
    handle, page = panel.element_handle(), panel.page
    assert page.evaluate(_UNREACHABLE, [handle, CONTROLS]) == []
    count, _ = page.evaluate(_NUMBER, [handle, CONTROLS])
    if count:
        panel.locator("[data-gqk-control='0']").focus()
    reached = []
    for _ in range(count + 1):
        reached.append(page.evaluate("document.activeElement?.dataset.gqkControl ?? ''"))
        page.keyboard.press("Tab")
    assert len(set(reached) - {""}) == count, f"Tab reached {reached} of {count}"


def check_width(panel):
    """On a narrow page, or a zoomed one, nothing sticks out of the panel."""
    assert panel.evaluate("box => box.scrollWidth - box.clientWidth") <= 1, "the panel is wider than its box"
    assert panel.page.evaluate(_NUMBER, [panel.element_handle(), CONTROLS])[1] == []
