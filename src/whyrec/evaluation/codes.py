"""What each code of the SIDs has come to mean: its items and its words.

A code's *words* are those that its items have and others lack: categories and brands as the
catalogue writes them, and the words of titles, each counted once an item. They are ordered by the
z-score of their log-odds ratio against all other items with an informative Dirichlet prior (Monroe,
Colaresi & Quinn 2008, "Fightin' Words"): a prior as strong as a tenth of an average code, with the
catalogue's own shares, keeps a word that one item has from looking like a meaning. Only words with
a z above 1.96 are told, those whose 95 % interval leaves 0 out; a code without any has no meaning
that words could tell.

    catalogue = load_catalogue(Path("runs/ml-100k/model/aligned"))      # or a run folder
    for code in code_meanings(catalogue, level=0):
        print(code.code, len(code.items), [word.text for word in code.words])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from whyrec.catalog.dataset import Item, read_items
from whyrec.decode.model_folder import SETTINGS_FILE, catalogue_file
from whyrec.reasoning.pruning import read_vectors
from whyrec.reasoning.titles import bare_title, words_of
from whyrec.sid.index import read_sids
from whyrec.sid.trie import Trie
from whyrec.sid.vocabulary import code_token

_FEWEST = 2  # items of a code that a word must be of
_SHORTEST = 3  # letters of a title's word
_SURE = 1.96
_PRIOR = 0.1  # of an average code's terms


@dataclass(frozen=True)
class Catalogue:
    """Items and their SIDs, without the model.

    Attributes:
        items: N items.
        codes_NL: their SIDs.
        level_sizes: codes of each level.
        vectors_ND: item vectors, of length 1; None where there are none.
        missing: what is not there, in sentences.
    """

    items: list[Item]
    codes_NL: np.ndarray
    level_sizes: tuple[int, ...]
    vectors_ND: np.ndarray | None
    missing: list[str]


@dataclass(frozen=True)
class Word:
    """A word of a code: how many of its items have it, and how sure it is that they have it more.

    Attributes:
        text: a category or a brand as the catalogue writes it, or a title's word in lower case.
        kind: category, brand or title.
        count: items of the code that have it.
        z: log-odds ratio against the other items, over its standard error.
    """

    text: str
    kind: str
    count: int
    z: float


@dataclass(frozen=True)
class CodeMeaning:
    """One code of one level.

    Attributes:
        code: its number.
        items: item indices, the most typical (nearest to their mean vector) first.
        words: the surest first.
    """

    code: int
    items: list[int]
    words: list[Word]


def load_catalogue(folder: Path) -> Catalogue:
    """Items, SIDs and vectors of a model folder, or of a run folder.

    Raises:
        ValueError: when the folder is neither, or its parts do not belong together.
    """
    if (folder / SETTINGS_FILE).exists():
        paths = {
            name: catalogue_file(folder, name)
            for name in ("items.parquet", "sids.parquet", "trie.safetensors")
        }
        vectors = catalogue_file(folder, "embeddings.safetensors")
    elif (folder / "sids").is_dir():
        paths = {name: folder / "sids" / name for name in ("sids.parquet", "trie.safetensors")}
        paths["items.parquet"] = folder / "dataset" / "items.parquet"
        vectors = folder / "sids" / "embeddings.safetensors"
    else:
        raise ValueError(
            f"{folder} holds no SIDs; name a model folder such as runs/NAME/model/aligned, or a "
            "run for which `whyrec index` is done"
        )
    items = read_items(paths["items.parquet"])
    codes_NL = read_sids(paths["sids.parquet"], [item.item_id for item in items]).numpy()
    sizes = Trie.load(paths["trie.safetensors"]).level_sizes
    missing = []
    vectors_ND = None
    try:
        vectors_ND = read_vectors(vectors)
    except ValueError:
        missing.append(
            f"no item vectors ({vectors}): no map, and a code's items in catalogue order"
        )
    if vectors_ND is not None and len(vectors_ND) != len(items):
        missing.append(f"{vectors} holds vectors of other items: it is not used")
        vectors_ND = None
    untitled = sum(not item.title for item in items)
    if untitled:
        missing.append(f"{untitled:,} of {len(items):,} items have no title; ids stand for them")
    return Catalogue(items, codes_NL, sizes, vectors_ND, missing)


def name_of(item: Item) -> str:
    """An item's title; its id where it has none."""
    return item.title or f"(no title) {item.item_id}"


