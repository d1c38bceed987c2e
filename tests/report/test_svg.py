"""Figures in the page: SVG that says the same in fewer letters, and can be seen on a dark page."""

from __future__ import annotations

import base64
import io
import re
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from flowlik.report.figures.style import paper
from flowlik.report.page import svg

HOSTILE = '</text><script>alert(1)</script> & "\'> x="y"'


def _drawn(title: str = "a title") -> str:
    with paper():
        figure = Figure(figsize=(3, 2))
        ax = figure.add_subplot()
        ax.plot([0, 1 / 3, 1], [0, 1, 2 / 3], color="#000000", marker="o", markerfacecolor="white")
        ax.scatter(np.arange(200.0) / 200, np.arange(200.0) / 200, color="#0072B2", rasterized=True)
        ax.set_title(title)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True)
    return written.getvalue()


def _shown(text: str, *, follow: bool = True) -> str:
    address = str(svg.for_the_page(text, follow=follow))
    assert not set('<>"&#') & set(address)
    return unquote(address.partition(",")[2])


def test_it_is_a_smaller_picture_of_the_same_words_and_shapes() -> None:
    given = _drawn()
    shown = _shown(given)
    assert len(shown) < 0.8 * len(given)
    before, after = ElementTree.fromstring(given), ElementTree.fromstring(shown)
    for tag in ("text", "path", "use", "image"):
        name = f"{{http://www.w3.org/2000/svg}}{tag}"
        assert len(list(before.iter(name))) == len(list(after.iter(name))) > 0
    texts = [element.text for element in after.iter("{http://www.w3.org/2000/svg}text")]
    assert "a title" in texts
    assert svg.size(given) == (216.0, 144.0)


def test_what_it_refers_to_is_there() -> None:
    shown = _shown(_drawn())
    ids = set(re.findall(r" id='([^']*)'", shown))
    assert set(re.findall(r"(?:href='|url\()#([\w-]+)", shown)) <= ids


def test_names_of_records_stay_text() -> None:
    root = ElementTree.fromstring(_shown(_drawn(HOSTILE)))
    assert not [element for element in root.iter() if element.tag.endswith("script")]
    assert HOSTILE in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_figure_that_stands_on_white_keeps_its_colours() -> None:
    assert "prefers-color-scheme" not in _shown(_drawn(), follow=False)


def test_clouds_of_points_are_inverted_in_the_dark_and_images_of_data_are_not() -> None:
    assert _shown(_drawn()).count("class='points'") == 1
    with paper():
        figure = Figure()
        figure.add_subplot().imshow(np.arange(9.0).reshape(3, 3))
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True)
    assert "class='points'" not in _shown(written.getvalue())


@pytest.mark.parametrize(
    "colour", ["#000000", "#222222", "#882255", "#661100", "#0072b2", "#e69f00", "#5e4fa2"]
)
def test_every_colour_of_a_line_can_be_seen_on_dark_paper(colour: str) -> None:
    found = svg.dark(colour)
    rgb = [int(found[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    assert svg._contrast(rgb) >= 3.9
    assert svg._contrast([1, 1, 1]) == pytest.approx(16.9, abs=0.1)  # white on #1b1d20, by WCAG's formula


def test_white_becomes_the_paper_of_the_dark() -> None:
    assert svg._contrast([int(svg.dark("#ffffff")[1:3], 16) / 255] * 3) == pytest.approx(1, abs=0.1)


def test_an_image_of_few_colours_is_the_same_image_with_a_palette() -> None:
    pixels = np.random.default_rng(0).integers(0, 4, (40, 40, 1)).astype(np.uint8) * np.array(
        [50, 3, 7, 60], np.uint8
    )
    written = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(written, "PNG")
    given = base64.b64encode(written.getvalue()).decode()
    found = svg._fewer_colours(given)
    assert len(found) < len(given)
    again = Image.open(io.BytesIO(base64.b64decode(found))).convert("RGBA")
    assert np.array_equal(np.asarray(again), pixels)
