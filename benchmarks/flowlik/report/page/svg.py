"""SVG figures as the page takes them: without what nobody sees, and with colours that follow a dark page."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from typing import Final
from urllib.parse import quote

import numpy as np
from markupsafe import Markup
from PIL import Image

DARK_GROUND: Final = (0x1B, 0x1D, 0x20)
"""The page's paper in the dark."""

LEAST_CONTRAST: Final = 4.0
"""Of a line on dark paper; 3 is what WCAG 2.2 asks of graphics."""

NEUTRAL: Final = 0.1
"""Colours whose channels are no further apart are greys, which change places with their opposites."""

SIZE: Final = re.compile(r'<svg[^>]*? width="([\d.]+)pt" height="([\d.]+)pt"')


def size(svg: str) -> tuple[float, float] | None:
    """Width and height in points; None where the text is no SVG of matplotlib's."""
    found = SIZE.search(svg[:2000])
    return (float(found[1]), float(found[2])) if found else None


def for_the_page(svg: str, *, follow: bool = True) -> Markup:
    """The SVG as an address, safe between double quotes; with `follow` in other colours on a dark page."""
    text = _following(_compact(svg)) if follow else _compact(svg)
    return Markup("data:image/svg+xml," + quote(text, safe=" '=:/,;()+-.*!~[]{}?@$|^"))


def _compact(svg: str) -> str:
    """The same picture in fewer letters: coordinates to a hundredth of a point, no metadata, no unused ids."""
    text = svg[max(svg.find("<svg"), 0) :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<= d=")[^"]*', lambda found: _path(found[0]), text)
    text = re.sub(r"(?<=base64,)[^\"]*", lambda found: _fewer_colours(found[0]), text)
    text = re.sub(r'(?<=[ (="-])\d+\.\d{3,}', lambda found: f"{float(found[0]):.2f}", text)
    used = set(re.findall(r"#([A-Za-z][\w-]*)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    text = text.replace("'DejaVu Sans'", "DejaVu Sans")
    return _single_quotes(_with_classes(_without_groups(re.sub(r">\s+<", "><", text).strip())))


def _path(path: str) -> str:
    numbers = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), path)
    return re.sub(r" ?([A-Za-z]) ?", r"\1", " ".join(numbers.split()))


def _without_groups(svg: str) -> str:
    """The SVG without groups that say nothing of what they hold."""
    kept: list[bool] = []
    written = []
    for part in re.split(r"(<g>|<g [^>]*>|</g>)", svg):
        if part == "</g>" and kept:
            written.append(part if kept.pop() else "")
        elif part.startswith("<g"):
            kept.append(part != "<g>")
            written.append(part if kept[-1] else "")
        else:
            written.append(part)
    return "".join(written)


def _single_quotes(svg: str) -> str:
    """Attributes in single quotes, which an address may hold as they are."""
    return re.sub(r"<[^>]*>", lambda tag: re.sub(r'="([^"\']*)"', r"='\1'", tag[0]), svg)


def _with_classes(svg: str) -> str:
    """Every style that is used twice as a class."""
    styles = Counter(re.findall(r' style="([^"]*)"', svg))
    classes = {style: f"k{k}" for k, (style, uses) in enumerate(styles.items()) if uses > 1}

    def named(found: re.Match[str]) -> str:
        return f' class="{classes[found[1]]}"' if found[1] in classes else found[0]

    text = re.sub(r' style="([^"]*)"', named, svg)
    rules = "".join(f".{name}{{{style.replace('&quot;', chr(39))}}}" for style, name in classes.items())
    return text.replace("</style>", f"{rules}</style>", 1)


def _fewer_colours(png: str) -> str:
    """A base64 PNG with a palette, where it has no more colours than one holds: the same picture in fewer bytes."""
    given = "".join(png.split())
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(given))).convert("RGBA"))
    colours, places = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) > 256:
        return given
    image = Image.fromarray(places.reshape(pixels.shape[:2]).astype(np.uint8))
    image.putpalette(colours[:, :3].ravel().tolist())
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True, transparency=bytes(colours[:, 3].tolist()))
    return min(given, base64.b64encode(written.getvalue()).decode("ascii"), key=len)


def _following(svg: str) -> str:
    """Colours by name, which a dark page sets to others; clouds of points that are images are inverted."""
    names: dict[str, str] = {}

    def named(found: re.Match[str]) -> str:
        colour = found[0].lower()
        return f"var(--{names.setdefault(colour, f'c{len(names)}')})" if dark(colour) != colour else colour

    text = re.sub(r"(?<=[:] )#[0-9a-fA-F]{6}\b", named, svg)
    text = re.sub(r"(?<!'>)<image", "<image class='points'", text)
    light = "".join(f"--{name}:{colour};" for colour, name in names.items())
    night = "".join(f"--{name}:{dark(colour)};" for colour, name in names.items())
    style = (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{night}fill:{dark('#000000')}}}"
        ".points{filter:invert(1) hue-rotate(180deg)}}"
    )
    return text.replace("</style>", f"{style}</style>", 1)


def dark(colour: str) -> str:
    """What a colour becomes on dark paper: greys trade places, others get lighter until they can be seen.

    >>> dark("#222222"), dark("#e69f00")
    ('#d1d1d1', '#e69f00')
    """
    rgb = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    if max(rgb) - min(rgb) < NEUTRAL:
        rgb = [0.93 - 0.82 * value for value in rgb]
    else:
        while _contrast(rgb) < LEAST_CONTRAST:
            rgb = [value + 0.05 * (1 - value) for value in rgb]
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def _contrast(rgb: list[float]) -> float:
    """Contrast of a colour to the dark paper, as WCAG defines it."""
    return (_luminance(rgb) + 0.05) / (_luminance([value / 255 for value in DARK_GROUND]) + 0.05)


def _luminance(rgb: list[float]) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