def code_meanings(
    catalogue: Catalogue, *, level: int, prefix: Sequence[int] = (), words: int = 6
) -> list[CodeMeaning]:
    """The codes of a level that are in use, by number.

    Args:
        catalogue: items and SIDs.
        level: which level, from 0.
        prefix: look only at items whose SID begins so, and compare them with each other: what a
            code means *there*.
        words: how many at most.

    Raises:
        ValueError: when no item's SID begins with the prefix.
    """
    codes_NL = catalogue.codes_NL
    if not 0 <= level < codes_NL.shape[1]:
        raise ValueError(f"levels are 0 to {codes_NL.shape[1] - 1}, not {level}")
    start = np.asarray(prefix, dtype=codes_NL.dtype)
    chosen_M = np.flatnonzero((codes_NL[:, : len(start)] == start).all(1))
    if not len(chosen_M):
        raise ValueError(f"no item's SID begins with {list(prefix)}; shorten the prefix")
    used, group_M = np.unique(codes_NL[chosen_M, level], return_inverse=True)
    terms, found_MT = _terms([catalogue.items[item] for item in chosen_M])
    counts_GT = _counts(group_M, found_MT, len(used))
    z_GT = log_odds(counts_GT)
    meanings = []
    for group, code in enumerate(used.tolist()):
        members = _typical_first(catalogue, chosen_M[group_M == group])
        order = np.argsort(-z_GT[group], kind="stable")
        told = [t for t in order if z_GT[group, t] > _SURE and counts_GT[group, t] >= _FEWEST]
        meanings.append(
            CodeMeaning(
                code,
                members,
                [
                    Word(terms[t][1], terms[t][0], int(counts_GT[group, t]), float(z_GT[group, t]))
                    for t in told[:words]
                ],
            )
        )
    return meanings


def code_words(catalogue: Catalogue, *, words: int = 3) -> dict[str, str]:
    """By code token, such as `<s_a_3>`, the code's surest words; none for a code without any."""
    found = {}
    for level in range(len(catalogue.level_sizes)):
        for meaning in code_meanings(catalogue, level=level, words=words):
            if meaning.words:
                told = ", ".join(word.text for word in meaning.words)
                found[code_token(level, meaning.code)] = told
    return found


def log_odds(counts_GT: np.ndarray) -> np.ndarray:
    """z-scores of each term's log-odds in a group against all other groups.

    With y a group's count of a term, n its count of all terms, a the term's prior and A the sum of
    priors: d = log((y+a) / (n+A-y-a)), minus the same of the other groups; z = d / sqrt(1/(y+a) +
    1/(y'+a)). All 0 for a single group.

    Args:
        counts_GT: how often each group has each term.
    """
    num_groups = len(counts_GT)
    total_T = counts_GT.sum(0)
    if num_groups < 2 or not total_T.sum():
        return np.zeros(counts_GT.shape)
    size_G1 = counts_GT.sum(1, keepdims=True)
    strength = _PRIOR * total_T.sum() / num_groups
    prior_T = strength * total_T / total_T.sum()
    with np.errstate(divide="ignore", invalid="ignore"):

        def odds(part_GT: np.ndarray, whole_G1: np.ndarray) -> np.ndarray:
            smooth = part_GT + prior_T
            return np.log(smooth) - np.log(whole_G1 + strength - smooth)

        others_GT = total_T - counts_GT
        delta_GT = odds(counts_GT, size_G1) - odds(others_GT, total_T.sum() - size_G1)
        error_GT = np.sqrt(1 / (counts_GT + prior_T) + 1 / (others_GT + prior_T))
        z_GT = delta_GT / error_GT
    return np.nan_to_num(z_GT, nan=0.0, posinf=0.0, neginf=0.0)


def _terms(items: Sequence[Item]) -> tuple[list[tuple[str, str]], sparse.csr_array]:
    """Terms as (kind, text), and which item has which: 0/1 [M, T]."""
    index: dict[tuple[str, str], int] = {}
    rows, columns = [], []
    for row, item in enumerate(items):
        found = {("category", name) for name in item.categories if name}
        found |= {("brand", item.brand)} if item.brand else set()
        found |= {
            ("title", word) for word in words_of(bare_title(item.title)) if len(word) >= _SHORTEST
        }
        for term in sorted(found):
            rows.append(row)
            columns.append(index.setdefault(term, len(index)))
    shape = (len(items), len(index))
    found_MT = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
    # A term of fewer items can be no code's word, and most terms of a large catalogue are.
    kept_T = np.flatnonzero(found_MT.sum(0) >= _FEWEST)
    terms = list(index)
    return [terms[t] for t in kept_T], found_MT[:, kept_T]


def _counts(group_M: np.ndarray, found_MT: sparse.csr_array, num_groups: int) -> np.ndarray:
    member_GM = sparse.csr_array(
        (np.ones(len(group_M)), (group_M, np.arange(len(group_M)))),
        shape=(num_groups, len(group_M)),
    )
    return (member_GM @ found_MT).toarray()


def _typical_first(catalogue: Catalogue, members: np.ndarray) -> list[int]:
    if catalogue.vectors_ND is None:
        return members.tolist()
    vectors = catalogue.vectors_ND[members]
    distance = np.linalg.norm(vectors - vectors.mean(0), axis=1)
    return members[np.argsort(distance, kind="stable")].tolist()
