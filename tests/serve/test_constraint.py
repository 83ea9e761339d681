"""Sampled text that opens a SID holds a real one: in a real vLLM, and against both interfaces."""

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from served_models import one_llm, one_served, sids_in
from torch.utils._python_dispatch import TorchDispatchMode

from whyrec import Recommender
from whyrec.sid.trie import Trie

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'whyrec[serve-cpu]'")
pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def served_folder(prepared_run, tokenizer) -> Path:
    return one_served(prepared_run, tokenizer)


@pytest.fixture(scope="module")
def llm(served_folder: Path) -> Any:
    return one_llm(served_folder)


@pytest.fixture(scope="module")
def recommender(served_folder: Path) -> Recommender:
    return Recommender.from_pretrained(served_folder, device="cpu")


def generate(llm: Any, prompts: list[list[int]], params: Any) -> list[list[list[int]]]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = llm.generate(asked, params, use_tqdm=False)
    return [[list(output.token_ids) for output in one.outputs] for one in found]


def legal(recommender: Recommender) -> set[tuple[int, ...]]:
    return {tuple(codes) for codes in recommender._codes_NL.tolist()}


def check(ids: list[int], recommender: Recommender) -> int:
    """Every SID in a text is one of the catalogue, the last may be cut; how many there are."""
    found = sids_in(ids, recommender.encoder.vocabulary)
    items = legal(recommender)
    for codes in found:
        assert any(item[: len(codes)] == codes for item in items), f"no item begins {codes}"
    assert all(codes in items for codes in found[:-1])
    return len(found)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.0, "n": 3},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_p": 0.3, "top_k": 5, "n": 2},
        {"temperature": 1.5, "min_p": 0.2, "repetition_penalty": 3.0},
        {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": -2.0, "n": 2},
        {"temperature": 1.0, "min_tokens": 30},
        {"temperature": 1.0, "seed": 5, "n": 2, "logprobs": 2},
    ],
    ids=lambda how: "-".join(how),
)
def test_sids_are_real_however_they_are_sampled(llm, recommender, how: dict) -> None:
    """A text that opens a SID wherever it may, beside requests that never do."""
    from vllm import SamplingParams

    begin = recommender.encoder.vocabulary.begin
    wants = SamplingParams(max_tokens=40, logit_bias={begin: 100.0}, ignore_eos=True, **how)
    plain = SamplingParams(max_tokens=17, temperature=0.0, ignore_eos=True)
    prompts = [recommender.encoder.recommendation_prompt(h)[:-1] for h in ([1, 2], [9], [])] * 2
    words = recommender.encoder.text("Nothing to do with it at all")
    mixed = [prompt for pair in zip(prompts, [words] * 6, strict=True) for prompt in pair]
    found = generate(llm, mixed, [wants, plain] * 6)
    for texts in found[::2]:
        assert len(texts) == how.get("n", 1)
        for ids in texts:
            assert check(ids, recommender) >= 40 // 5
    alone = generate(llm, [words], plain)[0][0]
    assert all(texts == [alone] for texts in found[1::2])


def test_what_bans_every_legal_code_bans_nothing(llm, recommender) -> None:
    from vllm import SamplingParams

    vocabulary = recommender.encoder.vocabulary
    prompt = [*recommender.encoder.text("Take this:"), vocabulary.begin]
    only_words = SamplingParams(max_tokens=9, temperature=1.0, allowed_token_ids=[5, 6, 7], n=4)
    for ids in generate(llm, [prompt], only_words)[0]:
        assert check([vocabulary.begin, *ids], recommender) == 1
        assert ids[3] == vocabulary.end and set(ids[4:]) <= {5, 6, 7}


@pytest.mark.parametrize("begun", [0, 1, 2, 3])
def test_a_sid_that_the_prompt_has_begun_is_finished(llm, recommender, begun: int) -> None:
    from vllm import SamplingParams

    vocabulary, encoder = recommender.encoder.vocabulary, recommender.encoder
    prompt = [*encoder.text("Take"), *encoder.sid(4)[: 1 + begun]]
    params = SamplingParams(max_tokens=4 - begun, temperature=1.0, n=8)
    for ids in generate(llm, [prompt], params)[0]:
        assert check([*encoder.sid(4)[: 1 + begun], *ids], recommender) == 1
        assert ids[-1] == vocabulary.end


