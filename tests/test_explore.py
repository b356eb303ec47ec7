"""The page of `python -m rope_ext explore` in a browser: numbers, keys, appearance."""

import json
import math
import re
import time

import numpy
import pytest
import torch

import rope_ext
from rope_ext import frequencies
from rope_ext.__main__ import main
from rope_ext.viz import ModelRotation
from rope_ext.viz.page import METHODS, page, two_vectors
from rope_ext.viz.published import CONFIGS

pytest.importorskip("selenium", reason="pip install 'rope_ext[test]'")
pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
import matplotlib
from browser import Browser, programs
from PIL import Image, ImageChops, ImageStat
from selenium.webdriver import Keys

F64 = torch.float64
LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6000}
YARN |= {"beta_fast": 64.0, "beta_slow": 2.0, "attention_factor": 1.25}
# The page and torch do the same operations in float32, each rounded once, but some powers of base
# are off by 1 ulp, 2^-23. A mean has two powers: twice that. In llama3's steep ramp the error is up
# to factor / 3 times as large, for factors up to 32.
RELATIVE = 2.0**-23 * 16
SHOWN = 0.5e-6  # of cos and sin: 6 digits are shown
NAMED = {"slider": 7, "spinbutton": 2, "checkbox": 1, "combobox": 2, "button": 6}
# The height and the tokens of the lines of two contexts.
CONTEXTS = "[...document.querySelectorAll('[data-tokens]')]"
CONTEXTS += ".map((line) => [+line.getAttribute('y1'), +line.dataset.tokens])"
SETTINGS = ("method", "base", "dim", "factor", "trained")


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

    def open_page(fragment="", width=1000, scheme="light"):
        path.write_text(page(), encoding="utf-8")
        browser.emulate(width, 800, scheme)
        browser.open(path, fragment)
        return browser

    yield open_page
    assert browser.problems() == []
    assert {url for url in browser.requests() if not url.startswith("data:")} == {path.as_uri()}


def press(browser, id, key, times=1):
    browser.evaluate(f"byId('{id}').focus()")
    browser.press(key, times)


def type_number(browser, id, number):
    browser.evaluate(f"byId('{id}').select()")
    for digit in str(number):
        press(browser, id, digit)


def shown(browser):
    return browser.evaluate("""(() => {
      const found = {};
      for (const { id, textContent } of document.querySelectorAll("output")) {
        found[id.replace("-value", "")] = Number(textContent.split(" of ")[0].replaceAll(",", ""));
      }
      for (const id of ["m", "n"]) found[id] = byId(`${id}-exact`).valueAsNumber;
      return { ...found, method: byId("method").value };
    })()""")


def settings_of(browser):
    got = shown(browser)
    return {id: got[id] for id in ("m", "n", "pair", *SETTINGS)}


def frequencies_of(method, base, dim, factor, trained, yarn=None, **_):
    original = {"factor": factor, "original_max_position_embeddings": trained}
    scaling = {
        "linear": {"factor": factor},
        "ntk": {"alpha": factor},
        "yarn": {**original, **(yarn or {})},
        "llama3": {**original, **LLAMA3_BANDS},
    }.get(method, {})
    return frequencies.from_scaling(dim, {**scaling, "rope_type": method}, base=base)


def test_frequencies_are_those_of_rope_ext(opened):
    like_llama = (500000.0, 128, 8.0, 8192)
    settings = [
        like_llama,
        (10000.0, 96, 32.0, 4096),  # rounded exponents
        (100.0, 8, 1.0, 512),  # a factor without effect
        (1e7, 256, 1.5, 131072),  # one frequency a pair
        (1000.0, 64, 64.0, 16),  # a context of few turns
    ]
    cases = [(method, of, {}) for of in settings for method in METHODS]
    betas, factors = {"beta_fast": 64.0, "beta_slow": 2.0}, {"mscale": 0.707, "mscale_all_dim": 1.0}
    for yarn in (
        betas,
        {"truncate": False},
        {"attention_factor": 1.25},
        factors,
        {"mscale": 0.707},
    ):
        cases.append(("yarn", like_llama, yarn))
    names = ("base", "channels", "factor", "trained")
    given = [
        [method, dict(zip(names, of, strict=True)) | {"llama3": LLAMA3_BANDS, "yarn": yarn}]
        for method, of, yarn in cases
    ]
    call = f"{json.dumps(given)}.map(([name, of]) => METHODS[name](of))"
    for (method, of, yarn), got in zip(cases, opened().evaluate(call), strict=True):
        inv_freq, scaling = frequencies_of(method, *of, yarn=yarn)
        assert got["inverse"] == pytest.approx(inv_freq.tolist(), rel=RELATIVE), (method, of, yarn)
        assert got["scaling"] == pytest.approx(scaling, rel=1e-12), (method, of, yarn)


