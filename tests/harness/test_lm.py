"""lm-eval's requests and tasks on the tiny model, compared with its plain forward pass."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance

from engram_jax.config.errors import UserError
from engram_jax.harness import evaluate
from engram_jax.harness.lm import EngineLM
from engram_jax.harness.loading import CONSENT, Asked, load_tasks
from engram_jax.harness.scorer import Scorer
from tests.harness import local_tasks as tasks
from tests.harness.test_scorer import plain
from tests.serve.served import SERVE, full_logits, logprobs
from tests.serve.web import EOS, tokenizer

TEXT = "the cat sat on the mat, and then the dog ran to it: 12 + 30 = 42! who is it? (it is me.) "


def ids(text):
    return tokenizer().encode(text).ids


@pytest.fixture
def told():
    return []


@pytest.fixture
def lm(engine, told):
    return EngineLM(Scorer(engine), tokenizer(), EOS, told.append)


def ask(function, *requests):
    return function([Instance("loglikelihood", {}, request, 0) for request in requests])


def greedy(text, most, stops=()):
    """What greedy decoding by the plain forward pass gives, before the first stop string."""
    tokens, found = ids(text) or [EOS], []
    while len(found) < most:
        token = int(full_logits([*tokens, *found])[-1].argmax())
        if token == EOS:
            break
        found.append(token)
        said = tokenizer().decode(found)
        if any(stop in said for stop in stops):
            return min((said.split(stop)[0] for stop in stops), key=len)
    return tokenizer().decode(found)


# ---- requests ------------------------------------------------------------------------------------


def test_log_likelihoods(lm, told):
    """Trailing spaces belong to the continuation; without a context the end token stands there;
    of a context that is too long the end is read; a special token's name is text."""
    long = TEXT[:60] + "xyz"
    requests = [
        ("the cat", " sat"),
        ("the cat ", "sat"),
        ("the cat   ", "sat on"),
        ("", "the cat"),
        (long, " sat"),
        ("the <eos>", " cat"),
        ("é ", "äö €"),
    ]
    split = [
        (ids("the cat"), ids(" sat")),
        (ids("the cat"), ids(" sat")),
        (ids("the cat"), ids("   sat on")),
        ([EOS], ids("the cat")),
        (ids(long), ids(" sat")),
        (ids("the <eos>"), ids(" cat")),
        (ids("é"), ids(" äö €")),
    ]
    assert len(ids(long)) + 4 > SERVE.capacity + 1
    found = ask(lm.loglikelihood, *requests)
    wanted = [plain(*pair) for pair in split]
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in wanted], atol=1e-4)
    assert [g for _, g in found] == [g for _, g in wanted]
    assert len(told) == 1 and told[0].startswith("1 of 7 requests are longer than the 64 tokens")


def test_rolling(lm):
    """Every token is predicted once: the first after the end token, those of the last window with
    as much before them as the model reads."""
    long = (TEXT * 3)[:150]
    tokens, size = ids(long), SERVE.capacity
    whole, count = [EOS, *tokens], len(tokens)
    assert count == 150
    wanted = 0.0
    for first, last in ((0, 64), (64, 128), (128, 150)):
        begin = max(0, last - size)
        values = logprobs(full_logits(whole[begin:last]))
        wanted += sum(values[i - begin, whole[i + 1]] for i in range(first, last))
    short = plain([EOS], ids("who is it?"))[0]
    found = ask(lm.loglikelihood_rolling, (long,), ("who is it?",), ("",))
    np.testing.assert_allclose(found, [wanted, short, 0.0], atol=1e-3)


def test_generation(lm, told):
    how = {"until": ["q", "zz"], "max_gen_toks": 20}
    texts = ["the cat", "x", "", TEXT[:64]]
    many = [f"{n}{n}{n}" for n in range(20)] + ["e", "t", "o", " "]  # more than the engine takes
    found = ask(lm.generate_until, *((t, how) for t in texts), ("dog", how | {"until": many}))
    assert found[:3] == [greedy(text, 20, ("q", "zz")) for text in texts[:3]]
    assert found[3] == greedy(TEXT[20:64], 20, ("q", "zz"))
    assert found[4] == greedy("dog", 20, ("e", "t", "o", " "))
    assert "1 of 5 requests" in told[0]


