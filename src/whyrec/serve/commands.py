"""The commands `whyrec serve` and `whyrec think-ahead`: their options, and what they call."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

_LIMITS = {
    "body_bytes": "bytes of a request's body",
    "k": "items of an answer",
    "beam_width": "beams of a search",
    "history": "events of a history",
    "concurrency": "requests being answered at once",
    "queue": "requests that wait; more are answered 429",
}


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands to the command line's."""
    text = "serve a model folder on vLLM: OpenAI's API and /v1/recommendations"
    command = commands.add_parser(
        "serve",
        help=text,
        description=f"{text}. Options that are not listed here, such as "
        "--tensor-parallel-size 2, go to vLLM.",
        allow_abbrev=False,
    )
    command.add_argument("model", type=Path, help="model folder, e.g. runs/NAME/model/aligned")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    command.add_argument("--port", type=int, default=8000, help="(8000)")
    command.add_argument(
        "--api-key", default="", help="asked of clients; better given in WHYREC_API_KEY"
    )
    command.add_argument("--run", type=Path, help="the run folder whose users are known by id")
    command.add_argument("--ahead", default="", help="Think-Ahead store: a file or a redis:// URL")
    command.add_argument(
        "--ahead-max-age", type=float, default=86_400.0, metavar="SECONDS",
        help="what the store holds is used no longer than this (86400)",
    )  # fmt: skip
    command.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS",
        help="how long running requests may take after SIGTERM (30)",
    )  # fmt: skip
    for name, what in _LIMITS.items():
        option = f"--max-{name.replace('_', '-')}"
        command.add_argument(option, type=int, dest=f"max_{name}", help=f"limit: {what}")
    command.set_defaults(call=_serve, passed_on=[])

    text = "write users' thoughts and first codes in advance"
    command = commands.add_parser("think-ahead", help=text, description=text)
    command.add_argument("model", type=Path, help="model folder that has learnt to think")
    command.add_argument("--run", type=Path, required=True, help="run folder that knows the users")
    command.add_argument("--store", default="", help="a file or a redis:// URL (RUN/ahead.sqlite)")
    command.add_argument("--thoughts", type=int, help="thoughts a user; else the model's setting")
    command.add_argument("--width", type=int, default=50, help="prefixes a thought (50)")
    command.add_argument("--levels", type=int, help="codes of a prefix (all but the last)")
    command.add_argument("--user", action="append", default=[], help="only this user; repeatable")
    command.add_argument(
        "--ray", default="", metavar="ADDRESS",
        help="prepare on this Ray cluster with Ray Data; `local` starts one here",
    )  # fmt: skip
    command.add_argument(
        "--evaluate", choices=["valid", "test"],
        help="store nothing; rank this split's users with such thoughts, beside think and no-think",
    )  # fmt: skip
    command.add_argument("--users", type=int, default=0, help="of --evaluate; 0 for all")
    command.add_argument(
        "--news", type=int, default=1,
        help="of --evaluate: events since the thoughts were prepared (1)",
    )  # fmt: skip
    command.add_argument("--json", type=Path, help="write the record of --evaluate to this file")
    command.set_defaults(call=_think_ahead)


def _serve(options: argparse.Namespace) -> None:
    from whyrec.serve.server import check_installed, launch, serve

    check_installed()
    from whyrec.serve.settings import Limits, ServeSettings

    asked = {name: getattr(options, f"max_{name}") for name in _LIMITS}
    if wrong := [name for name, value in asked.items() if value is not None and value < 1]:
        raise ValueError(f"--max-{wrong[0].replace('_', '-')} must be at least 1")
    settings = ServeSettings(
        limits=dataclasses.replace(
            Limits(), **{name: value for name, value in asked.items() if value is not None}
        ),
        run=str(options.run or ""),
        ahead=options.ahead,
        ahead_max_age=options.ahead_max_age,
        drain_seconds=options.drain,
        api_key=options.api_key,
    )
    process = launch(
        options.model,
        host=options.host,
        port=options.port,
        settings=settings,
        rest=options.passed_on,
    )
    serve(process, drain_seconds=options.drain)


def _think_ahead(options: argparse.Namespace) -> None:
    if options.evaluate:
        _evaluate_ahead(options)
        return
    from whyrec.serve.think_ahead import think_ahead

    made = think_ahead(
        options.model,
        options.run,
        store=options.store,
        thoughts=options.thoughts,
        width=options.width,
        levels=options.levels,
        users=options.user,
        ray=options.ray,
    )
    print(f"prepared {made} users")


def _evaluate_ahead(options: argparse.Namespace) -> None:
    from whyrec.serve.ahead_quality import evaluate_ahead

    figures = evaluate_ahead(
        options.model,
        options.run,
        split=options.evaluate,
        users=options.users,
        news=options.news,
        thoughts=options.thoughts,
        width=options.width,
        levels=options.levels,
        command=shlex.join(["whyrec", *sys.argv[1:]]),
        json_path=options.json,
    )
    for key, value in sorted(figures.items()):
        print(f"{key:40s} {value:.6g}")
