"""The page of `python -m rope_ext explore` in a browser: numbers, keys, appearance."""

import json
import math
import re

import pytest
import torch

import rope_ext
from rope_ext import frequencies
from rope_ext.__main__ import main
from rope_ext.viz import Rope
from rope_ext.viz.page import METHODS, page

pytest.importorskip("selenium", reason="selenium is not installed")
from browser import Browser, programs

F64 = torch.float64
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
}
# An unusual multiple of 8, and a base that is not round.
LONGROPE_CONFIG = {
    "head_dim": 16,
    "rope_theta": 12345.0,
    "max_position_embeddings": 32768,
    "rope_scaling": LONGROPE,
}
# The page and torch do the same operations in float32, each rounded once, but some powers of base
# are off by 1 ulp, 2^-23. A mean has two powers: twice that. In llama3's steep ramp the error is up
# to factor / 3 times as large, for factors up to 32.
RELATIVE = 2.0**-23 * 16
SHOWN = 0.5e-6  # of cos and sin: 6 digits are shown
TABS = ["m", "m-exact", "n", "n-exact", "together", "pair"]
TABS += ["method", "base", "dim", "factor", "trained"]
NAMED = {"slider": 7, "spinbutton": 2, "checkbox": 1, "combobox": 1}


@pytest.fixture(scope="module")
def browser():
    if programs() is None:
        pytest.skip("no browser: install chromium and chromium-driver")
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page. At the end it must not have loaded anything else or reported errors."""
    path = tmp_path / "page.html"

    def open_page(config=None, width=1000, scheme="light"):
        path.write_text(page(Rope.of(config) if config else None), encoding="utf-8")
        browser.emulate(width, 800, scheme, phone=width < 500)
        browser.open(path)
        return browser

    yield open_page
    assert browser.problems() == []
    assert browser.requests() == [path.as_uri()]


def text_of(browser, id):
    return browser.evaluate(f"document.getElementById('{id}').textContent")


def number_of(browser, id):
    return float(text_of(browser, id).split(" of ")[0].replace(",", ""))


def value_of(browser, id):
    return browser.evaluate(f"document.getElementById('{id}').value")


def press(browser, id, key, times=1):
    browser.evaluate(f"document.getElementById('{id}').focus()")
    browser.press(key, times)


def type_number(browser, id, number):
    browser.evaluate(f"document.getElementById('{id}').select()")
    for digit in str(number):
        press(browser, id, digit)


def settings_of(browser):
    """The values of the visible controls."""
    settings = {id: number_of(browser, f"{id}-value") for id in ("base", "factor", "pair")}
    lengths = {id: int(number_of(browser, f"{id}-value")) for id in ("dim", "trained")}
    positions = {id: int(value_of(browser, f"{id}-exact")) for id in "mn"}
    return {**settings, **lengths, **positions, "method": value_of(browser, "method")}


def frequencies_of(method, base, dim, factor, trained, **_):
    original = {"original_max_position_embeddings": trained}
    scalings = {
        "default": {},
        "linear": {"factor": factor},
        "ntk": {"alpha": factor},
        "yarn": {"factor": factor, **original},
        "llama3": {**LLAMA3, "factor": factor, **original},
    }
    return frequencies.from_scaling(dim, {**scalings[method], "rope_type": method}, base=base)


# ---------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("method", METHODS)
def test_frequencies_are_those_of_rope_ext(method, opened):
    browser = opened()
    for of in [
        {"base": 500000.0, "dim": 128, "factor": 8.0, "trained": 8192},  # Llama 3
        {"base": 10000.0, "dim": 96, "factor": 32.0, "trained": 4096},  # rounded exponents
        {"base": 100.0, "dim": 8, "factor": 1.0, "trained": 512},  # a factor without effect
        {"base": 1e7, "dim": 256, "factor": 1.5, "trained": 131072},  # one frequency a pair
        {"base": 1000.0, "dim": 64, "factor": 64.0, "trained": 16},  # a context of few turns
    ]:
        inv_freq, scaling = frequencies_of(method, **of)
        given = {**of, "channels": of["dim"], "llama3": LLAMA3}
        got = browser.evaluate(f"METHODS.{method}({json.dumps(given)})")
        assert got["inverse"] == pytest.approx(inv_freq.tolist(), rel=RELATIVE)
        assert got["scaling"] == pytest.approx(scaling, rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_fast": 64.0, "beta_slow": 2.0},
        {"truncate": False},
        {"attention_factor": 1.25},
        {"mscale": 0.707, "mscale_all_dim": 1.0},
        {"mscale": 0.707},
    ],
    ids=str,
)
def test_yarn_has_the_parameters_of_the_config(options, opened):
    config = {"head_dim": 64, "max_position_embeddings": 32768}
    browser = opened({**config, "rope_scaling": {**YARN, **options}})
    inv_freq, scaling = frequencies.from_scaling(64, {**YARN, **options})
    got = browser.evaluate("frequenciesOf('yarn')")
    assert got["inverse"] == pytest.approx(inv_freq.tolist(), rel=RELATIVE)
    assert got["scaling"] == pytest.approx(scaling, rel=1e-12)


def test_angles_are_exact_at_any_position(opened):
    """cos and sin in float64 within 2^-50: two rounded sines and cosines, products and a sum."""
    browser = opened()
    inv_freq, _ = frequencies.default(128)
    positions = [0, 1, 4095, 65535, 65536, 1_000_003, 2**31 - 1]
    cos, sin = rope_ext.cos_sin(inv_freq.double(), torch.tensor(positions))
    call = f"{positions}.map((p) => {inv_freq.tolist()}.map((f) => turn(p, f)))"
    got = torch.tensor(browser.evaluate(call), dtype=F64)  # [S, P, 2]
    torch.testing.assert_close(got, torch.stack((cos, sin), -1), rtol=0, atol=2.0**-50)


# --------------------------------------------------------------------------- controls and numbers


def assert_numbers(browser):
    """The numbers on the page are rope_ext's for the values of the controls."""
    of = settings_of(browser)
    inv_freq, scaling = frequencies_of(**of)
    pair, m, n = int(of["pair"]), of["m"], of["n"]
    frequency = inv_freq[pair].item()
    assert number_of(browser, "frequency") == pytest.approx(frequency, rel=RELATIVE)
    assert number_of(browser, "wavelength") == pytest.approx(2 * math.pi / frequency, rel=RELATIVE)
    assert number_of(browser, "attention-scaling") == pytest.approx(scaling, rel=1e-6)
    for id, place in (("first-wavelength", 0), ("last-wavelength", -1)):  # 4 digits
        assert number_of(browser, id) == pytest.approx(
            2 * math.pi / inv_freq[place].item(), rel=1e-3
        )
    cos, sin = rope_ext.cos_sin(inv_freq, torch.tensor([m]), attention_scaling=scaling)
    # 2^-23: one ulp of the table, of numbers up to 2
    angle = SHOWN + 2.0**-23 + scaling * m * frequency * RELATIVE
    assert number_of(browser, "cos") == pytest.approx(cos[0, pair].item(), abs=angle)
    assert number_of(browser, "sin") == pytest.approx(sin[0, pair].item(), abs=angle)
    turned = (m - n) * frequency
    assert number_of(browser, "between") == pytest.approx(turned, rel=RELATIVE, abs=1e-12)
    assert number_of(browser, "distance") == m - n
    assert number_of(browser, "score") == pytest.approx(score(browser, of), abs=1e-4)


