"""What `whyrec evaluate` prints: the figures of one run as aligned text.

print(figures_table(evaluate(model, run, split="test", beams=20)))
"""

from collections.abc import Mapping

_SHOWN = ("R@5", "R@10", "N@5", "N@10", "MRR", "coverage", "gini", "legal")
_ENDS = ("low", "high")


def figures_table(figures: Mapping[str, float]) -> str:
    """The figures as aligned text.

    A row for each model and history, then R@10 and N@10 with the ends of their intervals, then
    what our model gains over each baseline, then all other figures, one a line.
    """
    rows = {tuple(key.split("/")[:3]) for key in figures if _is_ranking(key)}
    prefixes = sorted(rows, key=_row_order)
    width = max(len(model) for model, _, _ in prefixes)
    lines = [f"{'':{width}}  history    " + "".join(f"{name:>10}" for name in _SHOWN)]
    for model, split, history in prefixes:
        values = [figures[f"{model}/{split}/{history}/{name}"] for name in _SHOWN]
        cells = "".join(f"{value:10.4f}" for value in values)
        lines.append(f"{model:{width}}  {history:9}  {cells}")
    lines.append("95 % intervals:")
    for model, split, history in prefixes:
        lines.append(_with_ends(figures, f"{model}/{split}/{history}", f"{model:{width}}", history))
    gains = [prefix for prefix in prefixes if f"gain_over/{'/'.join(prefix)}/R@10" in figures]
    if gains:
        lines.append("gain of whyrec, paired by user, with 95 % intervals:")
    for model, split, history in gains:
        prefix = f"gain_over/{model}/{split}/{history}"
        lines.append(_with_ends(figures, prefix, f"{model:{width}}", history, sign="+"))
    for key, value in figures.items():
        if not _is_ranking(key) and not key.startswith("gain_over/"):
            if key.rsplit("/", 1)[-1] in _ENDS:
                continue
            ends = ""
            if f"{key}/low" in figures:
                ends = f" [{figures[f'{key}/low']:.4f}, {figures[f'{key}/high']:.4f}]"
            lines.append(f"{key} {value:.4g}{ends}")
    return "\n".join(lines)


def _is_ranking(key: str) -> bool:
    parts = key.split("/")
    return len(parts) >= 4 and parts[2] in ("excluded", "kept")


def _with_ends(
    figures: Mapping[str, float], prefix: str, model: str, history: str, *, sign: str = ""
) -> str:
    cells = []
    for name in ("R@10", "N@10"):
        key = f"{prefix}/{name}"
        ends = f"[{figures[f'{key}/low']:{sign}.4f}, {figures[f'{key}/high']:{sign}.4f}]"
        cells.append(f"{name} {f'{figures[key]:{sign}.4f} ' if sign else ''}{ends}")
    return f"{model}  {history:9}  {'   '.join(cells)}"


def _row_order(prefix: tuple[str, ...]) -> tuple:
    """History excluded first, our model last in each block."""
    model, _, history = prefix
    return (history != "excluded", model.startswith("whyrec"), model)
