"""How plots look, and how a plot becomes a part of a page: no requests, light and dark.

`svg` makes a matplotlib figure a part of a page: text stays text, it has a name for people who do
not see it, and its colours are variables of the page with the light ones to fall back on.

    html = svg(interval_plot(rows, metric="N@10"), label="N@10 of every model")
"""

import io
import re
from html import escape
from typing import Any

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.ticker import MaxNLocator as MaxNLocator
except ModuleNotFoundError:
    raise ValueError(
        "plots need matplotlib, which is not installed; run pip install 'whyrec[inspect]'"
    ) from None

# variable of a page → its light value, which the figures are drawn with
COLOURS = {
    "ink": "#1b2430",
    "soft": "#566271",
    "line": "#d5dbe3",
    "ours": "#0a5bb8",
    "other": "#a34a06",
    "third": "#1a7340",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "whyrec",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "grid.color": COLOURS["line"],
    "axes.axisbelow": True,
}
styled = rc_context(STYLE)


@styled
def svg(figure: Figure, *, label: str) -> str:
    """The figure as an `<svg>` for a page.

    Args:
        figure: of this module.
        label: what it shows, for people who do not see it.
    """
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(
        buffer, format="svg", metadata=nothing, bbox_inches="tight", pad_inches=0.05, dpi=160
    )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Several figures stand in one page: their ids must differ.
    name = re.sub(r"\W+", "-", label.casefold()).strip("-")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf"<svg {_ATTRIBUTES} \1>", text, count=1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    return text


_ATTRIBUTES = (
    'class="plot" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
)