def test_a_prompt_that_talks_about_the_token_is_free(llm, recommender) -> None:
    from vllm import SamplingParams

    encoder = recommender.encoder
    prompt = [*encoder.text("The token"), encoder.vocabulary.begin, *encoder.text(" opens")]
    params = SamplingParams(max_tokens=3, temperature=0.0, allowed_token_ids=[5])
    assert generate(llm, [prompt], params)[0][0] == [5, 5, 5]


def test_samples_follow_the_models_own_probabilities(llm, recommender) -> None:
    """Sampling SIDs one code at a time is drawing from the distribution that the beam ranks by."""
    from vllm import SamplingParams

    prompt, draws = recommender.encoder.recommendation_prompt([3, 8, 1]), 800
    params = SamplingParams(max_tokens=3, temperature=1.0, n=16)
    found = generate(llm, [prompt] * (draws // 16), params)
    sids = Counter(
        tuple(t - o for t, o in zip(ids, recommender.encoder.vocabulary.offsets, strict=True))
        for texts in found
        for ids in texts
    )
    decoder = recommender.decoder
    beams = decoder.search(decoder.prefill([prompt], width=30), width=30)
    codes = recommender._codes_NL.tolist()
    expected = {
        tuple(codes[item]): math.exp(score)
        for item, score in zip(beams.items_UW[0].tolist(), beams.scores_UW[0].tolist(), strict=True)
    }
    distance = sum(abs(sids[sid] / draws - share) for sid, share in expected.items()) / 2
    assert set(sids) <= set(expected) and distance < 0.1


def test_after_preemption(llm, recommender) -> None:
    """Sixteen long texts do not fit into 40 blocks: some are put off and computed again."""
    from vllm import SamplingParams

    def preemptions() -> float:
        named = [m for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
        return sum(m.value for m in named)

    before = preemptions()
    begin = recommender.encoder.vocabulary.begin
    params = SamplingParams(
        max_tokens=120, temperature=1.0, logit_bias={begin: 100.0}, ignore_eos=True
    )
    prompts = [recommender.encoder.recommendation_prompt([n])[:-1] for n in range(16)]
    for texts in generate(llm, prompts, params):
        assert check(texts[0], recommender) == 24
    assert preemptions() > before


def test_text_only_requests_hold_text_only(llm, recommender) -> None:
    from vllm import SamplingParams

    encoder, tokenizer = recommender.encoder, recommender.encoder.tokenizer
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    control -= {encoder.vocabulary.think_end}
    params = SamplingParams(
        max_tokens=30,
        temperature=1.0,
        n=4,
        ignore_eos=True,
        logit_bias=dict.fromkeys(list(control)[:200], 100.0),
        extra_args={"whyrec_text": True},
    )
    for ids in itertools.chain(*generate(llm, [encoder.thinking_prompt([1])] * 3, params)):
        assert not set(ids) & control
    bad = SamplingParams(extra_args={"whyrec_text": "yes"})
    with pytest.raises(Exception, match="whyrec_text must be true or false"):
        generate(llm, [[5]], bad)


# --- the two interfaces, without a model ---


def config(folder: Path | str, **scheduler: Any) -> Any:
    model = SimpleNamespace(
        model=str(folder), get_vocab_size=lambda: 49_300, logits_processors=None
    )
    schedule = SimpleNamespace(async_scheduling=False, **scheduler)
    return SimpleNamespace(model_config=model, scheduler_config=schedule, speculative_config=None)


def expected_legal(ids: list[int], recommender: Recommender) -> set[int] | None:
    """The tokens that may follow a text, by looking at all items; None where all may."""
    vocabulary = recommender.encoder.vocabulary
    if vocabulary.begin not in ids:
        return None
    inside = ids[len(ids) - ids[::-1].index(vocabulary.begin) :]
    if vocabulary.end in inside:
        return None
    codes = tuple(t - o for t, o in zip(inside, vocabulary.offsets, strict=False))
    if len(codes) == vocabulary.num_levels:
        return {vocabulary.end}
    offset = vocabulary.offsets[len(codes)]
    following = {s[len(codes)] for s in legal(recommender) if s[: len(codes)] == codes}
    return {offset + code for code in following} or {vocabulary.end}


def texts(recommender: Recommender) -> list[list[int]]:
    """Texts of all kinds: words, codes of a history, SIDs cut anywhere, a prefix of no item."""
    encoder, vocabulary = recommender.encoder, recommender.encoder.vocabulary
    known = {codes[:2] for codes in legal(recommender)}
    pairs = itertools.product(range(4), range(4))
    missing = next((pair for pair in pairs if pair not in known), None)
    found = [[5, 6, 7], encoder.history([1, 2, 3]), [vocabulary.begin], [*encoder.sid(3), 5]]
    found += [[5, *encoder.sid(item)[:cut]] for item in (0, 9, 29) for cut in range(1, 6)]
    found += [[*encoder.sid(1), 5, *encoder.sid(2)[:2]]]
    if missing is not None:
        codes = [o + c for o, c in zip(vocabulary.offsets, missing, strict=False)]
        found.append([vocabulary.begin, *codes])
    return found


def allowed(logits_BV: torch.Tensor) -> list[set[int]]:
    return [set((row > -torch.inf).nonzero()[:, 0].tolist()) for row in logits_BV]


def agree(logits_BV: torch.Tensor, before_BV: torch.Tensor, asked: list[list[int]], rec) -> None:
    for row, (found, ids) in enumerate(zip(allowed(logits_BV), asked, strict=True)):
        expected = expected_legal(ids, rec)
        if expected is None:
            assert torch.equal(logits_BV[row], before_BV[row])
        else:
            assert found == expected
            if expected != {rec.encoder.vocabulary.end}:
                kept = list(expected)
                assert torch.equal(logits_BV[row, kept], before_BV[row, kept])


def test_v1_follows_a_changing_batch(served_folder, recommender) -> None:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from whyrec.serve.constraint import SidConstraint

    processor = SidConstraint(config(served_folder), torch.device("cpu"), False)
    rng, pool = np.random.default_rng(0), texts(recommender)
    batch: dict[int, list[int]] = {}
    outputs: dict[int, list[int]] = {}
    for _ in range(60):
        removed = [i for i in list(batch) if rng.random() < 0.3]
        for index in removed:
            del batch[index], outputs[index]
        added = []
        for index in range(12):
            if index not in batch and rng.random() < 0.4:
                ids = pool[rng.integers(len(pool))]
                cut = int(rng.integers(len(ids) + 1))
                outputs[index] = list(ids[cut:])
                batch[index] = ids[:cut]
                added.append((index, SamplingParams(), ids[:cut], outputs[index]))
        moved = []
        if len(batch) >= 2 and rng.random() < 0.5:
            left, right = (int(i) for i in rng.permutation(list(batch))[:2])
            moved.append((left, right, MoveDirectionality.SWAP))
            for table in (batch, outputs):
                table[left], table[right] = table[right], table[left]
        processor.update_state(BatchUpdate(12, removed, added, moved))
        before_BV = torch.randn(12, 49_300)
        logits_BV = processor.apply(before_BV.clone())
        asked = [batch[i] + outputs[i] if i in batch else [5] for i in range(12)]
        agree(logits_BV, before_BV, asked, recommender)


class Kernels(TorchDispatchMode):
    """Counts what would be a kernel on a GPU: all operations but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function._schema.returns
        self.count += not any(r.alias_info and not r.alias_info.is_write for r in returned)
        return function(*args, **(kwargs or {}))


def test_a_batch_at_all_levels_costs_as_many_kernels_as_one_row(served_folder, recommender) -> None:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from whyrec.serve.constraint import SidConstraint

    counts = []
    for asked in (texts(recommender)[4:5], texts(recommender) * 5):
        processor = SidConstraint(config(served_folder), torch.device("cpu"), False)
        added = [(row, SamplingParams(), [], ids) for row, ids in enumerate(asked)]
        processor.update_state(BatchUpdate(len(asked), [], added, []))
        logits_BV = torch.randn(len(asked), 49_300)
        processor.apply(logits_BV)
        with Kernels() as kernels:
            processor.apply(logits_BV)
        counts.append(kernels.count)
    assert counts[0] == counts[1] <= 12


def test_v2_interface(served_folder, recommender) -> None:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcRequestState

    from whyrec.serve.constraint import SidConstraint

    assert issubclass(SidConstraint, LogitsProcessor)
    asked = texts(recommender)
    slots = np.random.default_rng(1).permutation(len(asked) + 3)[: len(asked)]
    tokens = torch.full((len(asked) + 3, 64), 7, dtype=torch.int32)
    for slot, ids in zip(slots, asked, strict=True):
        tokens[slot, : len(ids)] = torch.tensor(ids)
    states = LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=len(tokens),
        vocab_size=49_300,
        all_token_ids=SimpleNamespace(gpu=tokens),
        prompt_len=None,
        prefill_len=None,
        total_len=None,
    )
    processor = SidConstraint(config(served_folder), states)
    for slot in slots:
        params = SimpleNamespace(extra_args={"whyrec_text": True} if slot == slots[0] else None)
        assert processor.add_request(int(slot), params)
    processor.apply_staged_writes()
    slots_B = torch.from_numpy(slots.astype(np.int32))
    ctx = LogitsContext(
        expanded_idx_mapping=slots_B,
        idx_mapping=slots_B,
        idx_mapping_np=slots,
        expanded_local_pos=torch.zeros(len(asked)),
        input_ids=torch.tensor([ids[-1] for ids in asked]),
        pos=torch.tensor([len(ids) - 1 for ids in asked]),
        seq_lens_upper_bound_np=np.array([len(ids) for ids in asked]),
    )
    before_BV = torch.randn(len(asked), 49_300)
    logits_BV = processor.apply(before_BV.clone(), ctx)
    agree(logits_BV[1:], before_BV[1:], asked[1:], recommender)
    vocabulary = recommender.encoder.vocabulary
    control = {vocabulary.begin, vocabulary.first, vocabulary.stop - 1}
    text = allowed(logits_BV[:1])[0]
    assert not text & control and vocabulary.think_end in text and len(text) > 40_000


def test_other_models_are_left_alone(tmp_path) -> None:
    from whyrec.serve.constraint import SidConstraint

    for model in (tmp_path, "some-org/some-model"):
        processor = SidConstraint(config(model), torch.device("cpu"), False)
        processor.update_state(None)
        logits_BV = torch.randn(2, 9)
        assert torch.equal(processor.apply(logits_BV.clone()), logits_BV)


def test_asynchronous_scheduling_is_refused_unless_tokens_are_kept(served_folder) -> None:
    from whyrec.serve.constraint import SidConstraint

    asynchronous = config(served_folder)
    asynchronous.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match="KeepTokenIds"):
        SidConstraint(asynchronous, torch.device("cpu"), False)
    asynchronous.model_config.logits_processors = ["whyrec.serve.constraint:KeepTokenIds"]
    SidConstraint(asynchronous, torch.device("cpu"), False)


def test_text_that_was_begun_before_a_change_is_finished(
    served_folder, recommender, tmp_path
) -> None:
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

    from whyrec.serve.constraint import SidConstraint
    from whyrec.serve.tries import Shelf

    processor = SidConstraint(config(served_folder), torch.device("cpu"), False)
    old: Shelf = processor._shelf
    shelf = Shelf(old.folder, old.device, old.vocabulary, old.control_C)
    shelf.add(served_folder, 0)
    processor._shelf = shelf
    codes_NL = recommender._codes_NL
    gone = codes_NL[:, 0] == codes_NL[0, 0]
    Trie.build(codes_NL[~gone], level_sizes=shelf.vocabulary.level_sizes).save(
        tmp_path / "trie.safetensors"
    )
    begun = recommender.encoder.sid(0)[:2]
    fresh = [shelf.vocabulary.begin]
    added = [(0, SamplingParams(), [], begun), (1, SamplingParams(), [], fresh)]
    processor.update_state(BatchUpdate(2, [], added, []))
    shelf.add(tmp_path, 1)
    found = allowed(processor.apply(torch.zeros(2, 49_300)))
    assert found[0] == expected_legal(begun, recommender)
    first = shelf.vocabulary.offsets[0]
    assert found[1] == {first + int(code) for code in codes_NL[~gone, 0].unique()}