def score(browser, of):
    """q · k / sqrt(D) by apply_rotary in float64, with the page's vectors."""
    inv_freq, scaling = frequencies_of(**of)
    rotated = []
    for name, position in (("q", of["m"]), ("k", of["n"])):
        x = torch.tensor(browser.evaluate(f"data.{name}")[: of["dim"]], dtype=F64)
        cos, sin = rope_ext.cos_sin(
            inv_freq.double(), torch.tensor([[position]]), attention_scaling=scaling
        )
        rotated.append(rope_ext.apply_rotary(x.view(1, 1, 1, -1), cos, sin, interleaved=True))
    return (rotated[0] * rotated[1]).sum().item() / of["dim"] ** 0.5


@pytest.mark.parametrize(
    ("id", "key", "times", "changed"),
    [
        ("m", "ArrowRight", 5, "m"),
        ("n", "ArrowUp", 3, "n"),
        ("m", "End", 1, "m"),  # the largest angle of the slider
        ("pair", "ArrowLeft", 2, "pair"),
        ("pair", "End", 1, "pair"),
        ("base", "ArrowLeft", 4, "base"),
        ("dim", "ArrowLeft", 6, "dim"),
        ("method", "ArrowDown", 1, "method"),
        ("method", "ArrowDown", 2, "method"),
        ("method", "ArrowDown", 3, "method"),
        ("method", "ArrowDown", 4, "method"),
    ],
)
def test_numbers_follow_the_keys(id, key, times, changed, opened):
    browser = opened()
    before = settings_of(browser)
    assert_numbers(browser)
    press(browser, id, key, times)
    after = settings_of(browser)
    assert {name for name in after if after[name] != before[name]} == {changed}
    assert_numbers(browser)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "llama3"])