def test_angles_are_exact_at_any_position(opened):
    """cos and sin in float64 within 2^-50: two rounded sines and cosines, products and a sum."""
    inv_freq, _ = frequencies.default(128)
    positions = [0, 1, 4095, 65535, 65536, 1_000_003, 2**31 - 1]
    cos, sin = rope_ext.cos_sin(inv_freq.double(), torch.tensor(positions))
    call = f"{positions}.map((p) => {inv_freq.tolist()}.map((f) => turn(p, f)))"
    got = torch.tensor(opened().evaluate(call), dtype=F64)  # [S, P, 2]
    torch.testing.assert_close(got, torch.stack((cos, sin), -1), rtol=0, atol=2.0**-50)


def assert_numbers(browser, expected=None):
    """The numbers on the page are rope_ext's for the values of the controls."""
    got = shown(browser)
    inv_freq, scaling = expected or frequencies_of(**got)
    pair, m, n = got["pair"], got["m"], got["n"]
    frequency = inv_freq[pair].item()
    cos, sin = rope_ext.cos_sin(inv_freq, torch.tensor([m]), attention_scaling=scaling)
    (score,) = scores([m - n], inv_freq, scaling)
    # 2^-23: one ulp of the table, of numbers up to 2
    angle = {"abs": SHOWN + 2.0**-23 + scaling * m * frequency * RELATIVE}
    for id, number, within in [
        ("frequency", frequency, {"rel": RELATIVE}),
        ("wavelength", 2 * math.pi / frequency, {"rel": RELATIVE}),
        ("first-wavelength", 2 * math.pi / inv_freq[0].item(), {"rel": 1e-3}),  # 4 digits
        ("last-wavelength", 2 * math.pi / inv_freq[-1].item(), {"rel": 1e-3}),
        ("attention-scaling", scaling, {"rel": 1e-6}),
        ("cos", cos[0, pair].item(), angle),
        ("sin", sin[0, pair].item(), angle),
        ("between", (m - n) * frequency, {"rel": RELATIVE, "abs": 1e-12}),
        ("distance", m - n, {}),
        ("score", score, {"abs": 1e-4}),
    ]:
        assert got[id] == pytest.approx(number, **within), (id, got)


def scores(distances, inv_freq, scaling):
    """q · k / sqrt(D) by apply_rotary in float64, with the page's vectors, of k at position 0."""
    dim, shape = 2 * len(inv_freq), (1, len(distances), 1, -1)
    q, k = (torch.tensor(x, dtype=F64)[:dim] for x in two_vectors().values())
    cos, sin = rope_ext.cos_sin(inv_freq.double(), torch.tensor([distances]).abs())
    sin = sin * torch.tensor(distances).sign()[:, None]
    turned = rope_ext.apply_rotary(q.expand(shape), cos, sin, interleaved=True)
    return (scaling**2 * (turned * k).sum(-1) / dim**0.5).flatten().tolist()


