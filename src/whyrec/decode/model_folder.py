"""A model folder: all that is needed to recommend, in one place.

Weights and tokenizer as any Hugging Face model (plain `AutoModelForCausalLM` loads it), beside
`items.parquet`, `sids.parquet`, `trie.safetensors`, what new items are encoded with
(`codebooks.safetensors`, `embeddings.safetensors`), the prompt templates
and `whyrec.json`.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from whyrec.backbone.load import load_backbone
from whyrec.catalog.alike import Alike
from whyrec.catalog.covisits import CoVisits
from whyrec.catalog.dataset import Item, read_items
from whyrec.catalog.withheld import withheld
from whyrec.decode.think import ThoughtSettings
from whyrec.prompting.encoder import PromptEncoder, item_text
from whyrec.prompting.notes import Notes
from whyrec.prompting.templates import template_file
from whyrec.sid.index import read_sids
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary
from whyrec.stage import write_json

SETTINGS_FILE = "whyrec.json"
# A folder of catalogue files that `add-items` finished but was killed before it moved them all.
ADDED = ".added"
CATALOGUE_FILES = (
    "sids.parquet",
    "codebooks.safetensors",
    "trie.safetensors",
    "embeddings.safetensors",
)
COVISITS_FILE = "covisits.parquet"
ALIKE_FILE = "alike.parquet"
# Settings that are gone, with the values at which a model does not miss them.
_RETIRED = {
    "neighbour_decay": 0.0,
    "neighbour_damping": 0.5,
    "neighbour_grades": False,
    "shortlist": 0,
}
TEMPLATES = ("recommend", "rationale")


@dataclass(frozen=True)
class Settings:
    """What `whyrec.json` says of a model.

    Attributes:
        stage: the stage that made it: aligned, activated or enhanced.
        backbone: the name it was made from.
        level_sizes: codes of each SID level.
        max_history: items of a history that the prompt holds at most.
        thoughts: how the model thinks; None where it has not learnt to.
        withheld: share of the items whose text alignment never showed.
        note_events: how many of a history's newest events carry notes (`prompting/notes.py`).
        neighbours: neighbours in a note at most.
        text_tokens: tokens of the event's text in a note at most.
        alike: items in a note that are like the event by their text, at most.
    """

    stage: str
    backbone: str
    level_sizes: list[int]
    max_history: int
    thoughts: ThoughtSettings | None = None
    withheld: float = 0.0
    note_events: int = 0
    neighbours: int = 0
    text_tokens: int = 0
    alike: int = 0

    @property
    def looks_up_visits(self) -> bool:
        """Whether prompts tell what others chose, so that the model goes with their counts."""
        return bool(self.neighbours or self.alike)

    def notes(
        self,
        items: Sequence[Item],
        *,
        visits: Path,
        alike: Path | None = None,
        training: bool = False,
    ) -> Notes | None:
        """The notes of this model's prompts; None where it has none.

        Args:
            items: the catalogue.
            visits: the catalogue's `covisits.parquet`.
            alike: the catalogue's `alike.parquet`; None to measure it.
            training: nothing is said of items whose text alignment withholds.
        """
        if not (self.note_events and (self.looks_up_visits or self.text_tokens)):
            return None
        ids = [item.item_id for item in items]
        texts: list[str] = []
        if self.text_tokens:
            silent_N = withheld(items, share=self.withheld if training else 0.0)
            texts = [
                item_text(item)
                if not silent and (item.title or item.categories or item.brand)
                else ""
                for item, silent in zip(items, silent_N, strict=True)
            ]
        return Notes(
            self.note_events,
            self.neighbours,
            CoVisits.load(visits, item_ids=ids) if self.looks_up_visits else None,
            text_tokens=self.text_tokens,
            texts=texts,
            alike=self.alike,
            likeness=self._likeness(items, alike) if self.alike else None,
        )

    @staticmethod
    def _likeness(items: Sequence[Item], path: Path | None) -> Alike:
        if path is None:
            return Alike.measure(items)
        return Alike.load(path, item_ids=[item.item_id for item in items])


@dataclass(frozen=True)
class ModelFolder:
    """A loaded model folder."""

    settings: Settings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    items: list[Item]
    codes_NL: Tensor
    trie: Trie
    vocabulary: SidVocabulary
    encoder: PromptEncoder


def save_model_folder(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    dataset_folder: Path,
    sids_folder: Path,
) -> None:
    """Write a model folder; catalogue files are copied from the run's `dataset/` and `sids/`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name_weights(folder)
    shutil.copyfile(dataset_folder / "items.parquet", folder / "items.parquet")
    noted = [COVISITS_FILE] if settings.looks_up_visits else []
    for name in [*CATALOGUE_FILES, *noted]:
        shutil.copyfile(sids_folder / name, folder / name)
    if settings.alike:
        items = read_items(folder / "items.parquet")
        item_ids = [item.item_id for item in items]
        Alike.measure(items).save(folder / ALIKE_FILE, item_ids=item_ids)
    (folder / "prompts").mkdir(exist_ok=True)
    for name in TEMPLATES:
        shutil.copyfile(template_file(name), folder / "prompts" / f"{name}.yaml")
    write_json(folder / SETTINGS_FILE, asdict(settings))


