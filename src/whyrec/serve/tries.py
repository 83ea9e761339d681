"""The tries that one worker process serves from, and the tokens they are spelt with.

The beams (`worker.py`) and the constraint on sampled text (`constraint.py`) live in one process and
share one shelf a model folder. A catalogue that changes gets a new version: its trie is put beside
the old one, which leaves the shelf when nobody needs it any more.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from whyrec.decode.model_folder import SETTINGS_FILE, catalogue_file, read_settings
from whyrec.decode.think import text_tokens
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import SidVocabulary


@dataclass(frozen=True, eq=False)
class ServedTrie:
    """One version of a catalogue.

    Attributes:
        trie: on the worker's device.
        first_child, code: the trie's arrays on the host, to walk with tokens that are there; as
            memory views, which give out Python's numbers quicker than arrays do.
    """

    trie: Trie
    first_child: memoryview
    code: memoryview

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "ServedTrie":
        """Read the trie of a model folder, or of a folder with just a catalogue."""
        return cls.of(Trie.load(catalogue_file(folder, "trie.safetensors")), device)

    @classmethod
    def of(cls, host: Trie, device: torch.device) -> "ServedTrie":
        """Serve a trie that is on the host."""
        views = (array.numpy().data for array in (host.first_child, host.code))
        return cls(host.to(device), *views)

    def children(self, node: int) -> tuple[int, int]:
        """The first child of an inner node, and where its children stop."""
        return self.first_child[node], self.first_child[node + 1]

    def walk(self, codes: list[int], *, node: int = 0) -> int:
        """The node of a prefix, from the root or another node; -1 where no item has it."""
        for code in codes:
            if node < 0:
                break
            low, high = self.children(node)
            child = bisect_left(self.code, code, low, high)
            node = child if child < high and self.code[child] == code else -1
        return node


@dataclass
class Shelf:
    """All versions that are served of one model folder.

    Attributes:
        folder: the model folder.
        device: of the worker.
        vocabulary: where the SID tokens are.
        control_C: int64, the tokens that no thought may hold.
        tries: by version.
        newest: the version that new requests get.
        before: the one before it, which text that was begun then may still need.
    """

    folder: Path
    device: torch.device
    vocabulary: SidVocabulary
    control_C: Tensor
    tries: dict[int, ServedTrie] = field(default_factory=dict)
    newest: int = 0
    before: ServedTrie | None = None

    @property
    def trie(self) -> ServedTrie:
        """The newest."""
        return self.tries[self.newest]

    def add(self, folder: Path, version: int) -> None:
        """Serve the catalogue of `folder` from now on.

        Raises:
            ValueError: when its SIDs are not of this model's level sizes.
        """
        served = ServedTrie.load(folder, self.device)
        if served.trie.level_sizes != self.vocabulary.level_sizes:
            raise ValueError(
                f"the trie in {folder} has levels {list(served.trie.level_sizes)} and the model "
                f"{list(self.vocabulary.level_sizes)}; encode the items with the model's codebooks"
            )
        if self.tries:
            self.before = self.trie
        self.tries[version] = served
        self.newest = version

    def drop(self, version: int) -> None:
        """Forget a version that is not the newest."""
        assert version != self.newest
        self.tries.pop(version, None)


_shelves: dict[Path, Shelf] = {}


def shelf_of(model: str, *, device: torch.device, vocab_size: int) -> Shelf | None:
    """This process's shelf of a model folder; None for a model that is not WhyRec's.

    Args:
        model: what vLLM calls the model: a folder, or a name on a hub.
        device: of the worker.
        vocab_size: rows of the model's head.
    """
    folder = Path(model)
    if not (folder / SETTINGS_FILE).exists():
        return None
    folder = folder.resolve()
    if folder not in _shelves:
        settings = read_settings(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        vocabulary = SidVocabulary.bind(tokenizer, level_sizes=settings.level_sizes)
        text_V = text_tokens(tokenizer, num_rows=vocab_size, stop=vocabulary.think_end)
        control_C = (~text_V).nonzero()[:, 0].to(device)
        shelf = Shelf(folder, device, vocabulary, control_C)
        shelf.add(folder, 0)
        _shelves[folder] = shelf
    return _shelves[folder]
