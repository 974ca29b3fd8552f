"""The page: well-formed, escaped, without anything from outside; and in a real browser, if there is one."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import plain
import pytest

from freemerge.analysis import Analysis, analyze
from freemerge.analysis.report.charts import linear_axis, logarithmic_axis
from freemerge.analysis.report.figures import method_style
from freemerge.analysis.report.heat import Shades, heat_map
from freemerge.analysis.report.pictures import line, pictures
from freemerge.analysis.report.text import NONE, count, number, percent, text
from freemerge.errors import ArgumentError, CheckpointError, RefusedError
from freemerge.methods import TaskArithmetic

HOSTILE = [
    "<script>document.title='taken'</script>",
    '"><img src=x onerror="document.title=\'taken\'">.0.w',
    "layers.0.</title></style></svg>&amp;'`",
    "javascript:alert(1).1.w",
    "right\u202eleft\x00\x1b[31m.2.w",
    "ünïcode.層.3.w",
]
VOID = {"meta", "br", "input", "img", "link", "hr"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """Elements with their attributes, and the text; complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    base, tuned = plain.models({name: (12, 9 + i) for i, name in enumerate(HOSTILE)}, 2)
    return analyze(base, tuned)


def test_the_page_is_well_formed_and_shows_every_name(analysis: Analysis) -> None:
    page = Page(analysis.to_html())
    assert {tag for tag, _ in page.elements} >= {"html", "title", "svg", "figure", "details", "table", "script"}
    for name in HOSTILE[:4] + HOSTILE[5:]:
        assert name in page.text
    assert r"right\u202eleft\x00\x1b[31m" in page.text
    for title in ("Where the energy is", "Interference by frequency", "Cosine between tasks", "What is left"):
        assert title in page.text
    for label in analysis.scales:
        assert label in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_names_stay_text(analysis: Analysis) -> None:
    html = analysis.to_html()
    page = Page(html)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(tag in ("img", "link", "iframe", "object", "base", "a") for tag, _ in page.elements)
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "\x00" not in html
    assert "\u202e" not in html


def test_nothing_comes_from_outside(analysis: Analysis) -> None:
    html = analysis.to_html()
    page = Page(html)
    loading = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "xmlns"}
    assert not [attributes for _, attributes in page.elements if loading & attributes.keys()]
    assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp|import\(", _without_names(html))
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def _without_names(html: str) -> str:
    for name in HOSTILE:
        html = html.replace(text(name), "")
    return re.sub(r"(?m)^\s*//.*$", "", html)  # comments of the script


def test_pages_without_some_measures() -> None:
    """One task, no matrices, no methods, many tasks and layers: sections that have nothing to show are left out."""

    def headings(analysis: Analysis) -> set[str]:
        html = analysis.to_html()
        Page(html)
        return set(re.findall("<h3>(.*?)</h3>", html))

    base, tuned = plain.models({"w": (6, 5), "b": (5,)}, 1)
    everything = {"Where the energy is", "Energy in the strongest directions", "Where the merged energy is"}
    assert headings(analyze(base, tuned)) == {*everything, "What is left of each task"}
    assert headings(analyze(base, tuned, methods={})) == {"Where the energy is", "Energy in the strongest directions"}
    base, tuned = plain.models({"b": (5,), "c": ()}, 2)
    assert headings(analyze(base, tuned)) == {"Cosine between tasks"}
    same = analyze(base, [base, base])
    assert NONE in Page(same.to_html()).text
    base, tuned = plain.models({f"layers.{i}.w": (4, 4) for i in range(20)}, 12)
    assert len(headings(analyze(base, tuned))) == 6


def test_figures_as_pictures(analysis: Analysis, tmp_path: Path) -> None:
    from matplotlib.image import imread

    found = dict(pictures(analysis))
    titles = {name.removesuffix(".png").replace("-", " ").capitalize() for name in found}
    assert titles == {*re.findall("<h3>(.*?)</h3>", analysis.to_html()), "Layers"}
    for name, content in found.items():
        (tmp_path / name).write_bytes(content)
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.01, "something is drawn"
    assert dict(pictures(analysis)) == found


def test_twelve_methods_have_lines_of_their_own() -> None:
    base, tuned = plain.models({"w": (6, 5)}, 2)
    methods = {f"method {i}": TaskArithmetic() for i in range(12)}
    found = analyze(base, tuned, methods=methods)
    page = Page(found.to_html())
    drawn = [a["class"] for tag, a in page.elements if tag == "g" and str(a.get("class")).startswith("m")]
    assert len(set(drawn)) == 12
    assert set(Counter(drawn).values()) == {3}, "one in each chart of the methods"
    assert len({str(line(method_style(i))) for i in range(12)}) == 12
    assert "energy-in-the-strongest-directions.png" in dict(pictures(found))


def test_pictures_need_matplotlib_and_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = plain.models({"w": (6, 5)}, 1)
    folder = tmp_path / "figures"
    for _ in range(2):
        analyze(base, tuned, png=folder, force=folder.exists())
        assert {file.suffix for file in folder.iterdir()} == {".png"}
    with pytest.raises(RefusedError, match=r"figures is not empty; use --force \(force=True\)"):
        analyze(base, tuned, png=folder)
    with pytest.raises(RefusedError, match="is no directory"):
        analyze(base, tuned, png=folder / "layers.png")
    with pytest.raises(CheckpointError, match="no directory that exists"):
        analyze(base, tuned, png=tmp_path / "absent" / "figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"freemerge\[png\]"):
        analyze(base, tuned, png=tmp_path / "others")
    assert not (tmp_path / "others").exists()


def test_numbers_are_readable() -> None:
    assert [number(value) for value in (None, 0.0, 0.1234, -0.5, 12.345, 123.4, 1e6, -1e-9)] == [
        "–", "0.00", "0.12", "−0.50", "12.3", "123", "1000000", "0.00",
    ]  # fmt: skip
    assert [percent(value) for value in (None, 0.0, 0.0005, 0.012, 0.5, 12.0)] == [
        "–", "0 %", "< 0.1 %", "1.2 %", "50 %", "1200 %",
    ]  # fmt: skip
    assert [count(value) for value in (7, 1234, 10_645_248, 6_700_000_000)] == ["7", "1.23 k", "10.6 M", "6.7 G"]


@pytest.mark.parametrize("values", [[], [0.0], [0.3, 0.7], [-2e-4, 1e-4], [5.0] * 3, [1e6, -3e6], [1e-12]])
def test_axes_hold_their_values(values: list[float]) -> None:
    axis = linear_axis("", values)
    assert 2 <= len(axis.ticks) <= 8
    tolerance = 1e-9 * (axis.high - axis.low)
    assert all(axis.low - tolerance <= value <= axis.high + tolerance for value in values)
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)
    positive = [abs(value) for value in values]
    logarithmic = logarithmic_axis("", positive)
    assert all(logarithmic.low <= value * (1 + 1e-9) and value <= logarithmic.high for value in positive if value)
    assert 2 <= len(logarithmic.ticks) <= 8
    assert all(0 <= logarithmic.place(value) <= 1 for value in (0.0, 1e-30, 1.0, 1e30))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [1280, 500])
