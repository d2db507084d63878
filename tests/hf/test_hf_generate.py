"""`generate` in every way that transformers offers, and what a batch must not do to its rows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

import internlm2.hf  # noqa: F401 - registers
from goldens import GENERATE_GOLDENS, golden, golden_folder
from internlm2.errors import RequestError


def load(name: str, **options: object) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(golden_folder(name), **options).eval()
    model.generation_config.eos_token_id = None
    return model


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids and mask of rows of different length."""
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((torch.full((longest - len(row),), 2), row)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return ids, mask


def prompt(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 500, (num_tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GENERATE_GOLDENS)
def test_a_left_padded_batch_gives_the_logits_of_each_row_alone(name):
    model, tensors = load(name), golden(name)
    ids, mask = tensors["generate.input_ids"], tensors["generate.attention_mask"]
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        for row, kept in enumerate(mask.bool()):
            alone = model(ids[row, kept][None]).logits[0]
            torch.testing.assert_close(together[row, kept], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gqa", "dynamic-ntk"])
def test_a_batch_generates_what_each_row_generates_alone(name, implementation):
    # 60 + 8 goes beyond the trained 64 of dynamic-ntk, 9 + 8 does not.
    model = load(name, attn_implementation=implementation)
    rows = [prompt(60), prompt(9, seed=1), prompt(31, seed=2)]
    ids, mask = left_padded(rows)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 60:]
    for row, answer in zip(rows, together, strict=True):
        alone = model.generate(row[None], max_new_tokens=8, do_sample=False)[0, len(row) :]
        assert answer.tolist() == alone.tolist()


def test_a_long_request_never_changes_a_later_short_one():
    model = load("dynamic-ntk")
    short, long = prompt(32)[None], prompt(200, seed=1)[None]
    with torch.no_grad():
        before = model(short).logits
        answer_before = model.generate(short, max_new_tokens=20, do_sample=False)
        model(long)
        model.generate(long, max_new_tokens=5, do_sample=False)
        assert torch.equal(model(short).logits, before)
    assert model.generate(short, max_new_tokens=20, do_sample=False).tolist() == answer_before.tolist()


@pytest.mark.parametrize("name", ["dynamic-ntk", "dynamic-ntk-factor3", "linear", "gqa"])
@pytest.mark.parametrize("chunks", [[150], [64, 86], [1, 99, 50], [100] + [1] * 50])
@torch.no_grad()
def test_prefill_is_chunks_is_decode_beyond_the_trained_length(name, chunks):
    model, ids = load(name), prompt(150)[None]
    expected = model(ids).logits
    cache, found = DynamicCache(config=model.config), []
    limits = torch.tensor([150])
    for chunk in ids.split(chunks, dim=1):
        found.append(model(chunk, past_key_values=cache, length_limits=limits).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_without_the_limit_chunks_differ_so_the_limit_is_what_joins_them():
    model, ids = load("dynamic-ntk"), prompt(150)[None]
    cache = DynamicCache(config=model.config)
    found = torch.cat([model(chunk, past_key_values=cache).logits for chunk in ids.split(75, dim=1)], dim=1)
    assert (found - model(ids).logits).abs().max() > 1e-2


@torch.no_grad()
def test_generate_decodes_what_one_pass_over_the_answer_gives():
    model, ids = load("dynamic-ntk"), prompt(60)[None]
    output = model.generate(
        ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    decoded = torch.stack(output.logits, dim=1)  # (B, T, V)
    whole = model(output.sequences, length_limits=torch.tensor([100])).logits[:, 59:-1]
    torch.testing.assert_close(decoded, whole, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_keeps_the_base_of_its_first_request():
    model, ids = load("dynamic-ntk"), prompt(60)[None]
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    again = torch.cat((first, prompt(10, seed=3)[None]), dim=1)
    second = model.generate(
        again, past_key_values=cache, max_new_tokens=30, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    whole = model(second.sequences, length_limits=torch.tensor([100])).logits[:, 109:-1]
    torch.testing.assert_close(torch.stack(second.logits, dim=1), whole, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_reference_mode_takes_the_length_of_the_padded_batch_so_far():
    model = load("dynamic-ntk", rope_mode="reference")
    rows = [prompt(100), prompt(9, seed=1)]
    ids, mask = left_padded(rows)
    found = model(ids, attention_mask=mask).logits[1, -9:]
    torch.testing.assert_close(
        found, load("dynamic-ntk")(rows[1][None], length_limits=torch.tensor([100])).logits[0], atol=1e-5, rtol=1e-5
    )  # fmt: skip
    cache = DynamicCache(config=model.config)
    model(rows[0][None, :90], past_key_values=cache)
    step = model(rows[0][None, 90:], past_key_values=cache).logits
    assert (step - model(rows[0][None]).logits[:, 90:]).abs().max() > 1e-3  # the official mix of bases


@pytest.mark.parametrize("name", ["gqa", "dynamic-ntk"])
def test_static_cache_generates_what_the_dynamic_one_does(name):
    model = load(name)
    ids, mask = left_padded([prompt(60), prompt(40, seed=1)])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, cache_implementation="static",
        disable_compile=True,
    )  # fmt: skip
    assert found.tolist() == expected.tolist()


@torch.no_grad()
def test_a_static_cache_in_the_users_hand_equals_one_pass():
    model, ids = load("dynamic-ntk"), prompt(100)[None]
    cache = StaticCache(config=model.config, max_cache_len=128)
    limits = torch.tensor([100])
    found = torch.cat(
        [model(c, past_key_values=cache, length_limits=limits).logits for c in ids.split([80, 20], dim=1)],
        dim=1,
    )
    torch.testing.assert_close(found, model(ids).logits, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def naive_beams(model: PreTrainedModel, row: torch.Tensor, *, num_beams: int, num_steps: int) -> list[int]:
    """Beam search without an end token, by running the whole sequence at every step."""
    beams = [(0.0, [])]
    limits = torch.tensor([len(row) + num_steps])
    for _ in range(num_steps):
        grown = []
        for score, answer in beams:
            ids = torch.cat((row, torch.tensor(answer, dtype=torch.long)))[None]
            logprobs = model(ids, length_limits=limits).logits[0, -1].log_softmax(-1)
            best = logprobs.topk(num_beams)
            grown += [
                (score + gain, [*answer, token])
                for gain, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(grown, reverse=True)[:num_beams]
    return beams[0][1]


@pytest.mark.parametrize("name", ["gqa", "dynamic-ntk"])
def test_beam_search_equals_a_naive_one_for_each_row_of_a_batch(name):
    model, rows = load(name), [prompt(60), prompt(30, seed=1)]
    ids, mask = left_padded(rows)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=3, do_sample=False)
    for row, answer in zip(rows, found, strict=True):
        assert answer[60:].tolist() == naive_beams(model, row, num_beams=3, num_steps=8)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.8},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": True, "typical_p": 0.9},
        {"do_sample": True, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2},
        {"num_beams": 4, "num_beam_groups": 1, "length_penalty": 0.5, "early_stopping": True},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [9, 11]]},
        {"min_new_tokens": 8},
        {"repetition_penalty": 1.2, "renormalize_logits": True},
        {"prefill_chunk_size": 16},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
    ],
    ids="-".join,
)
def test_every_sampling_option_runs_beyond_the_trained_length(options):
    model, ids = load("dynamic-ntk"), prompt(60)[None]
    torch.manual_seed(0)
    options = {"do_sample": False, **options}
    output = model.generate(ids, max_new_tokens=10, **options)
    assert output.shape == (options.get("num_return_sequences", 1), 70)
    assert (output[:, :60] == ids).all()
    assert (output < model.config.vocab_size).all()
    greedy = {"prefill_chunk_size", "prompt_lookup_num_tokens", "use_cache", "min_new_tokens"}
    if greedy & options.keys():
        assert output.tolist() == model.generate(ids, max_new_tokens=10, do_sample=False).tolist()
    if "no_repeat_ngram_size" in options:
        pairs = list(zip(output[0].tolist(), output[0, 1:].tolist(), strict=False))[59:]
        assert len(set(pairs)) == len(pairs)


def test_sampling_is_repeatable_with_a_seed_and_changes_with_another():
    model, ids = load("gqa"), prompt(8)[None]

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=16, do_sample=True, temperature=1.0).tolist()

    assert sample(0) == sample(0) != sample(1)


def test_embeddings_in_place_of_ids_give_the_same_answer():
    model, ids = load("dynamic-ntk"), prompt(60)[None]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[:, 60:]
    found = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=20, do_sample=False
    )
    assert found.tolist() == expected.tolist()


def test_contradicting_arguments_are_refused():
    model = load("dynamic-ntk")
    with pytest.raises(RequestError, match="either input_ids or inputs_embeds"):
        model(None)
    with pytest.raises(RequestError, match="of 3 sequences, but the batch has 2 rows"):
        model(torch.ones(2, 4, dtype=torch.long), length_limits=torch.tensor([9, 9, 9]))


@pytest.mark.slow
def test_a_compiled_model_with_a_static_cache_gives_the_same_answer():
    model, ids = load("dynamic-ntk"), prompt(60)[None]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)
    model.forward = compiled
    found = model.generate(
        ids, max_new_tokens=20, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert found.tolist() == expected.tolist()
