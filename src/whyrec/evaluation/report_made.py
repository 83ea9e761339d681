"""Sections of a run's report on what was made: the data, the SIDs, the trainings."""

from collections.abc import Sequence
from pathlib import Path

from whyrec.evaluation import plots
from whyrec.evaluation.code_space import level_balance, map_2d, shared_prefixes
from whyrec.evaluation.codes import Catalogue, code_meanings, load_catalogue, name_of
from whyrec.evaluation.curves import Curve, learning_curves
from whyrec.evaluation.report_parts import Plot, Section, Table, plot, read_json

_CODES_TOLD = 16


def data_section(run: Path) -> Section:
    """The data card."""
    section = Section("data", "Data")
    card = read_json(run / "dataset" / "card.json")
    if card is None:
        section.missing.append(f"no data set; `whyrec prepare SOURCE --run {run}` makes it")
        return section
    before, after = card["before"], card["after"]
    section.tables.append(
        Table(
            "What was read and what stayed",
            ["", "as read", "prepared"],
            [[name, before[name], after[name]] for name in ("users", "items", "events")],
        )
    )
    recipe, files = card.get("recipe", {}), card.get("files", {})
    section.text.append(
        f"Format {card['format']}, {recipe.get('k_core', '?')}-core, split "
        f"{recipe.get('split', '?')}: "
        + ", ".join(f"{count:,} {name}" for name, count in card["splits"].items() if count)
        + f" events. Density {card['density']:.2%}."
    )
    section.text += [
        f"{role}: {file['name']}, {file['bytes']:,} bytes, sha256 {file['sha256']}"
        for role, file in files.items()
    ]
    names = list(card["history_length"])
    section.tables.append(
        Table(
            "How long histories are, and how often an item is taken",
            ["", *names],
            [
                ["events a user", *card["history_length"].values()],
                ["events an item", *(card["events_an_item"].get(name) for name in names)],
            ],
        )
    )
    shares = card["share_of_items_with"]
    section.tables.append(
        Table(
            "Items with text",
            ["", *shares],
            [["share of the items", *(float(share) for share in shares.values())]],
        )
    )
    bad = {role: found["total"] for role, found in card["bad_rows"].items() if found["total"]}
    if bad:
        told = ", ".join(f"{count:,} of the {role}" for role, count in bad.items())
        section.text.append(f"Rows that could not be read: {told}.")
    for name, share in shares.items():
        if share == 0:
            section.missing.append(f"no item has a {name.removesuffix('s')}")
    return section


def sid_section(run: Path) -> Section:
    """The SID report, balance, collisions, a map, and what the first codes mean."""
    section = Section("sids", "Semantic IDs")
    report = read_json(run / "sids" / "report.json")
    if report is None:
        section.missing.append(f"no semantic IDs; `whyrec index --run {run}` makes them")
        return section
    section.text.append(
        f"{report['items']:,} items in {report['sids']:,} SIDs, "
        f"{' × '.join(str(size) for size in report['level_sizes'])} codes."
    )
    section.tables.append(
        Table(
            "Quality before any language model",
            ["figure", "value"],
            [
                ["items that share all codes but the last", float(report["collision_rate"])],
                ["nearest neighbours kept", float(report["neighbours_kept"])],
                ["variance left unexplained", float(report["reconstruction_error"])],
                ["items with a code that is not their nearest", report["spilled"]],
            ],
        )
    )
    try:
        catalogue = load_catalogue(run)
    except ValueError as error:
        section.missing.append(str(error))
        return section
    section.missing += catalogue.missing
    _code_parts(section, catalogue)
    return section


def _code_parts(section: Section, catalogue: Catalogue) -> None:
    section.plots.append(balance_figure(catalogue))
    section.plots += map_figure(catalogue)
    section.tables += [balance_table(catalogue), meaning_table(catalogue, most=_CODES_TOLD)]


def balance_figure(catalogue: Catalogue) -> Plot:
    """Items by code, level by level."""
    figure = plots.balance_plot(level_balance(catalogue))
    return plot(figure, "How many items each code has, level by level")


def map_figure(catalogue: Catalogue) -> list[Plot]:
    """The map, coloured by level; none without vectors."""
    if catalogue.vectors_ND is None:
        return []
    xy_N2, shares = map_2d(catalogue.vectors_ND)
    meanings = code_meanings(catalogue, level=0)
    figure = plots.map_plot(xy_N2, catalogue.codes_NL, shares=shares, meanings=meanings)
    caption = "Items by the first two principal components of their vectors, coloured by code"
    return [plot(figure, caption)]


def balance_table(catalogue: Catalogue) -> Table:
    """Use of each level's codes, and collisions of the prefixes that end there."""
    return Table(
        "Codes by level, and items that agree in all codes up to it",
        ["level", "codes", "used", "entropy", "fullest", "prefixes in use", "items sharing one"],
        [
            [
                plots.level_letter(balance.level),
                balance.size,
                balance.used,
                balance.entropy,
                int(balance.counts_K.max()),
                cell.cells,
                cell.sharing,
            ]
            for balance, cell in zip(
                level_balance(catalogue), shared_prefixes(catalogue), strict=True
            )
        ],
    )


def meaning_table(
    catalogue: Catalogue, *, level: int = 0, prefix: Sequence[int] = (), most: int = 256
) -> Table:
    """What the codes of a level mean, the fullest first.

    Args:
        catalogue: items and SIDs.
        level, prefix: as for `code_meanings`.
        most: codes at most.
    """
    meanings = code_meanings(catalogue, level=level, prefix=prefix)
    fullest = sorted(meanings, key=lambda meaning: -len(meaning.items))[:most]
    letter = plots.level_letter(level)
    told = f"{len(fullest)} fullest codes of {len(meanings)}" if most < len(meanings) else "codes"
    behind = f" behind {' '.join(map(str, prefix))}" if prefix else ""
    return Table(
        f"What level {letter} means{behind}: its {told}, with the words that their items have "
        "more often than others (log-odds, z > 1.96)",
        ["code", "items", "words", "most typical items"],
        [
            [
                f"{letter}\N{NO-BREAK SPACE}{meaning.code}",
                len(meaning.items),
                ", ".join(word.text for word in meaning.words) or None,
                "; ".join(name_of(catalogue.items[item]) for item in meaning.items[:3]),
            ]
            for meaning in fullest
        ],
    )


def training_section(run: Path) -> Section:
    """Learning curves of all stages."""
    section = Section("training", "Training")
    curves, section.missing = learning_curves(run)
    for curve in curves:
        section.plots.append(plot(plots.learning_plot(curve), f"Training of {curve.stage}"))
        section.tables.append(_curve_table(curve))
    return section


def _curve_table(curve: Curve) -> Table:
    rows = []
    for key, series in sorted(curve.series.items()):
        if key == "loss" or key.startswith("eval_"):
            best = max(series, key=lambda point: point[1] * (-1 if key == "loss" else 1))
            name = "training loss" if key == "loss" else key.removeprefix("eval_")
            rows.append([name, series[0][1], series[-1][1], best[1], best[0]])
    kept = f"; step {curve.best_step:,} was kept" if curve.best_step else ""
    return Table(
        f"{curve.stage}{'' if curve.finished else ', not finished'}{kept}",
        ["figure", "first", "last", "best", "at step"],
        rows,
    )
