"""What counting alone reaches on a run, before anything is trained.

    python -m whyrec.evaluation.counting runs/NAME [--split valid] [--json FILE]

Popularity, co-visitation as published and tuned, and counts with common words (`baselines.py`);
minutes on a CPU. A model that ranks below them is of no use to anyone.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from whyrec.catalog.dataset import Dataset
from whyrec.evaluation import baselines
from whyrec.evaluation.comparison import asked_examples, measured, rank_baselines
from whyrec.evaluation.results import record
from whyrec.stage import fingerprint, read_stage


def counting(run: Path, *, split: str, users: int = 0) -> dict[str, float]:
    """Figures `MODEL/SPLIT/HISTORY/METRIC` of all baselines that count.

    Args:
        run: a run folder with its `dataset`.
        split: valid or test; what is tuned is tuned on valid.
        users: a fixed random subset; 0 for all.

    Raises:
        ValueError: when the run is not prepared, or the split holds nobody.
    """
    read_stage(run / "dataset", made_by=f"whyrec prepare SOURCE --run {run}")
    dataset = Dataset.load(run / "dataset")
    examples = asked_examples(dataset, run, split=split, users=users)
    ranked = rank_baselines(
        dataset,
        examples,
        run,
        split=split,
        seed=0,
        counted=baselines.that_count(dataset),
        sasrec_recipe=None,
        tiger_recipe=None,
    )
    return measured(ranked, dataset, examples)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print R@10 and N@10 of each, and write a record where asked; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m whyrec.evaluation.counting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder, e.g. runs/NAME")
    parser.add_argument("--split", choices=("valid", "test"), default="test")
    parser.add_argument("--users", type=int, default=0, help="a fixed random subset; 0 for all")
    parser.add_argument("--json", type=Path, help="write a record here")
    options = parser.parse_args(arguments)
    try:
        figures = counting(options.run, split=options.split, users=options.users)
    except (ValueError, OSError) as error:
        print(f"whyrec: {error}", file=sys.stderr)
        return 2
    for key in figures:
        if key.endswith("/R@10"):
            name = key.removesuffix("/R@10")
            both = [figures[f"{name}/{metric}"] for metric in ("R@10", "N@10")]
            print(f"{name:40} R@10 {both[0]:.4f}  N@10 {both[1]:.4f}")
    if options.json:
        given = sys.argv[1:] if arguments is None else arguments
        record(
            options.json,
            name=f"{options.run.name} {options.split}",
            command=shlex.join(["python", "-m", "whyrec.evaluation.counting", *given]),
            seed=0,
            figures=figures,
            data_sha256=fingerprint(options.run / "dataset"),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
