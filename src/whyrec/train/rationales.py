"""The rationales of a run: which training steps get one, who writes it, and what is kept.

The last training events of each user are the steps; a writer explains each from its pruned history,
and `reasoning/filters.py` drops what leaks or is not true. What models wrote lies in
`RUN/rationales/`, a file for each way of asking, so that neither a kill nor another recipe throws
answers away; the rationales of a training lie beside the model that learnt from them.

    write_rationales(run, writing, dataset=dataset, encoder=encoder, own_thinker=make,
                     file=folder / "rationales.parquet")
    kept, report = read_rationales(folder / "rationales.parquet")
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from whyrec.catalog.dataset import Dataset, write_table
from whyrec.decode.think import Thinker
from whyrec.prompting.encoder import PromptEncoder
from whyrec.reasoning.asking import AnswerLog, Key, Step
from whyrec.reasoning.endpoint import EndpointSettings, write_with_endpoint
from whyrec.reasoning.facts import FactBook
from whyrec.reasoning.filters import RationaleFilter, Row, filter_rationales
from whyrec.reasoning.grounded import GroundedSettings, GroundedWriter
from whyrec.reasoning.own import write_own
from whyrec.reasoning.pruning import read_vectors
from whyrec.stage import fingerprint, write_json
from whyrec.workers import in_processes

WRITERS = ("grounded", "own", "endpoint")
_MIN_TOKENS = 4  # shorter ones say nothing
_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("user", pa.int32()),
        ("position", pa.int32()),
        ("target", pa.int32()),
        ("text", pa.string()),
        ("dropped", pa.string()),
    ]
)


@dataclass(frozen=True)
class Writing:
    """Who writes the rationales of a run, and how.

    Attributes:
        writer: grounded, own (the aligned model) or endpoint.
        grounded: how the grounded writer writes; the others are shown as many history items.
        endpoint: which endpoint; None for the other writers.
        own_tokens: budget of the aligned model's answers.
        own_temperature: of their sampling.
        steps_per_user: training events of each user that get one, the last ones; 0 for all.
        max_history: items of a history in a prompt.
        max_tokens: of a rationale that is kept.
        seed: of all that is drawn.
    """

    writer: str
    grounded: GroundedSettings
    endpoint: EndpointSettings | None
    own_tokens: int
    own_temperature: float
    steps_per_user: int
    max_history: int
    max_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.writer not in WRITERS:
            raise ValueError(f"writer: {self.writer!r} is none of {', '.join(WRITERS)}")
        assert (self.endpoint is not None) == (self.writer == "endpoint")


@dataclass(frozen=True)
class Rationales:
    """What is kept of the rationales of a run, in the order of users and positions.

    Attributes:
        keys: user index and position in the user's training events.
        texts: the rationales.
    """

    keys: list[Key]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.keys)


def training_steps(dataset: Dataset, *, steps_per_user: int, max_history: int) -> list[Step]:
    """The training steps that get a rationale: the last of each user, oldest first.

    Args:
        dataset: only its training events are looked at.
        steps_per_user: at most; 0 for all.
        max_history: items of a history that the prompt holds at most.
    """
    steps = []
    for user, sequence in enumerate(dataset.training_sequences()):
        own = sequence.tolist()
        first = max(1, len(sequence) - steps_per_user) if steps_per_user else 1
        for position in range(first, len(sequence)):
            history = sequence[max(0, position - max_history) : position].tolist()
            steps.append(Step(user, position, history, int(sequence[position]), own))
    return steps


def write_rationales(
    run: Path,
    writing: Writing,
    *,
    dataset: Dataset,
    encoder: PromptEncoder,
    own_thinker: Callable[[], Thinker],
    file: Path,
) -> None:
    """Write, filter and save the rationales of a run, dropped ones with the reason.

    Args:
        run: the run folder.
        writing: who writes, and how.
        dataset: of the run.
        encoder: counts tokens.
        own_thinker: makes the aligned model a writer.
        file: the Parquet file; the report lies beside it as JSON.

    Raises:
        ValueError: when the endpoint fails (what is done is kept), or nothing is fit to train on.
    """
    steps = training_steps(
        dataset, steps_per_user=writing.steps_per_user, max_history=writing.max_history
    )
    texts, counts = _write(run, writing, dataset, steps, encoder, own_thinker)
    checker = RationaleFilter(
        dataset.items,
        book=FactBook(dataset.items),
        count_tokens=lambda text: len(encoder.text(text)),
        min_tokens=_MIN_TOKENS,
        max_tokens=writing.max_tokens,
        free_text=writing.writer != "grounded",
        guesses="expected" in writing.grounded.announce,
    )
    rows = [
        Row(step.user, step.position, step.history, step.target, texts[step.key])
        for step in steps
        if step.key in texts  # the others were beyond the endpoint's budget
    ]
    reasons, report = filter_rationales(rows, checker)
    if not report.kept:
        why = ", ".join(report.dropped) or "no training steps"
        raise ValueError(
            f"none of {report.written} rationales by the {writing.writer} writer is fit to train "
            f"on ({why}); try another writer or a larger thought_tokens"
        )
    columns = {
        "user_id": [dataset.user_ids[row.user] for row in rows],
        "user": [row.user for row in rows],
        "position": [row.position for row in rows],
        "target": [row.target for row in rows],
        "text": [row.text for row in rows],
        "dropped": reasons,
    }
    told = {"steps": len(steps), **asdict(report), "share_kept": round(report.share_kept, 4)}
    write_json(_report_file(file), told | {"writer": counts})
    write_table(file, pa.table(columns, schema=_SCHEMA))  # last: it says that all is done


def read_rationales(file: Path) -> tuple[Rationales, dict]:
    """What `write_rationales` kept, and its report."""
    rows = [row for row in pq.read_table(file).to_pylist() if row["dropped"] is None]
    keys = [(row["user"], row["position"]) for row in rows]
    report = json.loads(_report_file(file).read_text(encoding="utf-8"))
    return Rationales(keys, [row["text"] for row in rows]), report


def _report_file(file: Path) -> Path:
    return file.with_suffix(".json")


def _write(
    run: Path,
    writing: Writing,
    dataset: Dataset,
    steps: list[Step],
    encoder: PromptEncoder,
    own_thinker: Callable[[], Thinker],
) -> tuple[dict[Key, str | None], dict[str, int]]:
    """What the writer wrote by step, None where it had nothing to say; and its own counts."""
    items, vectors_ND = dataset.items, read_vectors(run / "sids" / "embeddings.safetensors")
    pruned = writing.grounded.pruned
    if writing.writer == "grounded":
        readable = writing.grounded.readable
        writer = GroundedWriter(
            items,
            vectors_ND=vectors_ND,
            settings=writing.grounded,
            seed=writing.seed,
            near=encoder.notes.graded if encoder.notes else None,
            shown=[encoder.note_text(n) for n in range(len(items))] if readable else (),
        )

        def write(n: int) -> str | None:
            step = steps[n]
            found = writer.write(
                step.history,
                step.target,
                user=step.user,
                position=step.position,
                own=step.own,
            )
            return found.text if found else None

        written = in_processes(write, len(steps), progress="rationales")
        return dict(zip((step.key for step in steps), written, strict=True)), {}
    asked = {"dataset": fingerprint(run / "dataset"), "pruned": pruned}
    asked |= {"max_history": writing.max_history}
    if writing.writer == "endpoint":
        assert writing.endpoint is not None
        how = {"model": writing.endpoint.model, "max_tokens": writing.endpoint.max_tokens}
        how |= {"temperature": writing.endpoint.temperature}
        report = write_with_endpoint(
            steps,
            items=items,
            vectors_ND=vectors_ND,
            settings=writing.endpoint,
            log=_log_file(run, "endpoint", asked | how),
            pruned=pruned,
        )
        return report.answers, report.counts
    asked |= {"model": fingerprint(run / "model" / "aligned"), "seed": writing.seed}
    asked |= {"max_tokens": writing.own_tokens, "temperature": writing.own_temperature}
    log = AnswerLog(_log_file(run, "own", asked), asked=asked)
    thinker = own_thinker()
    on_gpu = thinker.decoder.device.type == "cuda"
    counts = write_own(
        steps,
        thinker=thinker,
        items=items,
        vectors_ND=vectors_ND,
        log=log,
        max_tokens=writing.own_tokens,
        temperature=writing.own_temperature,
        seed=writing.seed,
        pruned=pruned,
        batch_size=256 if on_gpu else 16,
    )
    return log.answers(), counts


def _log_file(run: Path, writer: str, asked: dict) -> Path:
    """A file for each way of asking, so that answers once paid for are found again."""
    told = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return run / "rationales" / f"{writer}-{told}.jsonl"