def test_numbers_follow_factor_and_trained_context(method, opened):
    browser = opened()
    press(browser, "method", "ArrowDown", METHODS.index(method))
    press(browser, "pair", "Home")
    press(browser, "pair", "PageUp", 5)  # about the middle, where every method differs
    before = number_of(browser, "frequency")
    press(browser, "factor", "ArrowRight", 3)
    press(browser, "trained", "ArrowLeft", 1)
    of = settings_of(browser)
    assert (of["method"], of["factor"], of["trained"]) == (method, 24, 4096)
    assert number_of(browser, "frequency") < before
    assert_numbers(browser)


@pytest.mark.parametrize(
    ("config", "shown"),
    [
        (
            {"head_dim": 80, "max_position_embeddings": 2048, "rope_theta": 25000},
            {"method": "default", "base": 25000, "dim": 80, "factor": 8, "trained": 2048},
        ),
        (
            {"head_dim": 64, "max_position_embeddings": 131072, "rope_scaling": LLAMA3},
            {"method": "llama3", "base": 10000, "dim": 64, "factor": 32, "trained": 8192},
        ),
        (  # half of the channels rotate; a length between the steps of the slider
            {
                "head_dim": 88,
                "partial_rotary_factor": 0.5,
                "max_position_embeddings": 24000,
                "rope_scaling": {**YARN, "original_max_position_embeddings": 6000},
            },
            {"method": "yarn", "base": 10000, "dim": 44, "factor": 4, "trained": 6000},
        ),
    ],
)
def test_page_starts_with_the_config(config, shown, opened):
    browser = opened(config)
    of = settings_of(browser)
    assert {name: of[name] for name in shown} == shown
    assert_numbers(browser)


def test_method_without_a_formula_here_is_shown_as_the_config_has_it(opened):
    browser = opened(LONGROPE_CONFIG)
    inv_freq, scaling = frequencies.from_config(LONGROPE_CONFIG, length=32768)
    assert value_of(browser, "method") == "config"
    press(browser, "pair", "End")
    frequency = inv_freq[-1].item()
    assert number_of(browser, "frequency") == pytest.approx(frequency, rel=1e-6)  # 7 digits
    assert number_of(browser, "attention-scaling") == pytest.approx(scaling, rel=1e-6)
    fixed = ["base", "dim", "factor", "trained"]
    disabled = f"{fixed}.map((id) => document.getElementById(id).disabled)"
    assert browser.evaluate(disabled) == [True] * 4
    assert chart(browser).keys() == {*METHODS, "config"}
    press(browser, "method", "Home")
    assert value_of(browser, "method") == "default"
    assert browser.evaluate(disabled) == [False] * 4
    assert_numbers(browser)
    press(browser, "dim", "ArrowRight")
    assert chart(browser).keys() == {*METHODS}  # no line of another head
    press(browser, "method", "End")
    assert (value_of(browser, "method"), number_of(browser, "dim-value")) == ("config", 16)


