"""The engine against outputs of the MARA authors' own code, where those are at hand."""

import re
from collections import defaultdict

import pytest
import torch

import golden
from mara_fast import Engine, MaraAgent
from mara_fast.prompts import encode_prompts
from mara_kernels.score import score
from mara_kernels.truncate import truncate

pytestmark = pytest.mark.skipif(golden.golden_folder() is None, reason=golden.MISSING)


def make_agent(name: str, variant: str = "mid", sign: float = 1.0) -> MaraAgent:
    """A golden actor loaded as a user would; sign -1 exchanges accept and reject."""
    agent = MaraAgent.from_official(golden.actor_path(name))
    bias = golden.actor_weights(name, variant)["output_linear.bias"]
    agent.output_linear.bias.copy_(bias)
    if sign < 0:
        agent.output_linear.weight.copy_(agent.output_linear.weight.flip(0))
        agent.output_linear.bias.copy_(agent.output_linear.bias.flip(0))
    return agent


@pytest.mark.parametrize("name", golden.model_names())
@pytest.mark.parametrize(
    ("window", "max_batch_size"),
    [
        (1, 36),
        pytest.param(3, 5, marks=pytest.mark.slow),
        pytest.param("auto", 1, marks=pytest.mark.slow),
    ],
)
def test_every_recorded_run(name: str, window: int | str, max_batch_size: int) -> None:
    """Ids, set sizes, verdicts and choices of all runs, batched by configuration."""
    groups = defaultdict(list)
    for run in golden.runs(name):
        groups[run["run"]].append(run)
    inputs, eos = golden.input_ids(name), golden.eos_token_ids(name)
    model = golden.load_model(name)
    compared = 0
    for runs in groups.values():
        prompts = [inputs[run["prompt"]] for run in runs]
        first = runs[0]
        if not golden.is_cascade(first):
            engine = Engine(model, False)
            for run, result in zip(
                runs, engine.generate(prompts, max_new_tokens=64, eos_token_id=eos), strict=True
            ):
                assert result.token_ids == run["ids"], run["run"]
                compared += 1
            continue
        agent = make_agent(name, first["actor"], golden.accept_sign(first))
        engine = Engine(model, agent, max_batch_size=max_batch_size)
        options = golden.decoding_options(first)
        results = engine.generate(prompts, window=window, eos_token_id=eos, **options)
        for run, result in zip(runs, results, strict=True):
            assert result.token_ids == run["ids"], run["run"]
            for token, (size, _, _) in zip(result.tokens, run["steps"], strict=True):
                assert token.num_candidates == size
                assert (token.verdict == "forced") == (size == 1)
            info = run["gen_info"]
            assert result.stats.num_decided == info["proxy_token_cnt"]
            assert result.stats.candidate_counts == {
                int(size): count for size, count in info["cand_token_dict"].items()
            }
            compared += 1
    assert compared == len(golden.runs(name))


def test_truncation_cases() -> None:
    logits, cases = golden.truncation()
    for case in cases:
        row = logits[case["row"]][None]
        found = truncate(row, top_k=case["topk"], top_p=case["topp"], capacity=row.shape[1])
        size = int(found.size)
        assert size == case["n"]
        if case["set_defined"]:
            assert set(found.ids[0, :size].tolist()) == set(case["cand"])
        if case["set_defined"] and case["order_defined"]:
            assert found.ids[0, :size].tolist() == case["cand"]
            expected = torch.tensor(case["logp"])
            torch.testing.assert_close(found.logprobs[0, :size], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", golden.model_names())
def test_traces(name: str) -> None:
    """Accept probabilities of recorded hidden states, and whole traces of recorded prompts."""
    records, tensors = golden.trace(name)
    agent = make_agent(name)
    engine = Engine(golden.load_model(name), agent)
    for record in records:
        (result,) = engine.generate(
            [record["input_ids"]],
            max_new_tokens=len(record["ids"]),
            strategy="max_prob",
            trace=True,
            ignore_eos=True,
        )
        for index, position in enumerate(record["positions"][:24]):
            hidden = tensors[position["hidden"]]
            accept_prob = torch.sigmoid(score(hidden, agent.parameters_for_scoring))
            expected = torch.tensor(position["p_accept"]).flatten()
            torch.testing.assert_close(accept_prob, expected, atol=5e-6, rtol=0)
            if result.token_ids[:index] != record["ids"][:index]:
                break  # max_prob scores every candidate, and leaves the recorded path in time
            traced = result.trace[index].candidates
            assert [c.token_id for c in traced] == position["cand"]


@pytest.mark.parametrize("name", golden.model_names())
def test_official_prompt_format(name: str) -> None:
    """The recorded prompts, taken apart and encoded again: chat template, and BOS twice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(golden.model_path(name))
    for ids in golden.input_ids(name).values():
        chats = _user_texts(tokenizer.decode(ids, skip_special_tokens=False))
        if len(chats) != 1:
            pytest.skip("a chat format that this test cannot take apart")
        [(_, encoded)] = encode_prompts(
            chats[0], tokenizer=tokenizer, prompt_format="official", vocab_size=len(tokenizer)
        )
        assert encoded == ids


def _user_texts(text: str) -> list[str]:
    """What the user said, in the chat formats of the golden models."""
    found = re.findall(
        r"<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>|\[INST\] ?(.*?) ?\[/INST\]", text, re.DOTALL
    )
    return [llama or mistral for llama, mistral in found]