def test_numbers_follow_the_keys(opened):
    browser = opened()
    assert_numbers(browser)
    for id, key, times in [
        ("m", Keys.ARROW_RIGHT, 5),
        ("n", Keys.ARROW_UP, 3),
        ("m", Keys.END, 1),  # the largest angle of the slider
        ("base", Keys.ARROW_LEFT, 4),
        ("pair", Keys.PAGE_DOWN, 5),  # about the middle, where every method differs
        *[("method", Keys.ARROW_DOWN, 1)] * 2,
        ("factor", Keys.ARROW_RIGHT, 3),
        ("method", Keys.ARROW_DOWN, 1),
        ("trained", Keys.ARROW_LEFT, 1),
        ("method", Keys.ARROW_DOWN, 1),
        ("dim", Keys.ARROW_RIGHT, 6),
    ]:
        before = settings_of(browser)
        press(browser, id, key, times)
        after = settings_of(browser)
        assert {name for name in after if after[name] != before[name]} == {id}
        assert_numbers(browser)


def test_models_to_pick_from_have_the_numbers_of_their_configs(opened):
    browser = opened()
    assert browser.evaluate("data.models.slice(1).map(({ name }) => name)") == list(CONFIGS)
    for config in CONFIGS.values():
        press(browser, "model", Keys.ARROW_DOWN)
        model = ModelRotation.of(config)
        assert_numbers(browser, (model.inv_freq, model.attention_scaling))
        marked = [tokens for _, tokens in browser.evaluate(CONTEXTS)]
        assert marked == [model.trained, model.extended]


def seen_of_the_score(browser):
    dot = "document.querySelector('#score-chart .dot').outerHTML"
    return browser.evaluate(f"[byId('score').textContent, byId('distance').textContent, {dot}]")


def test_score_stays_put_when_both_tokens_move(opened):
    browser = opened()
    before = seen_of_the_score(browser)
    press(browser, "m", Keys.ARROW_RIGHT, 7)
    assert seen_of_the_score(browser)[0] != before[0]
    press(browser, "m", Keys.ARROW_LEFT, 7)
    press(browser, "together", " ")
    press(browser, "m", Keys.ARROW_RIGHT, 7)
    assert (shown(browser)["m"], shown(browser)["n"]) == (27, 19)
    press(browser, "m", Keys.HOME)  # n stops at 0, and m with it
    assert (shown(browser)["m"], shown(browser)["n"]) == (8, 0)
    type_number(browser, "n-exact", 1_000_000_000)
    assert shown(browser)["m"] == 1_000_000_008
    assert seen_of_the_score(browser) == before
    type_number(browser, "m-exact", 1)  # n would be negative: what is typed stays until it is left
    assert (shown(browser)["m"], shown(browser)["n"]) == (1, 0)
    browser.press(Keys.TAB)
    assert shown(browser)["m"] == 8
    type_number(browser, "m-exact", 99999999999)
    browser.press(Keys.TAB)
    assert shown(browser)["m"] == 2**31 - 1


def test_play_moves_both_tokens_on_until_it_is_pressed_again(opened):
    browser = opened(f"#m={2**31 - 6}&n=1000")
    before = seen_of_the_score(browser)
    press(browser, "play", " ")
    time.sleep(1.2)
    assert (shown(browser)["m"], shown(browser)["n"]) == (2**31 - 1, 1005)  # the last position
    assert seen_of_the_score(browser) == before
    press(browser, "m", Keys.HOME)
    press(browser, "play", " ")
    at = shown(browser)["m"]
    time.sleep(0.4)
    assert shown(browser)["m"] == at


def address(browser):
    time.sleep(0.4)  # it is written 0.25 s after the last change
    return browser.evaluate("location.hash")


def test_address_brings_back_the_view_and_reset_the_start(opened):
    browser = opened()
    press(browser, "model", "g")  # Gemma 3, global layers
    press(browser, "method", Keys.END)
    press(browser, "base", Keys.ARROW_RIGHT)
    press(browser, "together", " ")
    type_number(browser, "m-exact", 123456)
    sent, of = address(browser), settings_of(browser)
    model = "#model=Gemma+3%2C+global+layers"
    assert sent == f"{model}&m=123456&n=123448&together=1&method=llama3&base=2000000"
    press(browser, "reset", " ")
    assert (shown(browser)["m"], address(browser)) == (20, model)
    assert settings_of(opened(sent)) == of
    assert_numbers(browser)