def test_score_stays_put_when_both_tokens_move(opened):
    browser = opened()
    dot = "[...document.querySelectorAll('#score-chart .dot')].map((d) => d.outerHTML)"

    def seen():
        return text_of(browser, "score"), text_of(browser, "distance"), browser.evaluate(dot)

    before, start = seen(), settings_of(browser)
    press(browser, "m", "ArrowRight", 7)
    assert seen()[0] != before[0]
    press(browser, "m", "ArrowLeft", 7)
    press(browser, "together", " ")
    for id, key, times, m in (
        ("m", "ArrowRight", 7, start["m"] + 7),
        ("n", "ArrowLeft", 3, start["m"] + 4),
        ("m", "Home", 1, start["m"] - start["n"]),  # n stops at 0, and m with it
    ):
        press(browser, id, key, times)
        after = settings_of(browser)
        assert (after["m"], after["n"]) == (m, m - start["m"] + start["n"])
        assert seen() == before
        assert_numbers(browser)
    type_number(browser, "n-exact", 1_000_000_000)
    assert settings_of(browser)["m"] == 1_000_000_000 + start["m"] - start["n"]
    assert seen() == before


def test_number_is_typed_digit_by_digit_while_both_move(opened):
    """m starts as 1, which would make n negative: typed text stays until it is complete."""
    browser = opened()
    start = settings_of(browser)
    assert start["m"] - start["n"] > 1
    press(browser, "together", " ")
    type_number(browser, "m-exact", 1000)
    of = settings_of(browser)
    assert (of["m"], of["n"]) == (1000, 1000 - start["m"] + start["n"])
    type_number(browser, "m-exact", 1)
    browser.press("Tab")
    of = settings_of(browser)
    assert (of["m"], of["n"]) == (start["m"] - start["n"], 0)
    press(browser, "m-exact", "ArrowUp", 3)
    press(browser, "m-exact", "ArrowDown", 9)
    assert (settings_of(browser)["m"], settings_of(browser)["n"]) == (of["m"], 0)


def test_positions_stay_within_their_bounds(opened):
    browser = opened()
    type_number(browser, "m-exact", 99999999999)
    browser.press("Tab")
    assert settings_of(browser)["m"] == 2**31 - 1
    browser.evaluate("document.getElementById('n-exact').value = '-5'")
    browser.evaluate("document.getElementById('n-exact').dispatchEvent(new Event('input'))")
    assert settings_of(browser)["n"] == 0
    browser.evaluate("document.getElementById('n-exact').value = ''")  # nothing typed yet
    browser.evaluate("document.getElementById('n-exact').dispatchEvent(new Event('input'))")
    assert number_of(browser, "distance") == 2**31 - 1
    browser.evaluate("document.getElementById('n-exact').dispatchEvent(new Event('change'))")
    assert settings_of(browser)["n"] == 0


# ---------------------------------------------------------------------------------- the pictures


def test_pair_points_where_cos_and_sin_say(opened):
    browser = opened()
    press(browser, "method", "ArrowDown", 3)  # yarn, whose scaling is not 1
    of = settings_of(browser)
    inv_freq, _ = frequencies_of(**of)
    circle = "document.querySelector('#pair-picture .edge')"
    x, y, r = browser.evaluate(f"['cx', 'cy', 'r'].map((a) => +{circle}.getAttribute(a))")
    for kind, position in (("query", of["m"]), ("key", of["n"])):
        line = f"document.querySelector('#pair-picture line.{kind}')"
        tip = browser.evaluate(f"['x2', 'y2'].map((a) => +{line}.getAttribute(a))")
        angle = position * inv_freq[int(of["pair"])].item()
        assert tip[0] == pytest.approx(x + r * math.cos(angle), abs=0.01)
        assert tip[1] == pytest.approx(y - r * math.sin(angle), abs=0.01)  # up is less