def name_weights(folder: Path) -> None:
    """Write an index of the weights, unless there is one.

    vLLM loads every safetensors file of a folder as weights unless an index names those that are.
    """
    index = folder / "model.safetensors.index.json"
    weights = folder / "model.safetensors"
    if index.exists() or not weights.exists():  # large models are saved in parts, with an index
        return
    with safe_open(weights, framework="pt") as file:
        weight_map = dict.fromkeys(sorted(file.keys()), weights.name)
    metadata = {"total_size": weights.stat().st_size}
    write_json(index, {"metadata": metadata, "weight_map": weight_map})


def load_model_folder(
    folder: Path, *, device: str | None = None, dtype: torch.dtype | None = None
) -> ModelFolder:
    """Load a model folder.

    Args:
        folder: what `whyrec align` (or a later stage) wrote.
        device: e.g. `cuda` or `cpu`; the GPU if there is one.
        dtype: of the weights; bf16 on a GPU, float32 on a CPU (bf16 is slower on most).

    Raises:
        ValueError: when the folder is no model folder, or its parts do not belong together.
    """
    settings = read_settings(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    items, codes_NL = read_catalogue(folder)
    trie = Trie.load(catalogue_file(folder, "trie.safetensors"))
    if trie.num_items != len(items) or list(trie.level_sizes) != settings.level_sizes:
        raise ValueError(
            f"the trie in {folder} holds {trie.num_items} items and the catalogue {len(items)}: "
            "they belong to different catalogues; copy the folder again as a whole"
        )
    model, tokenizer = load_backbone(str(folder), dtype=dtype)
    vocabulary = SidVocabulary.bind(tokenizer, level_sizes=settings.level_sizes)
    encoder = folder_encoder(
        folder, tokenizer, vocabulary=vocabulary, items=items, codes_NL=codes_NL
    )
    model = model.to(device).eval()  # type: ignore[arg-type]
    return ModelFolder(settings, model, tokenizer, items, codes_NL, trie, vocabulary, encoder)


def folder_encoder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary: SidVocabulary,
    items: Sequence[Item],
    codes_NL: Tensor,
) -> PromptEncoder:
    """The prompts of a model folder, in its own words, for items of these SIDs."""
    settings = read_settings(folder)
    return PromptEncoder(
        tokenizer,
        vocabulary=vocabulary,
        codes_NL=codes_NL.tolist(),
        template_folder=folder / "prompts",
        thinks=settings.thoughts is not None,
        notes=settings.notes(
            items,
            visits=folder / COVISITS_FILE,
            alike=catalogue_file(folder, ALIKE_FILE),
        ),
    )


def read_catalogue(folder: Path) -> tuple[list[Item], Tensor]:
    """A model folder's items and their SIDs, codes_NL int64."""
    items = read_items(catalogue_file(folder, "items.parquet"))
    ids = [item.item_id for item in items]
    return items, read_sids(catalogue_file(folder, "sids.parquet"), ids)


def catalogue_file(folder: Path, name: str) -> Path:
    """Where a catalogue file of a model folder lies: what was added last counts."""
    added = folder / ADDED / name
    return added if added.exists() else folder / name


def read_settings(folder: Path) -> Settings:
    """What a model folder's `whyrec.json` says.

    Raises:
        ValueError: when the folder is no model folder, or the file is damaged.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        raise ValueError(
            f"{folder} is not a WhyRec model folder (no {SETTINGS_FILE}); "
            "name a folder that `whyrec align` wrote, such as runs/NAME/model/aligned"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for name, off in _RETIRED.items():
            if values.get(name) == off:
                del values[name]
        if values.get("thoughts"):
            values["thoughts"] = ThoughtSettings(**values["thoughts"])
        return Settings(**values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or of another version of WhyRec ({error}); "
            "copy the model folder again, or train it again"
        ) from None