def test_address_with_nonsense_shows_the_start(opened):
    start = settings_of(opened())
    bad = "#model=none&m=-1&n=1.5&pair=x&method=spiral&base=0&dim=7&factor=Infinity&trained=1e99"
    assert settings_of(opened(bad)) == start
    assert settings_of(opened("#method=config")) == start  # of another model
    of = settings_of(opened("#pair=255&dim=8&factor=5.5"))
    assert (of["pair"], of["factor"]) == (3, 5.5)


def box_of(browser, id):
    """Scrolls to a picture. Left, top, right, bottom in the window, in pixels."""
    browser.evaluate(f"byId('{id}').scrollIntoView()")
    box = f"(({{ left, top, right, bottom }}) => [left, top, right, bottom])(byId('{id}')"
    return [round(side) for side in browser.evaluate(f"{box}.getBoundingClientRect())")]


def test_pair_points_where_cos_and_sin_say(opened):
    browser = opened("#method=yarn")  # whose attention factor is not 1
    of = settings_of(browser)
    inv_freq, _ = frequencies_of(**of)
    x, y, r = numbers_of(browser, "#pair-picture .edge", "cx", "cy", "r")
    for kind, position in (("query", of["m"]), ("key", of["n"])):
        angle = position * inv_freq[int(of["pair"])].item()
        expected = [x + r * math.cos(angle), y - r * math.sin(angle)]  # up is less
        tip = numbers_of(browser, f"#pair-picture line.{kind}", "x2", "y2")
        assert tip == pytest.approx(expected, abs=0.01)


def test_tables_have_the_colours_of_cos_and_sin(opened):
    """matplotlib's cividis: nine of its colours with straight lines between, within 18."""
    browser = opened("#m=700")
    inv_freq, _ = frequencies_of(**settings_of(browser))
    both = rope_ext.cos_sin(inv_freq, torch.arange(640, 768))  # [128, P] each
    assert "positions 640 to 767" in browser.evaluate("byId('table-text').textContent")
    for id, table in zip(("cos-table", "sin-table"), both, strict=True):
        rows, columns = torch.arange(15, 64, 3), torch.arange(1, 128, 9)  # below the frame
        left, top, right, bottom = box_of(browser, id)
        seen = torch.from_numpy(numpy.array(browser.picture()))
        x = left + ((columns + 0.5) * (right - left) / 128).long()
        y = top + ((rows + 0.5) * (bottom - top) / 64).long()
        shades = matplotlib.colormaps["cividis"]((table.t()[rows][:, columns].numpy() + 1) / 2)
        off = seen[y][:, x] - 255 * torch.from_numpy(shades[..., :3])
        assert off.abs().max() <= 18 + 1


def numbers_of(browser, selector, *names):
    element = f"document.querySelector('{selector}')"
    return browser.evaluate(f"{[*names]}.map((name) => +{element}.getAttribute(name))")


def points_of(path):
    return [tuple(map(float, point)) for point in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_wavelength_chart_has_every_pair_of_every_method(opened):
    """Lines are drawn to 0.01 pixels; there are about 35 in a decade, and 1 % is 0.15."""
    browser = opened()
    (y1, tokens1), (y2, tokens2) = browser.evaluate(CONTEXTS)  # they give the scale
    scale = math.log(tokens2 / tokens1) / (y2 - y1)
    got = browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#wavelength-chart path')]"
        ".map((path) => [path.dataset.method, path.getAttribute('d')]))"
    )
    assert got.keys() == {*METHODS}
    for method, path in got.items():
        inv_freq, _ = frequencies_of(**{**settings_of(browser), "method": method})
        tokens = [tokens1 * math.exp((y - y1) * scale) for _, y in points_of(path)]
        assert tokens == pytest.approx((2 * math.pi / inv_freq).tolist(), rel=0.01)