def test_tables_have_the_colours_of_cos_and_sin(opened):
    """matplotlib's cividis: nine of its colours with straight lines between, within 18."""
    matplotlib = pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
    browser = opened()
    type_number(browser, "m-exact", 700)
    first = 640
    inv_freq, _ = frequencies_of(**settings_of(browser))
    both = rope_ext.cos_sin(inv_freq, torch.arange(first, first + 128))  # [128, P] each
    assert f"positions {first} to {first + 127}" in text_of(browser, "table-text")
    for id, table in zip(("cos-table", "sin-table"), both, strict=True):
        cells = [(row, column) for row in range(0, 64, 3) for column in range(1, 128, 9)]
        cells = [(row, column) for row, column in cells if row > 14 or abs(column - 60) > 12]
        got = browser.evaluate(f"""(() => {{
          const {{ width, height }} = document.getElementById("{id}");
          const all = document.getElementById("{id}").getContext("2d")
            .getImageData(0, 0, width, height).data;
          return {[list(cell) for cell in cells]}.map(([row, column]) => {{
            const [x, y] = [(column + 0.5) * width / 128, (row + 0.5) * height / 64];
            const at = 4 * (Math.floor(y) * width + Math.floor(x));
            return [...all.slice(at, at + 4)];
          }});
        }})()""")
        values = torch.tensor([table[column, row] for row, column in cells])
        shades = matplotlib.colormaps["cividis"](((values + 1) / 2).numpy())
        assert (torch.tensor(got) - 255 * torch.tensor(shades)).abs().max() <= 18 + 1


def chart(browser):
    """Tokens a turn of each pair, [P] for each method, read from its line.

    The scale is read from the lines of the two contexts, whose tokens are known.
    """
    (y1, tokens1), (y2, tokens2) = browser.evaluate(
        "[...document.querySelectorAll('#wavelength-chart .context')]"
        ".map((line) => [+line.getAttribute('y1'), +line.dataset.tokens])"
    )
    paths = browser.evaluate(
        "[...document.querySelectorAll('#wavelength-chart path')]"
        ".map((path) => [path.dataset.method, path.getAttribute('d')])"
    )
    decades = math.log10(tokens2 / tokens1) / (y2 - y1)
    return {
        method: [
            10 ** (math.log10(tokens1) + (float(y) - y1) * decades)
            for _, y in re.findall(r"([\d.]+) ([\d.]+)", d)
        ]
        for method, d in paths
    }


def test_wavelength_chart_has_every_pair_of_every_method(opened):
    """Lines are drawn to 0.01 pixels; there are about 35 in a decade, and 1 % is 0.15."""
    browser = opened()
    got = chart(browser)
    assert list(got) == list(METHODS)
    of = settings_of(browser)
    for method in METHODS:
        inv_freq, _ = frequencies_of(**{**of, "method": method})
        assert got[method] == pytest.approx((2 * math.pi / inv_freq).tolist(), rel=0.01)
    marked = (
        "[...document.querySelectorAll('#wavelength-chart .context')].map((l) => +l.dataset.tokens)"
    )
    assert browser.evaluate(marked) == [of["trained"], of["trained"] * of["factor"]]


