"""The command line: parse, call, print. `whyrec COMMAND -h` tells each command's options."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from whyrec.failures import sentence
from whyrec.serve import commands as serving

# Stages import torch and transformers, which takes seconds: each command imports its own.

_DESCRIPTION = """A recommender that reasons, from raw logs to recommended items.

The stages, in order, each reading what the one before wrote into the run folder:

  whyrec prepare ml-100k --run runs/ml-100k
  whyrec index    --run runs/ml-100k --recipe recipes/ml-100k/index.yaml
  whyrec align    --run runs/ml-100k --recipe recipes/ml-100k/align.yaml
  whyrec activate --run runs/ml-100k --recipe recipes/ml-100k/activate.yaml
  whyrec enhance  --run runs/ml-100k --recipe recipes/ml-100k/grpo.yaml
  whyrec evaluate  runs/ml-100k/model/activated --run runs/ml-100k --think both
  whyrec recommend runs/ml-100k/model/activated --history 50,172,181
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 2 after one sentence about what was wrong."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown and not hasattr(options, "passed_on"):  # `serve` hands them to vLLM
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.passed_on = unknown
    try:
        options.call(options)
    except Exception as error:
        message = sentence(error)
        if message is None:
            raise
        _end_progress_bars()
        print(f"whyrec: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _end_progress_bars()
        print("whyrec: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _end_progress_bars() -> None:
    """Bars that an error cut short, so that the sentence about it has a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="whyrec", description=_DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _stage(commands, "prepare", _prepare, "read a log and a catalogue into a run folder")
    command.add_argument("source", help="a folder, a log file, or ml-100k for the embedded default")
    command.add_argument("--format", help="e.g. amazon2014, movielens, csv; told from the files")
    command.add_argument("--k-core", type=int, help="drop users and items with fewer events (5)")
    command.add_argument("--split", help="leave-one-out (default) or temporal")

    _stage(commands, "index", _index, "embed the items, give each a semantic ID, build the trie")
    _stage(commands, "align", _align, "teach the LLM the semantic IDs; makes model/aligned")
    _stage(commands, "activate", _activate, "teach it to say why first; makes model/activated")
    _stage(commands, "enhance", _enhance, "reward the thoughts that pay; makes model/enhanced")

    command = _command(commands, "evaluate", "rank the whole catalogue for a split's users")
    command.add_argument("model", type=Path, help="model folder, e.g. runs/NAME/model/aligned")
    command.add_argument("--run", type=Path, required=True, help="run folder with the data set")
    command.add_argument("--split", choices=("valid", "test"), default="test")
    command.add_argument("--beams", type=int, default=20, help="beam width (20)")
    command.add_argument("--users", type=int, default=0, help="a fixed random subset; 0 for all")
    command.add_argument("--sasrec", type=Path, help="SASRec's recipe, e.g. recipes/X/sasrec.yaml")
    command.add_argument("--tiger", type=Path, help="add TIGER by its recipe recipes/X/tiger.yaml")
    command.add_argument("--no-baselines", action="store_true", help="our model only")
    command.add_argument(
        "--prior",
        type=_prior,
        metavar="WEIGHT",
        help="add rows with counts and common words mixed in; a weight, or auto: by validation",
    )
    command.add_argument(
        "--language", action="store_true", help="add language kept, and captions of items"
    )
    command.add_argument(
        "--think",
        choices=("on", "off", "both"),
        help="rank with thinking, without, or both, and both mixed (off)",
        default="off",
    )
    command.add_argument("--thoughts", type=int, help="thoughts a user; else the model's setting")
    command.add_argument(
        "--against", type=Path, help="another model of the run, for gains over it by user"
    )
    command.add_argument(
        "--temperature", type=float, help="of their sampling; else the model's setting"
    )
    command.add_argument(
        "--traces", action="store_true", help="check the traces; writes RUN/eval/traces.parquet"
    )
    command.add_argument("--json", type=Path, help="write the record here besides RUN/eval")
    command.set_defaults(call=_evaluate)

    command = _command(commands, "recommend", "recommend items after a history")
    command.add_argument("model", type=Path, help="model folder, e.g. runs/NAME/model/aligned")
    who = command.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", action="append", help="a user of --run; may be given again")
    who.add_argument("--history", help="item ids, oldest first, with commas between them")
    command.add_argument("--run", type=Path, help="the run folder that knows the user")
    command.add_argument("-k", type=int, default=10, help="how many items (10)")
    command.add_argument(
        "--think", choices=("on", "off"), help="say why first; on where the model has learnt to"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(call=_recommend)

    command = _command(commands, "report", "tell a whole run on one page: HTML, and Markdown")
    command.add_argument("--run", type=Path, required=True, help="run folder, e.g. runs/NAME")
    told = "folder of records in place of the run's own, e.g. eval/results/NAME; may be given again"
    command.add_argument("--results", type=Path, action="append", default=[], help=told)
    command.add_argument("--published", type=Path, help="a file of eval/published to stand beside")
    command.add_argument("--output", type=Path, help="folder to write into (RUN/eval)")
    command.set_defaults(call=_report)

    command = _command(commands, "add-items", "add new items to a model, without training")
    command.add_argument("model", type=Path, help="model folder")
    command.add_argument("items", type=Path, help="CSV, TSV, JSON lines or Parquet of items")
    command.set_defaults(call=_add_items)
    serving.add_to(commands)
    return parser


def _command(commands, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text)


def _stage(commands, name: str, call, text: str) -> argparse.ArgumentParser:
    """The options that every stage has."""
    command = _command(commands, name, text)
    command.add_argument("--run", type=Path, required=True, help="run folder, e.g. runs/NAME")
    command.add_argument("--recipe", type=Path, help="YAML file of settings; defaults without it")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting of the recipe; may be given again",
    )
    command.add_argument("--force", action="store_true", help="run even if nothing has changed")
    command.set_defaults(call=call)
    return command


def _prepare(options: argparse.Namespace) -> None:
    from whyrec.catalog.prepare import PrepareRecipe, prepare
    from whyrec.recipe import load_recipe

    changes = {
        "source": options.source,
        "format": options.format,
        "k_core": options.k_core,
        "split": options.split,
    }
    changed = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    recipe = load_recipe(PrepareRecipe, options.recipe, [*options.set, *changed])
    prepare(options.run, recipe, force=options.force)


def _index(options: argparse.Namespace) -> None:
    from whyrec.backbone.load import load_backbone
    from whyrec.recipe import load_recipe
    from whyrec.sid.index import IndexRecipe, index

    recipe = load_recipe(IndexRecipe, options.recipe, options.set)
    index(options.run, recipe, force=options.force, load_backbone=load_backbone)


def _align(options: argparse.Namespace) -> None:
    from whyrec.recipe import load_recipe
    from whyrec.train.align import align
    from whyrec.train.align_recipe import AlignRecipe

    recipe = load_recipe(AlignRecipe, options.recipe, options.set)
    align(options.run, recipe, force=options.force)


def _activate(options: argparse.Namespace) -> None:
    from whyrec.recipe import load_recipe
    from whyrec.train.activate import activate
    from whyrec.train.activate_recipe import ActivateRecipe

    recipe = load_recipe(ActivateRecipe, options.recipe, options.set)
    activate(options.run, recipe, force=options.force)


def _enhance(options: argparse.Namespace) -> None:
    from whyrec.recipe import load_recipe
    from whyrec.train.enhance import enhance
    from whyrec.train.enhance_recipe import EnhanceRecipe

    recipe = load_recipe(EnhanceRecipe, options.recipe, options.set)
    enhance(options.run, recipe, force=options.force)


def _prior(text: str) -> float | Literal["auto"]:
    return "auto" if text == "auto" else float(text)


def _evaluate(options: argparse.Namespace) -> None:
    from whyrec.evaluation.evaluate import evaluate
    from whyrec.evaluation.report import figures_table
    from whyrec.evaluation.sasrec import SasrecRecipe
    from whyrec.evaluation.tiger import TigerRecipe
    from whyrec.recipe import load_recipe

    sasrec = tiger = None
    if not options.no_baselines:
        sasrec = load_recipe(SasrecRecipe, options.sasrec)
        tiger = load_recipe(TigerRecipe, options.tiger) if options.tiger else None
    figures = evaluate(
        options.model,
        options.run,
        split=options.split,
        beams=options.beams,
        users=options.users,
        sasrec_recipe=sasrec,
        tiger_recipe=tiger,
        prior_weight=options.prior,
        language=options.language,
        think=options.think,
        thoughts=options.thoughts,
        temperature=options.temperature,
        traces=options.traces,
        against=options.against,
        command=shlex.join(["whyrec", *sys.argv[1:]]),
        json_path=options.json,
    )
    print(figures_table(figures))


def _report(options: argparse.Namespace) -> None:
    from whyrec.evaluation.run_report import report

    shown = {name: getattr(options, name) for name in ("results", "published", "output")}
    for path in report(options.run, **shown):
        print(path)


def _recommend(options: argparse.Namespace) -> None:
    from whyrec.decode.recommender import Recommender

    histories: dict[str, list[str]] = {}
    if options.user:
        if options.run is None:
            raise ValueError("--user needs --run, the run folder that knows the user")
        from whyrec.catalog.dataset import Dataset

        dataset = Dataset.load(options.run / "dataset")
        for user in options.user:
            sequence = dataset.sequences[dataset.user(user)]
            histories[f"user {user}"] = [dataset.items[i].item_id for i in sequence]
    else:
        ids = [item_id.strip() for item_id in options.history.split(",")]
        histories["history"] = [item_id for item_id in ids if item_id]
    recommender = Recommender.from_pretrained(options.model)
    learnt = recommender.settings.thoughts is not None
    think = learnt if options.think is None else options.think == "on"
    answers = {}
    for name, history in histories.items():
        found = recommender.recommend(history, k=options.k, think=think)
        answers[name] = {"history": history, "items": [entry.as_dict() for entry in found]}
        if think:
            answers[name]["trace"] = found.trace
        if options.json:
            continue
        shown = [recommender.items[i] for i in recommender.indices(history[-8:])]
        print(f"\n{name}, {len(history)} items; the newest:")
        for item in shown:
            print(f"    {item.title or item.item_id}")
        if think:
            print(f"  thought: {' '.join(found.trace.split())}")
        print("  recommended:")
        for rank, entry in enumerate(found, start=1):
            print(f"  {rank:3}. {entry.title or entry.item_id}   {entry.score:.2f}")
    if options.json:
        print(json.dumps(answers, ensure_ascii=False, indent=2))


def _add_items(options: argparse.Namespace) -> None:
    from whyrec.decode.add_items import add_items

    added = add_items(options.model, options.items)
    print(f"added {added} items to {options.model}")


if __name__ == "__main__":
    sys.exit(main())