@pytest.mark.parametrize(("m", "n"), [(20, 12), (7, 1006)])
def test_score_chart_has_the_scores_of_the_distances(m, n, opened):
    """The height of each point is linear in its score; the dot is at a corner of the line."""
    browser = opened(f"#m={m}&n={n}")
    curve = browser.evaluate("document.querySelector('#score-chart .curve').getAttribute('d')")
    assert tuple(numbers_of(browser, "#score-chart .dot", "cx", "cy")) in points_of(curve)
    span = max(64, 2 ** math.ceil(math.log2(abs(m - n))))
    distances = sorted([*(span * i // 64 for i in range(-64, 65)), m - n])
    expected = torch.tensor(scores(distances, *frequencies_of(**settings_of(browser))))
    x, y = torch.tensor(points_of(curve)).unbind(-1)
    across = torch.tensor(distances) / span * (x[-1] - x[0]) / 2 + (x[0] + x[-1]) / 2
    torch.testing.assert_close(x, across, rtol=0, atol=0.02)  # pixels; drawn to 0.01
    share = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(y, y.max() - share * (y.max() - y.min()), rtol=0, atol=0.02)


def test_table_is_pointed_at(opened):
    browser = opened()
    left, top, right, bottom = box_of(browser, "sin-table")
    at = {"x": left + (right - left) * 90.5 / 128, "y": top + (bottom - top) * 33.5 / 64}
    for kind in ("mousePressed", "mouseReleased"):
        click = {"type": kind, "button": "left", "clickCount": 1, **at}
        browser.call("Input.dispatchMouseEvent", click)
    assert (shown(browser)["m"], shown(browser)["pair"]) == (90, 33)


def test_saved_picture_is_what_is_seen(opened, tmp_path):
    browser = opened(scheme="dark")
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.call("Browser.setDownloadBehavior", where)
    browser.evaluate("document.querySelector('[data-save^=wavelength-chart]').click()")
    path, last = tmp_path / "rope-wavelength-chart.png", time.monotonic() + 10
    while not path.exists() and time.monotonic() < last:
        time.sleep(0.05)
    box = box_of(browser, "wavelength-chart")
    seen = browser.picture().crop(box)
    width, height = seen.size
    saved = Image.open(path).convert("RGB")
    assert saved.size == (2 * (width + 32), 2 * (height + 32))
    saved = saved.resize((width + 32, height + 32)).crop((16, 16, 16 + width, 16 + height))
    off = ImageStat.Stat(ImageChops.difference(seen, saved))
    assert max(off.mean) < 4  # of 255: edges are smoother at twice the dots
    assert max(ImageStat.Stat(saved).stddev) > 20


def test_every_control_and_picture_has_a_name(opened):
    roles = {"image": [], "heading": [], "group": [], **{role: [] for role in NAMED}}
    for node in opened().call("Accessibility.getFullAXTree", {})["nodes"]:
        roles.get(node.get("role", {}).get("value"), []).append(node.get("name", {}).get("value"))
    assert {role: len(roles[role]) for role in NAMED} == NAMED
    assert all(name for names in roles.values() for name in names)
    assert len({name for role in NAMED for name in roles[role]}) == sum(NAMED.values())


@pytest.mark.parametrize("width", [360, 1000])
def test_page_fits_and_follows_the_width_of_the_window(width, opened):
    browser = opened(width=1360 - width)
    browser.emulate(width, 800)
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width] * 2


def test_command_writes_a_page_that_starts_with_the_config(browser, tmp_path, capsys):
    """Half of the channels rotate; a length between the steps of the slider."""
    config = {"head_dim": 88, "partial_rotary_factor": 0.5, "rope_theta": 12345.0}
    config |= {"max_position_embeddings": 24000, "rope_scaling": YARN}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "page.html"
    command = ["explore", "--config", str(tmp_path), "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == out.as_uri()
    browser.open(out)
    of = {"pair": 2, "method": "yarn", "base": 12345, "dim": 44, "factor": 4, "trained": 6000}
    assert settings_of(browser) == {"m": 20, "n": 12, **of}
    assert_numbers(browser, frequencies.from_config(config))
    wrong = {**config, "head_dim": 514, "partial_rotary_factor": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    assert main(command) == 2
    assert "rotary_dim to be 4 to 512, got 514" in capsys.readouterr().err
