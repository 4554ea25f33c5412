"""The page in a real browser: what it shows, by keyboard, on a narrow screen, in both schemes."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from engram_jax.analysis.memory_reading import jit_reading, read_document
from engram_jax.explore import app as module
from tests.explore.browser import Window, missing
from tests.explore.explored import CAPACITY, EXAMPLE, Page, tokenizer, trained
from tests.oracle.engram import hash_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.proof,
    pytest.mark.skipif(bool(missing()), reason=f"no browser test: {missing()}"),
]
PROMPT = "The cat sat"


@pytest.fixture(scope="module")
def window(page):
    made = Window(page.port)
    yield made
    made.driver.quit()


@pytest.fixture(autouse=True)
def _opened(window):
    """Every test begins with a fresh page, and leaves no message in the console."""
    window.size(1000)
    window.scheme("light")
    window.driver.get_log("browser")
    window.open()
    yield
    assert window.driver.get_log("browser") == []


def rows_shown(window) -> list[int]:
    cells = window.texts("#row-list td[data-label=row]")
    return [int(cell.replace(",", "")) for cell in cells]


def test_it_begins_with_an_example(window):
    assert window.js("return document.getElementById('prompt').value") == EXAMPLE
    assert window.texts("#model") == ["unnamed, run random, step 7"]
    assert window.js("return document.title") == "What the memory does with a text"


def test_tokens_rows_and_gates_are_right(window):
    """Rows against the oracle's hash; gates against the model's own forward pass."""
    model, layer = trained(), trained().program.addressing.layers[1]
    ids = np.array(tokenizer().encode(PROMPT).ids)
    canonical = model.program.addressing.compression[ids]
    rows = hash_rows(canonical, layer, model.program.addressing.pad_id)
    reading = read_document(jit_reading(model.program), model.weights, ids)["1"]
    window.shows(PROMPT)
    shown = window.texts("[role=option] .token")
    assert "".join(shown) == PROMPT.replace(" ", "␣") and len(shown) == len(ids)
    assert window.texts("[role=option] small") == [str(i) for i in canonical]
    assert window.texts("#length") == [f"{len(ids)} of at most {CAPACITY} tokens"]
    for at in (len(ids) - 1, 0, 2):
        window.js("document.getElementById(arguments[0]).click()", f"token-{at}")
        window.wait_for(at)
        assert rows_shown(window) == rows[at].tolist()
        mean = reading.gates.mean(axis=1)
        cells = window.texts("#gate-table td")
        assert cells == [f"{g:.2f}" for g in [*reading.gates[at], mean[at]]]
        norms = np.sqrt((reading.rows[at].astype(np.float64) ** 2).sum(-1))
        assert window.texts("#row-list td[data-label=norm]") == [f"{x:.2f}" for x in norms]
    colours = window.js(
        "return [...document.querySelectorAll('.ribbon[data-layer=\"1\"] li')]"
        ".map(e => Number(e.style.getPropertyValue('--v')))"
    )
    np.testing.assert_allclose(colours, mean, rtol=1e-4)
    window.js(
        "const b = document.getElementById('branch'); b.value = '2';"
        "b.dispatchEvent(new Event('change'))"
    )
    told = window.texts(".ribbon[data-layer='1'] .sr")
    assert [float(t) for t in told] == [round(float(g), 2) for g in reading.gates[:, 2]]
    assert re.search(r"counted over \d+ of \d+ training tokens", window.texts("#training")[0])


def test_the_next_token_has_two_distributions(window, shown):
    window.shows(PROMPT)
    wanted = shown.look(PROMPT)["chosen"]["next"]
    for side in ("with", "without"):
        cells = window.texts(f"#next td[data-label={side}]")
        found = [float(cell.removesuffix(" %")) for cell in cells]
        np.testing.assert_allclose(found, [100 * n[side] for n in wanted], atol=0.051)
    points = [float(c.replace("−", "-").split()[0]) for c in window.texts("#next td.number")]
    differences = [100 * (n["with"] - n["without"]) for n in wanted]
    np.testing.assert_allclose(points, differences, atol=0.051)


def test_by_keyboard_alone(window):
    window.shows(PROMPT)
    last = len(window.texts("[role=option]")) - 1
    assert window.focused() == "prompt"
    window.press(window.keys.TAB)
    assert window.focused() == "list" and window.chosen() == last
    outline = (
        "const s = getComputedStyle(document.activeElement);"
        " return [s.outlineStyle, s.outlineWidth]"
    )
    assert window.js(outline) == ["solid", "3px"]
    for key, at in (
        ("ARROW_LEFT", last - 1),
        ("HOME", 0),
        ("ARROW_LEFT", 0),
        ("ARROW_RIGHT", 1),
        ("END", last),
        ("ARROW_RIGHT", last),
    ):
        window.press(getattr(window.keys, key))
        assert window.chosen() == at
        window.wait_for(at)
    selected = "return [...document.querySelectorAll('[aria-selected=true]')].map(e => e.id)"
    assert window.js(selected) == [f"token-{last}"]
    window.press(window.keys.TAB)
    assert window.focused() == "branch"
    window.press(window.keys.ARROW_DOWN)
    assert window.js("return document.activeElement.value") == "0"
    window.press(window.keys.ESCAPE)
    assert window.focused() == "prompt"
    window.press(" on", window.keys.TAB)
    window.press(window.keys.HOME, window.keys.ESCAPE)
    assert window.focused() == "prompt"


def test_up_and_down_move_by_lines(window):
    window.size(360)
    window.shows("the cat and the hat and a cat")
    window.js("document.getElementById('list').focus()")
    where = "return document.getElementById('token-' + arguments[0]).getBoundingClientRect().top"
    before = window.chosen()
    window.press(window.keys.ARROW_UP)
    above = window.chosen()
    assert above < before
    tops = window.js("return [...document.querySelectorAll('[role=option]')].map(e => e.offsetTop)")
    assert len(set(tops)) > 1 and tops[above] == max(t for t in tops if t < tops[before])
    window.press(window.keys.ARROW_DOWN)
    assert tops[window.chosen()] == tops[before]
    assert window.js(where, window.chosen()) > 0


@pytest.mark.parametrize("width", [360, 320])
def test_a_narrow_screen_does_not_scroll_sideways(window, width):
    window.size(width, 640)
    for prompt in (PROMPT, "W" * CAPACITY, "\n" * CAPACITY, "x" * 4 + " " * 19):
        window.shows(prompt)
        widths = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
        scrolls, seen = window.js(widths)
        assert scrolls == seen <= width
        beyond = window.js(
            "return [...document.querySelectorAll('main *:not(.sr)')].filter(e => "
            "e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + .5)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        assert [e for e in beyond if not e.startswith(("<thead", "<tr", "<th"))] == []


LITERAL = [
    "<script>throw 1</script>",
    "<b>&amp;</b>",
    "😀 中文",
    "שלום\u202e",
    "a\u0000\u001b\u2028",
]


@pytest.mark.parametrize("prompt", LITERAL)
def test_a_text_is_shown_and_never_read_as_html(window, prompt):
    before = window.js("return document.querySelectorAll('script').length")
    window.shows(prompt)
    assert window.js("return document.querySelectorAll('script, main b, main img').length") <= (
        before + window.js("return document.querySelectorAll('code b, .scale b').length")
    )
    data = bytearray()
    for token in window.texts("[role=option] .token"):
        bytes_of = re.fullmatch("‹(.*)›", token)
        escaped = re.fullmatch(r"\\x([0-9a-f]{2})", token)
        text = token.replace("␣", " ").replace("↵", "\n").replace("⇥", "\t")
        if bytes_of or escaped:
            data += bytes.fromhex((bytes_of or escaped)[1])
        else:
            data += text.encode()
    assert data.decode() == prompt


def test_an_empty_text(window):
    window.shows("")
    assert window.texts("#length") == [f"Type a text of at most {CAPACITY} tokens."]
    assert not window.js("return document.getElementById('answer').checkVisibility()")
    window.shows("the")
    assert window.js("return document.getElementById('answer').checkVisibility()")


def error(window) -> str:
    return window.until(
        "const e = document.getElementById('error');return e.checkVisibility() && e.textContent"
    )


def test_a_text_that_is_too_long_is_one_line(window):
    window.type("b " * 40)
    line = error(window)
    assert re.fullmatch(rf"text: has \d+ tokens; must have at most {CAPACITY}", line)
    window.js(
        "document.getElementById('token-0').click()"
    )  # of the text before: nothing to look at
    time.sleep(0.2)
    assert error(window) == line
    window.driver.get_log("browser")  # the browser notes that the status was 400
    window.shows(PROMPT)
    assert not window.js("return document.getElementById('error').checkVisibility()")


def test_errors_of_the_server_are_shown(window, monkeypatch):
    monkeypatch.setattr(module, "WAITING", 0)
    window.type("the")
    assert error(window) == "0 texts wait for an answer; try again later"
    window.driver.get_log("browser")


def test_a_server_that_has_gone_is_told(window, shown):
    with Page(shown) as other:
        window.driver.get(f"http://127.0.0.1:{other.port}/")
        window.until("return document.querySelectorAll('[role=option]').length > 0")
    window.type("the")
    assert error(window) == "The server does not answer; is it still running?"
    window.driver.get_log("browser")


def test_nothing_is_asked_of_another_server(window):
    window.shows(PROMPT)
    names = window.js("return performance.getEntries().map(e => e.name)")
    asked = [name for name in names if "://" in name]
    assert len(asked) >= 5 and all(name.startswith(window.url) for name in asked)
    blocked = window.js(
        "return new Promise(done => { document.addEventListener('securitypolicyviolation',"
        " e => done(e.effectiveDirective)); new Image().src = 'http://127.0.0.1:1/'; })"
    )
    assert blocked == "img-src"
    window.driver.get_log("browser")


# Everything with text of its own: its colour on the first background behind it that is not clear.
CONTRASTS = """
const rgb = text => {
  const all = text.match(/[\\d.]+/g).map(Number);
  return text.startsWith('color(') ? [...all.slice(0, 3).map(x => 255 * x), all[3] ?? 1]
                                   : [...all.slice(0, 3), all[3] ?? 1];
};
const light = c => { const [r, g, b] = c.map(x => x / 255).map(
  x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&
    !e.closest('.sr, option, [aria-hidden=true]') &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
  const behind = e => rgb(getComputedStyle(e).backgroundColor);
  let back = e, found = behind(e);
  while (found[3] === 0) { back = back.parentElement; found = behind(back); }
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(found)];
  return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 80)];
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_sufficient(window, scheme):
    """WCAG 2's 4.5 to 1 for all text, where gates are closed, open and between."""
    window.scheme(scheme)
    window.shows(PROMPT)
    papers = []
    for value in ("", "0", "0.5", "1"):
        if value:
            window.js(
                "for (const e of document.querySelectorAll('.ribbon li, .heat'))"
                " e.style.setProperty('--v', arguments[0])",
                value,
            )
        found = window.js(CONTRASTS)
        assert len(found) > 60
        assert [f for f in found if f[0] < 4.5] == []
        papers.append(window.js("return getComputedStyle(document.body).backgroundColor"))
    wanted = {"light": "rgb(251, 250, 247)", "dark": "rgb(25, 24, 22)"}
    assert set(papers) == {wanted[scheme]}


def test_every_part_has_a_name(window):
    """For who does not see the page: the browser's own accessibility tree."""
    window.shows(PROMPT)
    nodes = window.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    by_role: dict[str, list[str]] = {}
    for node in nodes:
        if not node["ignored"]:
            name = node.get("name", {}).get("value", "")
            by_role.setdefault(node["role"]["value"], []).append(name)
    assert by_role["textbox"] == ["Text"]
    assert by_role["listbox"] == ["Tokens, and the ids that are hashed"]
    assert by_role["combobox"] == ["Colour by"]
    assert len(by_role["option"]) >= len(window.texts("[role=option]"))
    assert by_role["option"][0].startswith('"The", canonical id ')
    assert len(by_role["table"]) == 3 and all(by_role["columnheader"])
    assert len(by_role["heading"]) == len(set(by_role["heading"])) >= 8
