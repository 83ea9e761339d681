"""Plots of recorded numbers.

Each function draws a matplotlib `Figure` (no pyplot, no global state); `figures.svg` puts it on a
page.

    figure = interval_plot(rows, metric="N@10")
"""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np

from whyrec.evaluation.code_space import Balance
from whyrec.evaluation.codes import CodeMeaning
from whyrec.evaluation.curves import Cost, Curve, Row
from whyrec.evaluation.figures import COLOURS, Axes, Figure, MaxNLocator, styled

_MAP_POINTS = 1500


@styled
def learning_plot(curve: Curve) -> Figure:
    """Training loss, and validation figures with the checkpoint that was kept."""
    valid = [key for key in curve.series if key.startswith("eval_") and key.endswith("@10")]
    if len(valid) > 2:  # thinking, not thinking and both mixed
        valid = [key for key in valid if key.endswith("N@10")]
    panels = {"training loss": ["loss"], "validation, history excluded": sorted(valid)}
    shown = {title: [k for k in keys if k in curve.series] for title, keys in panels.items()}
    shown = {title: keys for title, keys in shown.items() if keys}
    figure = Figure(figsize=(7.6, 2.8), layout="constrained")
    axes = figure.subplots(1, max(len(shown), 1), squeeze=False)[0]
    for ax, (title, keys) in zip(axes, shown.items(), strict=False):
        for number, key in enumerate(keys):
            steps, values = zip(*curve.series[key], strict=True)
            ax.plot(
                steps,
                values,
                label=key.removeprefix("eval_"),
                marker="o" if len(steps) < 30 else None,
                markersize=3,
                **_line(number),
            )
        _finish(ax, x="step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        ax.set_title(title)
        if keys != ["loss"]:
            _mark_best(ax, curve.best_step)
            ax.legend()
    return figure


def _mark_best(ax: Axes, step: int | None) -> None:
    if step is None:
        return
    ax.axvline(step, color=COLOURS["soft"], linewidth=1, linestyle=":")
    ax.annotate(
        "kept",
        (step, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        color=COLOURS["soft"],
    )


@styled
def interval_plot(rows: Sequence[Row], *, metric: str, published: Sequence[Row] = ()) -> Figure:
    """One row a model, the best on top: figure and 95 % interval; what was published, hollow."""
    shown = sorted([*rows, *published], key=lambda row: row.value)
    figure = Figure(figsize=(7.6, 0.5 + 0.34 * max(len(shown), 1)), layout="constrained")
    ax = figure.subplots()
    for y, row in enumerate(shown):
        ours = row.model.startswith("whyrec")
        printed = row.model == "published"
        colour = COLOURS["ours"] if ours else COLOURS["soft"] if printed else COLOURS["other"]
        if row.low is not None and row.high is not None:
            ax.plot([row.low, row.high], [y, y], color=colour, linewidth=2)
        ax.plot(
            [row.value],
            [y],
            marker="D" if printed else "o",
            markerfacecolor="none" if printed else colour,
            color=colour,
            markersize=6,
        )
        if len(row.values) > 1:
            ax.plot(row.values, [y] * len(row.values), "|", color=colour, markersize=9)
    names = [f"{row.name}, published" if row.model == "published" else row.name for row in shown]
    ax.set_yticks(range(len(shown)), names)
    ax.set_ylim(-0.6, len(shown) - 0.4)
    _finish(ax, x=metric)
    return figure


@styled
def gain_plot(costs: Sequence[Cost]) -> Figure:
    """Relative gain over not thinking, a row for each way, named with what it costs a user."""
    figure = Figure(figsize=(7.6, 0.7 + 0.55 * len(costs)), layout="constrained")
    ax = figure.subplots()
    ax.axvline(0, color=COLOURS["soft"], linewidth=1)
    for y, cost in enumerate(reversed(costs)):
        if cost.tokens == 0:  # what the others are compared with
            ax.plot([0], [y], marker="D", color=COLOURS["soft"])
        for number, (metric, ends) in enumerate(cost.gains.items()):
            value, low, high = (100 * end for end in ends)
            ax.errorbar(
                [value],
                [y + 0.12 - 0.24 * number],
                xerr=[[value - low], [high - value]],
                marker="os"[number],
                color=[COLOURS["ours"], COLOURS["other"]][number],
                linewidth=2,
                label=metric,
            )
    ax.set_yticks(range(len(costs)), [_priced(cost) for cost in reversed(costs)])
    ax.set_ylim(-0.5, len(costs) - 0.5)
    _finish(ax, x="gain over no thinking, %")
    found = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if found:
        ax.legend(found.values(), found.keys())
    return figure


def _priced(cost: Cost) -> str:
    prices = []
    if cost.tokens is not None:
        prices.append(f"{cost.tokens:.0f} tokens")
    if cost.seconds is not None:
        prices.append(f"{cost.seconds:.3g} s")
    return f"{cost.name}: {', '.join(prices)}" if prices else cost.name


@styled
def balance_plot(balances: Sequence[Balance]) -> Figure:
    """Items of each code by level, the fullest first; dotted: if all codes were alike."""
    figure = Figure(figsize=(7.6, 2.3), layout="constrained")
    axes = figure.subplots(1, len(balances), squeeze=False)[0]
    for ax, balance in zip(axes, balances, strict=True):
        counts_K = np.sort(balance.counts_K)[::-1]
        ax.fill_between(
            np.arange(len(counts_K) + 1),
            np.append(counts_K, counts_K[-1]),
            step="post",
            color=COLOURS["ours"],
            linewidth=0,
        )
        ax.axhline(counts_K.mean(), color=COLOURS["ink"], linestyle=":", linewidth=1)
        ax.set_title(f"level {level_letter(balance.level)}: {balance.used} of {balance.size} used")
        _finish(ax, x="codes, fullest first", y="items" if balance.level == 0 else "")
        ax.set_ylim(0)
        ax.set_xlim(0, len(counts_K))
    return figure


@styled
def map_plot(
    xy_N2: np.ndarray,
    codes_NL: np.ndarray,
    *,
    shares: tuple[float, float],
    meanings: Sequence[CodeMeaning] = (),
    labels: int = 8,
) -> Figure:
    """Items in the plane, one map a level, coloured by that level's code.

    Codes that lie in the same direction have like hues, so that a level whose codes are places
    shows patches and one whose codes are spread shows confetti.

    Args:
        xy_N2, shares: of `code_space.map_2d`.
        codes_NL: SIDs.
        meanings: of the first level; its fullest codes are named by their first word.
        labels: how many of them.
    """
    num_items, num_levels = codes_NL.shape
    chosen = np.random.default_rng(0).permutation(num_items)[:_MAP_POINTS]
    columns = min(num_levels, 2)
    rows = -(-num_levels // columns)
    figure = Figure(figsize=(7.6, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[num_levels:]:
        ax.set_visible(False)
    for level, ax in enumerate(axes[:num_levels]):
        centres = {
            code: xy_N2[codes_NL[:, level] == code].mean(0)
            for code in np.unique(codes_NL[:, level])
        }
        colours = {code: _hue(*centre) for code, centre in centres.items()}
        ax.scatter(
            *xy_N2[chosen].T,
            c=[colours[code] for code in codes_NL[chosen, level]],
            s=7,
            linewidths=0,
            rasterized=True,
        )
        ax.set_title(f"level {level_letter(level)}")
        _finish(ax, x=f"1st component, {shares[0]:.0%}", y=f"2nd, {shares[1]:.0%}" * (level == 0))
        ax.set_xticks([])
        ax.set_yticks([])
        if level == 0:
            fullest = sorted(meanings, key=lambda meaning: -len(meaning.items))
            named = [(centres[m.code], f"{m.code} {m.words[0].text}") for m in fullest if m.words]
            for place, text in _apart(named, reach=float(np.ptp(xy_N2[:, 1])) / 12)[:labels]:
                _label(ax, place, text)
    return figure


def _apart(
    named: Sequence[tuple[np.ndarray, str]], *, reach: float
) -> list[tuple[tuple[float, float], str]]:
    """Those names that lie farther from all before them than so much, up or down."""
    kept: list[tuple[tuple[float, float], str]] = []
    for place, text in named:
        x, y = place.tolist()
        if all(abs(y - other[1]) > reach for other, _ in kept):
            kept.append(((x, y), text))
    return kept


def level_letter(level: int) -> str:
    """How a level is called in its tokens: a, b, c, …"""
    return "abcdefghijklmnopqrstuvwxyz"[level]


def _label(ax: Axes, place: tuple[float, float], text: str, *, above: int = 0) -> None:
    ax.annotate(
        text,
        place,
        xytext=(0, above),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=8,
        fontweight="bold",
    )


def _hue(x: float, y: float) -> tuple[float, float, float]:
    """A colour by direction, of a lightness that is seen on white and on black."""
    turn = np.arctan2(y, x) / (2 * np.pi) % 1.0
    return colorsys.hls_to_rgb(float(turn), 0.5, 0.55)


def _line(number: int) -> dict[str, Any]:
    """Colour and dashes of a line, so that none is told by its colour alone."""
    colours = [COLOURS[name] for name in ("ours", "other", "third", "soft")]
    dashes = ["-", "--", "-.", ":"]
    return {"color": colours[number % 4], "linestyle": dashes[number % 4], "linewidth": 1.6}


def _finish(ax: Axes, *, x: str = "", y: str = "") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(True, axis="both", linewidth=0.6)
    ax.tick_params(length=0)
