"""Beams inside vLLM's worker: the methods that the engine calls by `collective_rpc`.

vLLM is started with `--worker-extension-cls whyrec.serve.worker.BeamWorker`, which adds these
methods to its worker. A call runs between two steps of the engine, on the model that vLLM has
loaded (`tree_model.py`), with the beam of `whyrec.decode`. Under tensor parallelism every rank
computes the same beams from the same hidden states.

On a CUDA device batches of usual size replay a graph (`cuda_graphs.py`); elsewhere beams whose
codes are forced cost nothing, and prompts that begin as earlier ones did are not computed again.

Arguments and results are plain lists, as they travel between processes.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from whyrec.decode.beam import BeamDecoder, Beams
from whyrec.decode.permitted import Rule
from whyrec.decode.prompt_cache import PromptCache
from whyrec.decode.ranking import batches
from whyrec.evaluation.beam_tree import beam_tree
from whyrec.serve.cuda_graphs import GraphedBeams
from whyrec.serve.tree_model import VllmTree
from whyrec.serve.tries import Shelf, shelf_of

# Keys and values of prompts that a CPU worker keeps: about a hundred prompts of a 135M model.
PROMPT_CACHE_BYTES = 1 << 30

Found = tuple[list[int], list[float]]


@dataclass
class BeamState:
    """What a worker needs for beams; made by the first call.

    Attributes:
        shelf: the tries.
        tree: vLLM's model.
        decoders: by version of the catalogue.
        graphs: by version, on a CUDA device.
        cache: prompts that were seen lately, on a CPU.
    """

    shelf: Shelf
    tree: VllmTree
    decoders: dict[int, BeamDecoder] = field(default_factory=dict)
    graphs: dict[int, GraphedBeams] = field(default_factory=dict)
    cache: PromptCache | None = None

    def decoder(self, version: int) -> BeamDecoder:
        """The beam search of one version."""
        if version not in self.decoders:
            self.decoders[version] = BeamDecoder(
                self.tree, vocabulary=self.shelf.vocabulary, trie=self.shelf.tries[version].trie
            )
        return self.decoders[version]

    def graphs_of(self, version: int) -> GraphedBeams:
        """The CUDA graphs of one version."""
        if version not in self.graphs:
            self.graphs[version] = GraphedBeams(self.decoder(version))
        return self.graphs[version]

    @torch.inference_mode()  # as vLLM runs, and compiled, its model
    def search(
        self, version: int, prompts: list[list[int]], *, width: int, rules: list[Rule]
    ) -> Beams:
        """Beams of one width for a batch that fits the device."""
        decoder = self.decoder(version)
        if self.tree.device.type == "cuda":
            return self.graphs_of(version)(prompts, width=width, rules=rules)
        permitted = decoder.permitted(rules) if any(rule != Rule() for rule in rules) else None
        prefilled = decoder.prefill(prompts, width=width, cache=self.cache)
        return decoder.search(prefilled, width=width, permitted=permitted)


class BeamWorker:
    """Methods that vLLM adds to its worker; `self` is the worker."""

    whyrec_beams: BeamState | None = None

    def whyrec_load(self) -> dict[str, Any]:
        """Get ready for beams.

        Returns:
            The newest catalogue's version, its number of items, the level sizes, the rows of the
            model's embedding, the bytes of this worker's weights and those of them held twice.

        Raises:
            ValueError: when the model is no WhyRec model, or cannot run over trees.
        """
        worker: Any = self
        config = worker.vllm_config
        model = config.model_config
        if self.whyrec_beams is None:
            shelf = shelf_of(model.model, device=worker.device, vocab_size=model.get_vocab_size())
            if shelf is None:
                raise ValueError(
                    f"{model.model} is not a WhyRec model folder (no whyrec.json); "
                    "name a folder that `whyrec align` wrote"
                )
            tree = VllmTree(
                worker.get_model(),
                config,
                vocabulary=shelf.vocabulary,
                device=worker.device,
            )
            cache = PromptCache(PROMPT_CACHE_BYTES) if worker.device.type == "cpu" else None
            self.whyrec_beams = BeamState(shelf, tree, cache=cache)
        shelf = self.whyrec_beams.shelf
        return {
            "version": shelf.newest,
            "num_items": shelf.trie.trie.num_items,
            "level_sizes": list(shelf.vocabulary.level_sizes),
            "vocab_size": model.get_vocab_size(),
            "weight_bytes": sum(part.nbytes for part in worker.get_model().parameters()),
            "copied_bytes": self.whyrec_beams.tree.copied_bytes,
        }

    def whyrec_add_catalogue(self, folder: str, version: int) -> int:
        """Load another catalogue beside those there are; the number of its items."""
        shelf = self._whyrec_state().shelf
        shelf.add(Path(folder), version)
        return shelf.trie.trie.num_items

    def whyrec_drop_catalogue(self, version: int) -> None:
        """Forget a catalogue that no request needs any more."""
        state = self._whyrec_state()
        state.graphs.pop(version, None)
        state.decoders.pop(version, None)
        state.shelf.drop(version)

    def whyrec_recommend(
        self,
        version: int,
        prompts: list[list[int]],
        widths: list[int],
        rules: list[list[Any]],
    ) -> list[Found]:
        """Beams after prompts.

        Args:
            version: of the catalogue.
            prompts: token ids, `<|sid_begin|>` last; validated by the engine.
            widths: beam width of each.
            rules: of each, `[excluded, allowed, prefixes]` as in `Rule`.

        Returns:
            Item indices and log-probabilities of each, best first.
        """
        state = self._whyrec_state()
        results: list[Found] = [([], [])] * len(prompts)
        for width in sorted(set(widths)):
            places = [i for i, asked in enumerate(widths) if asked == width]
            lengths = [len(prompts[i]) for i in places]
            for batch in batches(lengths, device=state.tree.device.type):
                chosen = [places[i] for i in batch]
                beams = state.search(
                    version,
                    [prompts[i] for i in chosen],
                    width=width,
                    rules=[Rule(*rules[i]) for i in chosen],
                )
                items, scores = beams.items_UW.tolist(), beams.scores_UW.tolist()
                for place, row_items, row_scores in zip(chosen, items, scores, strict=True):
                    found = sum(item >= 0 for item in row_items)
                    results[place] = (row_items[:found], row_scores[:found])
        return results

    def whyrec_beam_tree(
        self, version: int, prompt: list[int], width: int, rule: list[Any]
    ) -> list[dict[str, Any]]:
        """The beam after one prompt as a tree: a `Branch` of the root each, as dictionaries."""
        state = self._whyrec_state()
        _, branches = beam_tree(
            state.decoder(version), prompt, width=width, rule=Rule(*rule), cache=state.cache
        )
        return [asdict(branch) for branch in branches]

    def whyrec_statistics(self) -> dict[str, int]:
        """Tokens of prompts asked for, and how many of them were known."""
        cache = self._whyrec_state().cache
        if cache is None:
            return {"prompt_tokens": 0, "prompt_tokens_known": 0}
        return {"prompt_tokens": cache.tokens, "prompt_tokens_known": cache.hits}

    def _whyrec_state(self) -> BeamState:
        assert self.whyrec_beams is not None, "call whyrec_load first"
        return self.whyrec_beams