def test_page_has_the_extended_context_of_the_config(opened):
    """That of Llama 3.1, whose factor is smaller than the ratio of its lengths."""
    llama31 = {**LLAMA3, "factor": 8.0}
    browser = opened({"head_dim": 128, "max_position_embeddings": 131072, "rope_scaling": llama31})
    marked = (
        "[...document.querySelectorAll('#wavelength-chart .context')].map((l) => +l.dataset.tokens)"
    )
    assert browser.evaluate(marked) == [8192, 131072]
    assert "131,072" in text_of(browser, "wavelength-chart")
    press(browser, "factor", "ArrowRight")
    assert browser.evaluate(marked) == [8192, 8192 * 12]


@pytest.mark.parametrize(("m", "n"), [(20, 12), (7, 1006), (1_000_303, 1_000_000)])
def test_score_chart_has_the_scores_of_the_distances(m, n, opened):
    """The height of each point is linear in its score; the dot is at a corner of the line."""
    browser = opened()
    type_number(browser, "m-exact", m)
    type_number(browser, "n-exact", n)
    d = browser.evaluate("document.querySelector('#score-chart .curve').getAttribute('d')")
    points = [tuple(map(float, xy)) for xy in re.findall(r"([\d.]+) ([\d.]+)", d)]
    circle = "document.querySelector('#score-chart .dot')"
    dot = browser.evaluate(f"['cx', 'cy'].map((a) => +{circle}.getAttribute(a))")
    assert tuple(dot) in points

    span = max(64, 2 ** math.ceil(math.log2(abs(m - n))))
    of = settings_of(browser)
    distances = sorted([*(span * i // 64 for i in range(-64, 65)), m - n])
    assert len(points) == len(distances)
    of_sign = [{**of, "m": max(d, 0), "n": max(-d, 0)} for d in distances]
    expected = torch.tensor([score(browser, at) for at in of_sign])
    x, y = torch.tensor(points).unbind(-1)
    across = torch.tensor(distances) / span * (x[-1] - x[0]) / 2 + (x[0] + x[-1]) / 2
    torch.testing.assert_close(x, across, rtol=0, atol=0.02)  # pixels; drawn to 0.01
    up = y.max() - (expected - expected.min()) / (expected.max() - expected.min()) * (
        y.max() - y.min()
    )
    torch.testing.assert_close(y, up.float(), rtol=0, atol=0.02)


def test_page_says_what_the_shades_of_a_scaled_table_are(opened):
    browser = opened()
    press(browser, "method", "ArrowDown", METHODS.index("yarn"))
    scaling = number_of(browser, "attention-scaling")
    assert scaling > 1
    assert f"Dark is −{scaling:.4g}, light is {scaling:.4g}." in text_of(browser, "table-text")


def test_table_is_pointed_at(opened):
    """The same as the sliders, with a mouse or a finger."""
    browser = opened()
    box = browser.evaluate("""(() => {
      const canvas = document.getElementById("sin-table");
      canvas.scrollIntoView();
      const { x, y, width, height } = canvas.getBoundingClientRect();
      return [x, y, width, height];
    })()""")
    at = {"x": box[0] + box[2] * 90.5 / 128, "y": box[1] + box[3] * 33.5 / 64}
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    of = settings_of(browser)
    assert (of["m"], of["pair"]) == (90, 33)
    assert_numbers(browser)


# ------------------------------------------------------------------------------ accessibility


def test_every_control_is_reached_by_tab_and_seen_to_be(opened):
    browser = opened()
    seen = []
    for _ in TABS:
        browser.press("Tab")
        seen.append(
            browser.evaluate(
                "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle,"
                " parseFloat(getComputedStyle(document.activeElement).outlineWidth)]"
            )
        )
    assert [id for id, _, _ in seen] == TABS
    assert all(style == "solid" and width >= 2 for _, style, width in seen)


def test_every_control_and_picture_has_a_name(opened):
    browser = opened()
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        roles.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert {role: len(roles[role]) for role in NAMED} == NAMED
    for role in (*NAMED, "image", "heading", "form"):
        assert all(roles[role]), role
    assert len({name for role in NAMED for name in roles[role]}) == sum(NAMED.values())
    base = browser.evaluate("document.getElementById('base').getAttribute('aria-valuetext')")
    assert base == "500,000"  # not the value of the slider


CONTRASTS = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => channels(color).slice(0, 3).reduce((sum, value, i) => {
    const part = value / 255;
    const linear = part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    return sum + [0.2126, 0.7152, 0.0722][i] * linear;
  }, 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0) return color;
    }
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = { text: [], line: [], body: luminance(behind(document.body)) };
  for (const node of document.querySelectorAll("body *")) {
    const style = getComputedStyle(node);
    const words = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if ((words || node.matches("[type=number], select")) && !node.matches("script")) {
      const color = node.closest("svg") ? style.fill : style.color;
      found.text.push([node.textContent.trim() || node.id, contrast(color, behind(node))]);
    }
    if (node.matches(".method, .query, .key, .curve, .context, .edge")) {
      const around = behind(node.closest("section"));
      found.line.push([node.getAttribute("class"), contrast(style.stroke, around)]);
    }
    if (node.matches("[type=range], [type=checkbox]")) {
      found.line.push([node.id, contrast(style.accentColor, behind(node.parentElement))]);
    }
  }
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
def test_page_fits_and_stands_out(width, scheme, opened):
    """No horizontal scrolling on a phone; the contrasts of WCAG 2.2 (1.4.3, 1.4.11)."""
    browser = opened(width=width, scheme=scheme)
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width] * 2
    outside = f"""[...document.querySelectorAll("body *:not(script, option)")]
      .filter((node) => node.getBoundingClientRect().right > {width})
      .map((node) => node.outerHTML)"""
    assert browser.evaluate(outside) == []
    found = browser.evaluate(CONTRASTS)
    assert found["body"] > 0.9 if scheme == "light" else found["body"] < 0.1
    assert len(found["text"]) > 50
    assert [pair for pair in found["text"] if pair[1] < 4.5] == []
    assert len(found["line"]) > 10
    assert [pair for pair in found["line"] if pair[1] < 3] == []
    # large enough for a finger (2.5.8)
    small = """[...document.querySelectorAll("input, select")]
      .map((control) => [control.id, control.getBoundingClientRect()])
      .filter(([, { width, height }]) => Math.min(width, height) < 24).map(([id]) => id)"""
    assert browser.evaluate(small) == []


def test_pictures_follow_the_width_of_the_window(opened):
    browser = opened(width=1000)
    width = "document.getElementById('wavelength-chart').viewBox.baseVal.width"
    wide = browser.evaluate(width)
    browser.emulate(360, 800)
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    assert browser.evaluate(width) < wide / 2
    assert browser.evaluate("document.documentElement.scrollWidth") == 360


# ------------------------------------------------------------------------------ without a browser


def test_page_says_that_low_dimensions_turn_fast():
    assert "Low dimensions turn fast, high ones slowly." in page()
    assert "wrong way round" in page()


def test_page_is_one_file_that_fetches_nothing():
    text = page()
    assert "{{" not in text.replace("${{", "")
    assert re.findall(r"https?://", text) == []
    assert re.findall(r"(?:src|href)=\"(?!data:)", text) == []
    assert re.findall(r"@import|url\(|fetch\(|XMLHttpRequest|\bimport\b", text) == []
    assert text.count("<script") == text.count("</script>") == 2
    assert text == page()  # the same each time


def test_page_refuses_a_head_that_it_can_not_show():
    for head_dim in (2, 514):
        rope = Rope.of({"head_dim": head_dim, "max_position_embeddings": 64})
        with pytest.raises(ValueError, match=f"rotary_dim to be 4 to 512, got {head_dim}"):
            page(rope)


def test_command_writes_the_page(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LONGROPE_CONFIG))
    out = tmp_path / "page.html"
    assert main(["explore", "--config", str(tmp_path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == out.as_uri()
    assert out.read_text(encoding="utf-8") == page(Rope.of(LONGROPE_CONFIG))