def test_drawn_texts_differ_between_repeats_and_not_between_runs(lm):
    how = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    first, again = (ask(lm.generate_until, *[("the cat", how)] * 4) for _ in range(2))
    assert first == again and len(set(first)) > 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"num_beams": 3}, "generation_kwargs.num_beams: unknown; must be one of until"),
        ({"max_gen_toks": 64}, "max_gen_toks = 64: must be from 1 to 63"),
        ({}, "max_gen_toks = 256"),
    ],
)
def test_what_a_task_asks_and_the_model_cannot(lm, how, words):
    with pytest.raises(UserError, match=words):
        ask(lm.generate_until, ("a", how))


# ---- tasks ---------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": "who sat", "choices": ["the cat", "the dog", "a mat"], "label": 0},
    {"question": "who ran", "choices": ["dog", "cat"], "label": 1},
    {"question": "is it", "choices": ["a", "b", "c", "d"], "label": 2},
]
SHOT = "what is it answer: me; "
TRAIN = [{"question": "what is it", "choices": ["it", "me"], "label": 1}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    tasks.write(made, "choice", tasks.CHOICE, train=TRAIN, test=QUESTIONS)
    ends = [{"text": "the cat sat on", "end": " the mat"}, {"text": "12 + 30 =", "end": " 42"}]
    tasks.write(made, "likelihood", tasks.LIKELIHOOD, test=ends)
    tasks.write(made, "rolling", tasks.ROLLING, test=[{"text": TEXT}, {"text": "it is é"}])
    answers = [{"text": t, "answer": greedy(t, 12, ("a", "b"))} for t in ("who", "12 + 3", "it")]
    answers[1]["answer"] += "x"
    tasks.write(made, "generation", tasks.GENERATION, test=answers)
    tasks.write(made, "absent", tasks.GENERATION | {"dataset_path": "nobody/absent"})
    beams = tasks.GENERATION | {"generation_kwargs": {"num_beams": 3}}
    tasks.write(made, "beams", beams, test=answers)
    code = tasks.GENERATION | {"unsafe_code": True, "doc_to_target": "", "repeats": 1}
    code["metric_list"] = [{"metric": "PLACE"}]
    tasks.write(made, "code", code, test=[{"text": "x", "answer": ""}])
    (made / "utils.py").write_text(
        "import evaluate\nmetric = evaluate.load('code_eval')\n"
        "def passed(references, predictions):\n"
        "    found, _ = metric.compute(references=['assert 1 + 1 == 2', 'assert 0'],"
        " predictions=[['x = 1'], ['x = 1']], k=[1])\n    return found['pass@1']\n"
    )
    file = made / "code.yaml"
    file.write_text(
        file.read_text().replace("PLACE", "!function utils.passed\n  aggregation: mean")
    )
    group = {"group": "both", "task": ["choice", "likelihood"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (made / "both.yaml").write_text(json.dumps(group))
    return made


def result_of(engine, folder, *names, **more):
    asked = Asked(names, include=folder, **more)
    loaded, missing = load_tasks(asked)
    return evaluate.run(engine, EOS, loaded, missing, asked)


def test_a_task_of_every_output_type(engine, folder, capsys):
    names = ("both", "rolling", "generation")
    found = result_of(engine, folder, *names)
    assert found["left_out"] == {} and found["n-shot"]["choice"] == 1
    results = found["results"]

    acc, norm = [], []
    for question in QUESTIONS:
        context = ids(f"{SHOT}{question['question']} answer:")
        sums = [plain(context, ids(f" {choice}"))[0] for choice in question["choices"]]
        lengths = [len(choice) for choice in question["choices"]]
        acc.append(np.argmax(sums) == question["label"])
        norm.append(np.argmax(np.divide(sums, lengths)) == question["label"])
    assert results["choice"]["acc,none"] == pytest.approx(np.mean(acc))
    assert results["choice"]["acc_norm,none"] == pytest.approx(np.mean(norm))

    pairs = [(ids("the cat sat on"), ids(" the mat")), (ids("12 + 30 ="), ids(" 42"))]
    scores = [plain(*pair) for pair in pairs]
    wanted = math.exp(-np.mean([value for value, _ in scores]))
    assert results["likelihood"]["perplexity,none"] == pytest.approx(wanted, rel=1e-4)
    together = (sum(acc) + sum(g for _, g in scores)) / 5
    assert found["groups"]["both"]["acc,none"] == pytest.approx(together)

    assert len(TEXT.encode()) > SERVE.capacity  # two windows
    lm = EngineLM(Scorer(engine), tokenizer(), EOS, print)
    nats = -sum(ask(lm.loglikelihood_rolling, (TEXT,), ("it is é",)))
    size = len(TEXT.encode()) + len("it is é".encode())
    wanted = nats / size / math.log(2)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-5)

    assert results["generation"]["exact_match,none"] == pytest.approx(2 / 3)
    assert capsys.readouterr().out == ""  # lm-eval prints while it computes errors
    printed = evaluate.table(found)
    assert "|bits_per_byte|" in printed and "|both" in printed and "|Groups|" in printed
    assert json.loads(evaluate.as_json(found))["results"].keys() == results.keys()


def test_a_limit_and_other_shots(engine, folder):
    found = result_of(engine, folder, "choice", limit=2, shots=0)
    assert found["n-samples"]["choice"] == {"original": 3, "effective": 2}
    assert found["n-shot"]["choice"] == 0


def test_what_cannot_run_is_a_line_and_the_others_go_on(engine, folder):
    found = result_of(engine, folder, "absent", "likelihood", "code", "beams")
    assert found["results"].keys() == {"likelihood"}
    left = found["left_out"]
    assert left.keys() == {"absent", "code", "beams"}
    assert "its data set nobody/absent is not here" in left["absent"]
    assert "nobody___absent" in left["absent"]
    assert CONSENT in left["code"] and "num_beams" in left["beams"]
    assert not any("\n" in line for line in left.values())


def test_code_runs_where_the_user_says_so(engine, folder):
    """By the metric that is here: `evaluate.load` would download it."""
    found = result_of(engine, folder, "code", unsafe=True)
    assert found["results"]["code"]["passed,none"] == 0.5


def test_unknown_names(folder, tmp_path):
    with pytest.raises(UserError, match=r"--include_path=\S+: no such folder"):
        load_tasks(Asked(("choice",), include=tmp_path / "none"))
    with pytest.raises(UserError, match="paper stands alone"):
        load_tasks(Asked(("choice", "paper"), include=folder))
    with pytest.raises(UserError, match="--num_fewshot: not with --tasks=paper"):
        load_tasks(Asked(("paper",), shots=3))


# ---- beside lm-eval's client ---------------------------------------------------------------------


@pytest.mark.slow
def test_as_lm_evals_own_client_of_our_server(engine, folder):
    """`local-completions`, which sends tokens and reads `echo` and `logprobs`. It counts a token
    that it lets generate, so its windows are one shorter: texts here are short enough."""
    pytest.importorskip("tenacity", reason="the extra `api` of lm_eval is not installed")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from tests.serve.web import NAME, Running

    class Client(LocalCompletionsAPI):
        """With our tokenizer: its own are transformers' and a server's."""

        def tok_encode(self, string, *rest, **more):
            return ids(string) if isinstance(string, str) else [ids(text) for text in string]

        @property
        def eot_token_id(self):
            return EOS

        @property
        def prefix_token_id(self):
            return EOS

    pairs = [("the cat", " sat"), ("the cat ", "sat on"), ("", "the cat"), ("é", "äö €")]
    how = {"until": ["q"], "max_gen_toks": 16, "do_sample": False}
    prompts = ("the cat", "who is", "12 + 3")
    with Running(engine) as web:
        client = Client(
            base_url=f"http://127.0.0.1:{web.port}/v1/completions",
            model=NAME,
            tokenizer_backend=None,
            max_length=SERVE.capacity,
        )
        client.tokenizer, client.tokenized_requests = tokenizer(), True
        theirs = ask(client.loglikelihood, *pairs)
        rolled = ask(client.loglikelihood_rolling, (TEXT[:40],))
        client.tokenized_requests = False
        said = ask(client.generate_until, *((prompt, how) for prompt in prompts))
    lm = EngineLM(Scorer(engine), tokenizer(), EOS, print)
    ours = ask(lm.loglikelihood, *pairs)
    np.testing.assert_allclose([v for v, _ in ours], [v for v, _ in theirs], atol=1e-4)
    assert [g for _, g in ours] == [g for _, g in theirs]
    assert ask(lm.loglikelihood_rolling, (TEXT[:40],)) == pytest.approx(rolled, abs=1e-4)
    assert ask(lm.generate_until, *((prompt, how) for prompt in prompts)) == said
