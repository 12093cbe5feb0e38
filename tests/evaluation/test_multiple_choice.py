import pytest
import torch

from hf_layerprune import LayerPruneError, MultipleChoice, Question, score_layers
from hf_layerprune.evaluation.multiple_choice import _can_pack, log_likelihoods
from hf_layerprune.forward.lm_head import ChunkedLMHead
from hf_layerprune.surgery.removal import without_layers

from ..conftest import LAYERS, make_model
from ..flash_attention import use_flash_attention
from ..tiny_models import tiny_model


QUESTIONS = [
    Question("The sky is", [" blue", " a kind of bread", " no"], 0),
    Question("Two and two are ", ["five", "four"], 1),  # its last space goes with the choices
    Question("", ["Once upon a time", "Once"], 1),
    Question("A cat", [" sat", " sang", " sank", " ate it", " went"], 3),
    Question("Question: is snow cold?\nAnswer:", [" yes", " no"], 0),
    Question("The opposite of up is", [" down", " left", " soup"], 0),
]


def likelihoods(model, tokenizer, question):
    """Of each choice, the plain way: one pass for each."""
    found = []
    for choice in question.choices:
        context = question.context.rstrip()
        text = question.context + choice
        before, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context, text))
        if not before:
            ids, before = [tokenizer.eos_token_id, *ids], [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
        found.append(sum(logits.log_softmax(-1)[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
    return found


def answers(model, tokenizer, normalize):
    right = []
    for question in QUESTIONS:
        found = likelihoods(model, tokenizer, question)
        if normalize:
            found = [x / len(c.removeprefix(" ")) for x, c in zip(found, question.choices, strict=True)]
        right.append(found.index(max(found)) == question.answer)
    return right


def named(name):
    return make_model(name) if name in ("llama", "gpt2", "gpt_neox", "qwen3", "gemma2") else tiny_model(name)


@pytest.mark.parametrize(
    ("name", "packs"),
    [
        ("llama", True),
        ("gpt2", True),
        ("gpt_neox", True),
        ("qwen3", True),
        ("gpt_bigcode", True),
        ("gemma2", False),
        ("mamba", False),
        ("mpt", False),
        ("rwkv", False),
        ("bloom", False),
    ],
)
@pytest.mark.parametrize("batch_tokens", [1, 200])
def test_likelihoods_are_those_of_each_choice_alone(name, packs, batch_tokens, tokenizer):
    model = named(name)
    if model.config.vocab_size < 260:
        model.resize_token_embeddings(260)
    task = MultipleChoice(QUESTIONS, tokenizer, batch_tokens=batch_tokens)
    with torch.no_grad():
        reader = ChunkedLMHead(model, task.example(model))
        assert _can_pack(reader, task.encoded[-1]) == packs
        batches = task.batches(reader)
        found = sorted(x for batch in batches for x in log_likelihoods(reader, batch)[0].tolist())
    assert batch_tokens > 1 or len(batches) == len(QUESTIONS)
    expected = sorted(x for question in QUESTIONS for x in likelihoods(model, tokenizer, question))
    assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_score_is_the_share_of_right_answers(normalize, tokenizer):
    for seed in range(4):
        model = make_model("llama", seed=seed)
        right = answers(model, tokenizer, normalize)
        task = MultipleChoice(QUESTIONS, tokenizer, normalize=normalize)
        assert task(model) == pytest.approx(sum(right) / len(right))


def test_a_context_is_read_once(llama, tokenizer):
    question = Question("x" * 40, [" one", " two", " six"], 0)
    task = MultipleChoice([question], tokenizer)
    read = []
    with torch.no_grad():
        reader = ChunkedLMHead(llama, task.example(llama))
        batches = task.batches(reader)
        llama.model.layers[0].register_forward_hook(lambda module, args, output: read.append(args[0].shape))
        log_likelihoods(reader, batches[0])
    assert read == [(1, 40 + 3 * 4, 32)]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_tokens", [30, 1024])
def test_scores_are_the_fall_of_the_share(name, batch_tokens, tokenizer):
    model = make_model(name)
    task = MultipleChoice(QUESTIONS, tokenizer, batch_tokens=batch_tokens)
    table = score_layers(model, [], "task", task=task, protected=[], progress=False)
    whole = answers(model, tokenizer, True)
    assert table.quality == pytest.approx(sum(whole) / len(whole))
    assert len(set(table.scores.values())) > 1
    for layer in range(LAYERS):
        with without_layers(model, layer):
            cut = answers(model, tokenizer, True)
        falls = torch.tensor([float(a) - b for a, b in zip(whole, cut, strict=True)], dtype=torch.float64)
        assert table.scores[layer] == pytest.approx(falls.mean().item())
        assert table.errors[layer] == pytest.approx((falls.std() / len(falls) ** 0.5).item())


def test_of_several_tasks_each_counts_the_same(llama, tokenizer):
    tasks = [MultipleChoice(QUESTIONS[:2], tokenizer), MultipleChoice(QUESTIONS[2:], tokenizer)]
    table = score_layers(llama, [], "task", task=tasks, progress=False)
    plain = score_layers(
        llama, [], "task", task=[lambda model: tasks[0](model), lambda model: tasks[1](model)], progress=False
    )
    assert table.quality == pytest.approx(plain.quality)
    assert table.scores == pytest.approx(plain.scores)
    assert len(set(table.scores.values())) > 1
    assert table.errors
    assert not plain.errors


def test_racing_reads_fewer_questions(tokenizer):
    """A model that is taught its answers loses them without any layer but the one that does nothing."""
    model = make_model("llama")
    for name, parameter in model.model.layers[3].named_parameters():
        if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            parameter.data.zero_()
    contexts = [f"{a} and {b} are" for a in "abcdefgh" for b in "ijklmnop"]
    questions = [Question(context, [" one", " two", " six", " ten", " all"], 0) for context in contexts]
    known = [likelihoods(model, tokenizer, question) for question in questions]
    questions = [
        Question(q.context, q.choices, known[i].index(max(known[i]))) for i, q in enumerate(questions)
    ]
    task = MultipleChoice(questions, tokenizer, normalize=False, batch_tokens=100)
    full = score_layers(model, [], "task", task=task, progress=False)
    raced = score_layers(model, [], "task", task=task, racing=0.95, progress=False)
    assert full.quality == 1
    assert full.scores[3] == 0
    assert raced.ranking()[0] == full.ranking()[0] == 3
    assert sum(raced.seen.values()) < 0.7 * sum(full.seen.values())


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "at least one question"),
        ([Question("a", [], 0)], "needs choices"),
        ([Question("a", ["b", "c"], 2)], "index of the right one"),
        ([Question("a", ["b", " "], 0)], "none empty"),
    ],
)
def test_bad_questions_are_refused(questions, message, tokenizer):
    with pytest.raises(LayerPruneError, match=message):
        MultipleChoice(questions, tokenizer)


def test_a_model_that_says_nan_answers_nothing(llama, tokenizer):
    task = MultipleChoice(QUESTIONS, tokenizer)
    assert task(llama) >= 0
    llama.model.norm.weight.data[3] = float("nan")
    assert task(llama) != task(llama)
    with pytest.raises(LayerPruneError, match="own score on calibration batch 1 is not a finite number"):
        score_layers(llama, [], "task", task=task, progress=False)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_answer_is_right_if_greedy_decoding_says_it(name, tokenizer):
    model = make_model(name)
    contexts = ["The cat sat on the", "Once upon a time", "x"]
    said = []
    for context in contexts:
        ids = torch.tensor([tokenizer(context)["input_ids"]])
        new = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
        said.append(new.tolist())
    backend = {i: letter for letter, i in tokenizer.get_vocab().items()}
    decoder = tokenizer.backend_tokenizer.decoder
    words = [decoder.decode([backend[i] for i in row]) for row in said]
    spelt = [tokenizer(word)["input_ids"] == row for word, row in zip(words, said, strict=True)]
    questions = [Question(context, [word]) for context, word in zip(contexts, words, strict=True)]
    wrong = [Question(q.context, [q.choices[0][:-1] + "!"]) for q in questions]
    read = MultipleChoice([*questions, *wrong], tokenizer, batch_tokens=60).read(model)
    right = [answer.right for answer in read]
    assert [one for one, same in zip(right, spelt, strict=False) if same] == [True] * sum(spelt)
    assert sum(spelt) > 0
    assert right[3:] == [False] * 3
    task = MultipleChoice([*questions, *wrong], tokenizer, batch_tokens=60)
    assert task(model) == pytest.approx(sum(right) / 6)


def test_flash_attention_never_sees_a_mask_for_each_pair_of_tokens(tokenizer, monkeypatch):
    """On a GPU it would read indices out of range, which ends the process."""
    model = use_flash_attention(make_model().to(torch.bfloat16), monkeypatch)
    shapes = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(getattr(kwargs.get("attention_mask"), "ndim", 2)),
        with_kwargs=True,
    )
    read = MultipleChoice(QUESTIONS, tokenizer).read(model)
    assert len(read) == len(QUESTIONS)
    assert set(shapes) == {2}