def test_in_a_browser(analysis: Analysis, tmp_path: Path, width: int) -> None:
    """It renders; the script runs, as the policy allows it; names do nothing; nothing is wider than the page."""
    probe = """<script>
      const wide = [...document.querySelectorAll("main > *")].filter(e => e.scrollWidth > innerWidth).length;
      document.querySelectorAll("details").forEach(e => e.open = true);
      const buttons = document.querySelectorAll(".sortable button");
      buttons[1].click();
      const shown = [...document.querySelectorAll(".map")].filter(e => e.offsetHeight > 0).length;
      document.body.dataset.found = [document.title.includes("taken"), buttons.length > 0, wide, shown].join();
    </script>"""
    page = tmp_path / "report.html"
    html = analysis.to_html()
    # The probe is a script of the test; the page's own policy would not let it run, which the first run checks.
    for policy, expected in ((True, None), (False, "false,true,0,1")):
        content = html if policy else re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        page.write_text(content.replace("</body>", probe + "</body>"), encoding="utf-8")
        dom = _browse(page, tmp_path, "--dump-dom", f"--window-size={width},900")
        found = re.search(r'data-found="([^"]*)"', dom)
        assert (found.group(1) if found else None) == expected
        assert len(re.findall("<th[^>]* aria-sort=", dom)) == (0 if policy else 1)
        assert "<button>" in dom, "the page's own script ran"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_light_and_dark(analysis: Analysis, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(analysis.to_html(), encoding="utf-8")
    sizes = []
    for scheme in ("0", "1"):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        flags = [f"--screenshot={shot}", "--window-size=800,600", f"--blink-settings=preferredColorScheme={scheme}"]
        _browse(page, tmp_path, *flags)
        content = shot.read_bytes()
        assert struct.unpack(">II", content[16:24]) == (800, 600)
        sizes.append(content)
    assert sizes[0] != sizes[1]


def _browse(page: Path, folder: Path, *flags: str) -> str:
    assert BROWSER is not None
    own = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}")
    command = [BROWSER, *own, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.parametrize("values", [[-0.02, 0.0, 0.01, 0.9], [0.5, 0.51, 0.55], [0.3], [0.0], []])
def test_shades_tell_weak_values_apart(values: list[float]) -> None:
    shades = Shades([*values, None])
    assert all(abs(shades.depth(value)) <= 1 for value in values)
    assert [shades.value(shades.depth(value)) for value in values] == pytest.approx(values)
    assert shades.lowest == min(0.0, *map(shades.depth, values), 0.0)
    assert sorted(values, key=shades.depth) == values


def test_maps_have_a_legend_and_no_cell_without_colour() -> None:
    html = heat_map(["a"], ["1", "2", "3"], [(-0.02, 0.001, 0.9)], number, written=True)
    depths = [int(depth) for depth in re.findall(r"--v:(\d+)%", html)]
    assert depths[1] == 15
    assert depths[0] > 25
    assert depths[2] == 100
    assert '<td class="negative"' in html
    assert re.findall("<span>(.*?)</span>", html) == ["0.00", "0.23", "0.90"]
    assert "<b>negative</b>" in html
