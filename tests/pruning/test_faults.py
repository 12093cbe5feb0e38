"""Faults of training that real users met: labels, teachers, optimizers, other loops, several processes."""

import copy
import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    cache_teacher_logits,
    get_lineage,
    remove_layers,
    score_layers,
    select_layers,
)
from hf_layerprune.commands.cli import main
from hf_layerprune.distillation.losses import divergence, top_k_log_probs
from hf_layerprune.forward.token_losses import DIVERGENCES, logit_spread
from hf_layerprune.pruning.diagnostics import loss_diverged, loss_in_nats
from hf_layerprune.pruning.prune import prune_layers

from ..conftest import LAYERS, logits, make_model, tokens
from ..distillation.test_trainer import examples, gradients, make_trainer, students
from .test_callback import calibration, plain_trainer, pruning


ROOT = Path(__file__).parents[2]


# Labels


def labelled(labels, length=12):
    """Rows of which some are all -100."""
    ids = tokens(len(labels), length)
    masked = torch.full((length,), -100)
    rows = [row if counts else masked for row, counts in zip(ids, labels, strict=True)]
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": torch.stack(rows).tolist()})


def test_data_without_a_token_that_counts_is_refused_before_training():
    student, teacher = students()
    trainer = make_trainer(student, labelled([0] * 9), teacher_model=teacher)
    with pytest.raises(
        LayerPruneError, match="No token of the 9 rows in train_dataset counts: all labels are"
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_evaluation_without_a_token_that_counts_has_no_loss(caplog):
    student, teacher = students()
    trainer = make_trainer(student, teacher_model=teacher, hidden_weight=0.1)
    found = trainer.evaluate(labelled([0] * 4))
    assert all(np.isnan(found[name]) for name in ("eval_loss", "eval_kl", "eval_ce", "eval_hidden_mse"))
    assert caplog.text.count("No token of the evaluation data counts") == 1
    caplog.clear()
    some = trainer.evaluate(labelled([0, 1, 0, 1]))
    assert some["eval_loss"] == pytest.approx(
        trainer.evaluate(labelled([0, 1, 0, 1]).select([1, 3]))["eval_loss"]
    )
    assert "No token" not in caplog.text


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_without_a_token_that_counts_is_told_and_is_no_loss_of_zero(accumulated, caplog):
    order = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2 // accumulated}
    order |= {"gradient_accumulation_steps": accumulated, "learning_rate": 0.0}
    logs = []
    for data, steps in (
        (labelled([1, 1, 0, 0, 1, 1]), 3),
        (labelled([1, 1, 1, 1, 1, 1]).select([0, 1, 4, 5]), 2),
    ):
        student, teacher = students()
        settings = order | {"max_steps": steps, "logging_steps": steps, "ce_weight": 0.5}
        trainer = make_trainer(student, data, teacher_model=teacher, **settings)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "kl", "ce"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5)
    assert caplog.text.count("No token of step 2 counts") == 1


def test_a_stream_of_steps_without_tokens_logs_no_loss():
    student, teacher = students()
    data = labelled([0] * 8).to_iterable_dataset()  # which cannot be looked through beforehand
    trainer = make_trainer(student, data, teacher_model=teacher, max_steps=2)
    before = copy.deepcopy(student.state_dict())
    trainer.train()
    assert all(np.isnan(log["loss"]) and np.isnan(log["kl"]) for log in trainer.state.log_history[:2])
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_looking_for_labels_moves_no_random_state():
    """The collator may draw random numbers; the run is the same to the bit."""
    losses = []
    for draws in (False, True):
        student = make_model("gpt2", resid_pdrop=0.3)

        def collate(rows, left=[draws]):  # noqa: B006 (drawn once, before training)
            if left[0]:
                left[0] = False
                torch.rand(7)
            return default_data_collator(rows)

        trainer = make_trainer(student, collator=collate)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


# The teacher's tokenizer


def letters(seed, special="<end>", count=250):
    """A tokenizer of so many words, whose order the seed decides."""
    words = [f"w{i}" for i in range(count)]
    order = np.random.default_rng(seed).permutation(count) if seed else range(count)
    vocabulary = {special: 0, "<pad>": 1, **{words[word]: i + 2 for i, word in enumerate(order)}}
    backend = Tokenizer(models.WordLevel(vocabulary, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special, pad_token="<pad>")


@pytest.fixture
def teacher_folder():
    """A folder with a teacher of other weights, and a tokenizer of its own."""

    def make(tokenizer, **changes):
        make_model(seed=3, **changes).save_pretrained("teacher")
        tokenizer.save_pretrained("teacher")
        return "teacher"

    return make


@pytest.mark.parametrize("size", [260, 320])
@pytest.mark.parametrize("kind", ["folder", "model", "written"])
def test_a_teacher_with_another_tokenizer_is_refused(size, kind, teacher_folder, caplog):
    if (size, kind) == (320, "written"):
        pytest.skip("refused for its size")
    folder = teacher_folder(letters(2), vocab_size=size)
    teacher = folder
    if kind != "folder":
        teacher = LlamaForCausalLM.from_pretrained(folder)
    if kind == "written":
        cache_teacher_logits(teacher, [{"input_ids": tokens(8, 12)}], "said", top_k=5)
        teacher = "said"
    with pytest.raises(
        LayerPruneError, match=r"\(teacher\) has another tokenizer: \d+ of 252 token ids mean"
    ):
        make_trainer(make_model(), teacher_model=teacher, processing_class=letters(1))
    make_trainer(make_model(), teacher_model=teacher, processing_class=letters(2))
    assert "tokenizer" not in caplog.text


def test_the_students_tokenizer_may_be_that_of_its_folder(teacher_folder):
    make_model().save_pretrained("student")
    letters(1).save_pretrained("student")
    with pytest.raises(LayerPruneError, match="has another tokenizer"):
        make_trainer(LlamaForCausalLM.from_pretrained("student"), teacher_model=teacher_folder(letters(2)))


def test_a_few_other_tokens_are_told(teacher_folder, caplog):
    """As of models whose special tokens were renamed."""
    folder = teacher_folder(letters(1, "<stop>"))
    make_trainer(make_model(), teacher_model=folder, processing_class=letters(1))
    assert "1 of 252 token ids mean something else to the teacher" in caplog.text
    assert "token 0 is '<end>' to the student, '<stop>' to the teacher" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_tokenizer_that_cannot_be_known_is_told(family, caplog, tokenizer):
    """Some classes make an empty tokenizer of a folder without one: that is none."""
    make_model(family, seed=3).save_pretrained("teacher")
    make_trainer(make_model(family), teacher_model="teacher", processing_class=tokenizer)
    assert "The tokenizers of teacher and student cannot be compared" in caplog.text
    caplog.clear()
    student, teacher = students(family)
    make_trainer(student, teacher_model=teacher)  # the model that it was cut from
    assert "cannot be compared" not in caplog.text


def test_the_teacher_of_a_criterion_has_the_students_tokenizer_too(teacher_folder):
    teacher = LlamaForCausalLM.from_pretrained(teacher_folder(letters(2)))
    settings = {"max_steps": 2, "teacher_model": make_model()}
    for given in (letters(1), letters(2)):
        callback = pruning(criterion="kl", teacher=teacher)
        trainer = make_trainer(make_model(), callbacks=[callback], processing_class=given, **settings)
        if given.get_vocab() != letters(2).get_vocab():
            with pytest.raises(LayerPruneError, match="has another tokenizer"):
                trainer.train()
            assert trainer.state.global_step == 0
        else:
            trainer.train()


# Shallower and other teachers


@pytest.mark.parametrize("removed", [[], [1, 2]])
@pytest.mark.parametrize("kind", ["shallower", "pruned", "deeper", "written"])
def test_any_teacher_of_the_same_vocabulary_teaches_by_its_logits(kind, removed):
    changes = {"shallower": {"num_hidden_layers": 3}, "deeper": {"num_hidden_layers": 9}}.get(kind, {})
    teacher = make_model(seed=3, hidden_size=64, **changes)
    if kind in ("pruned", "written"):
        remove_layers(teacher, [0, 2])
    student = make_model()
    remove_layers(student, removed)
    ours, theirs = (logits(one, tokens(8, 12))[:, :-1].flatten(0, 1) for one in (student, teacher))
    expected = float(divergence(ours, theirs)) / len(ours)
    if kind == "written":
        cache_teacher_logits(teacher, [{"input_ids": tokens(8, 12)}], "said", top_k=259)
        teacher = "said"
    trainer = make_trainer(student, teacher_model=teacher, max_steps=3)
    trainer.train()
    log = trainer.state.log_history
    assert log[0]["kl"] == pytest.approx(expected, rel=1e-4)
    assert log[2]["kl"] < log[0]["kl"]


def test_a_run_with_a_shallower_teacher_loses_layers_and_resumes():
    teacher, ends = make_model(seed=3, num_hidden_layers=2), []
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    for resume in (None, "out/checkpoint-2"):
        student = make_model()
        trainer = make_trainer(student, teacher_model=teacher, callbacks=[pruning()], **settings)
        trainer.train(resume)
        assert len(get_lineage(student).kept) == 4
        ends.append(student.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# Mixtures of experts


def experts(seed=0, coefficient=1.0, balanced=True):
    config = MixtralConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=balanced,
        router_aux_loss_coef=coefficient,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MixtralForCausalLM(config).eval()


def test_the_balancing_loss_is_added_as_the_model_itself_adds_it():
    reference, student = experts(), experts()
    batch = tokens(8, 12)
    output = reference.train()(input_ids=batch, labels=batch)
    output.loss.backward()
    found, logged = gradients(make_trainer(student, kl_weight=0.0, ce_weight=1.0))
    assert logged["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert logged["aux_loss"] == pytest.approx(output.aux_loss.item(), rel=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hidden_weight": 0.3, "balance_hidden": True},
        {"kl_weight": 0.0, "hidden_weight": 1.0},
        {"trainable": "around_cuts"},  # layers that others share with the teacher are routed, too
        {"activation_checkpointing": True},
        {"peft_config": LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)},
    ],
)
def test_the_balancing_loss_is_a_term_of_every_loss(settings):
    results = []
    for balanced in (True, False):
        torch.manual_seed(0)
        student = experts(balanced=balanced)
        teacher = None if "peft_config" in settings else experts(balanced=balanced)
        remove_layers(student, [2])
        trainer = make_trainer(student, teacher_model=teacher, **settings)
        metrics = trainer.evaluate(examples())
        trainer.train()
        results.append((trainer.state.log_history[0], metrics))
    (log, metrics), (without, other) = results
    assert log["loss"] == pytest.approx(without["loss"] + log["aux_loss"], rel=1e-5)
    assert log["aux_loss"] > 1
    assert "aux_loss" not in without
    assert metrics["eval_loss"] == pytest.approx(other["eval_loss"])  # a cross-entropy, as of any model
    assert metrics["eval_aux_loss"] == pytest.approx(log["aux_loss"], rel=1e-4)


def test_the_balancing_loss_is_of_the_whole_accumulated_batch():
    logs = []
    for size, steps in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(experts(), train_sampling_strategy="sequential", **sizes)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    means = []
    for part in tokens(8, 12).split(2):
        with torch.no_grad():
            means.append(experts()(input_ids=part).aux_loss.item())
    assert logs[1]["aux_loss"] == pytest.approx(np.mean(means), rel=1e-5)
    assert logs[1]["loss"] == pytest.approx(logs[0]["loss"], rel=0.2)  # and not four times as much


def test_a_balancing_loss_of_unknown_weight_is_refused(monkeypatch):
    model = experts()
    del model.router_aux_loss_coef, model.config.router_aux_loss_coef
    monkeypatch.delattr(MixtralConfig, "router_aux_loss_coef", raising=False)
    with pytest.raises(LayerPruneError, match="mixtral has no router_aux_loss_coef"):
        make_trainer(model).train()


# The user's own optimizer


def one_group(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def layerwise(model, lineage=None):
    """One group for each layer; with a lineage, an empty one for each layer that is gone."""
    rest = [p for name, p in model.named_parameters() if ".layers." not in name]
    kept = list(range(len(model.model.layers))) if lineage is None else lineage.kept
    groups = [{"params": rest}]
    for original in range(LAYERS if lineage else len(kept)):
        layer = model.model.layers[kept.index(original)] if original in kept else nn.ModuleList()
        groups.append({"params": list(layer.parameters()), "lr": 1e-3 * 0.9**original})
    return torch.optim.AdamW(groups)


def own(model, optimizer, **settings):
    args = DistillationTrainingArguments(
        output_dir="out",
        max_steps=4,
        per_device_train_batch_size=8,
        save_strategy="steps",
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    return DistillationTrainer(
        model,
        args,
        teacher_model=make_model(seed=1),
        train_dataset=examples(),
        data_collator=default_data_collator,
        optimizers=(optimizer, None),
        callbacks=[pruning()],
    )


@pytest.mark.parametrize("make", [one_group, layerwise])
@pytest.mark.parametrize("start", ["original", "checkpoint"])
def test_a_run_with_an_own_optimizer_resumes(make, start):
    whole = make_model()
    own(whole, make(whole)).train()
    model = make_model() if start == "original" else LlamaForCausalLM.from_pretrained("out/checkpoint-2")
    trainer = own(model, make(model))
    if (make, start) == (layerwise, "checkpoint"):
        with pytest.raises(LayerPruneError, match="a group whose layers were removed stays as an empty one"):
            trainer.train("out/checkpoint-2")
        model = LlamaForCausalLM.from_pretrained("out/checkpoint-2")
        trainer = own(model, layerwise(model, get_lineage(model)))
    trainer.train("out/checkpoint-2")
    assert get_lineage(model) == get_lineage(whole)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


# A plain Trainer


def test_a_plain_trainer_with_adapters_on_the_uncut_base_is_told_what_to_do():
    def adapted():
        return get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], r=2))

    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = plain_trainer(adapted(), pruning(), **settings)
    trainer.train()
    gone = json.loads(Path("out/checkpoint-2/pruned_base.json").read_text())["kept_layers"]
    gone = sorted(set(range(LAYERS)) - set(gone))
    with pytest.raises(LayerPruneError, match=rf"remove_layers\(model, \[{gone[0]}\]\)"):
        plain_trainer(adapted(), pruning(), **settings).train(resume_from_checkpoint="out/checkpoint-2")


def test_weights_that_are_loaded_by_hand_are_not_looked_at(llama):
    trainer = plain_trainer(llama, pruning())
    llama.load_state_dict(make_model(seed=1).state_dict())
    trainer.train()
    assert not llama._load_state_dict_pre_hooks


# Logits that are no numbers a model would predict


def kl(p, q):
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum()


@pytest.mark.parametrize(
    "mask", [-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min]
)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
def test_divergences_of_masked_tokens_are_finite_and_those_of_the_definition(mask, temperature, who):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(5, 30, generator=generator) * 3 for _ in range(2))
    for one in {"teacher": [theirs], "student": [ours], "both": [ours, theirs]}[who]:
        one[:, 4:9] = mask
    p, q = ((one.double() / temperature).softmax(-1) for one in (theirs, ours))
    m = (p + q) / 2
    for kind in DIVERGENCES:
        expected = {"kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[kind]
        for top_k in (None, 4, 27):  # 27 are more than can be said
            own = ours.clone().requires_grad_()
            taught = theirs if top_k is None else top_k_log_probs(theirs, top_k, temperature)
            found = divergence(own, taught, kind, temperature)
            found.backward()
            assert torch.isfinite(found)
            assert torch.isfinite(own.grad).all()
            if top_k is None and torch.isfinite(expected):
                assert found.item() == pytest.approx(expected.item() * temperature**2, rel=1e-4, abs=1e-6)


class Masked(nn.Module):
    """An output head that can never say some tokens."""

    def __init__(self, head, value):
        super().__init__()
        self.head, self.value = head, value

    @property
    def weight(self):
        return self.head.weight

    def forward(self, states):
        return self.head(states).index_fill(-1, torch.arange(100, 110), self.value)


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("settings", [{}, {"divergence": "reverse_kl"}, {"divergence": "jsd"}, {"top_k": 9}])
@pytest.mark.parametrize("written", [False, True])
def test_models_with_masked_tokens_are_trained_and_scored(value, settings, written):
    student, teacher = students()
    for model in (student, teacher):
        model.lm_head = Masked(model.lm_head, value)
    data = tokens(8, 12) % 100
    rows = Dataset.from_dict({"input_ids": data.tolist(), "labels": data.tolist()})
    if written:
        cache_teacher_logits(teacher, [{"input_ids": data}], "said", top_k=9, temperature=0.5)
        teacher = "said"
    trainer = make_trainer(student, rows, teacher_model=teacher, max_steps=3, temperature=0.5, **settings)
    trainer.train()
    log = trainer.state.log_history
    assert np.isfinite(log[2]["loss"])
    assert log[2]["loss"] < log[0]["loss"]
    table = score_layers(student, [{"input_ids": data}], "kl", progress=False)
    assert all(np.isfinite(score) for score in table.scores.values())


def test_the_spread_of_logits_is_of_those_that_are_not_masked():
    """Or a tolerance in proportion to it would let everything pass."""
    plain = torch.randn(4, 30)
    for value in (-torch.inf, torch.finfo(torch.float32).min):
        masked = torch.cat([plain, torch.full((4, 5), value)], -1)
        assert logit_spread(masked) == logit_spread(plain) == pytest.approx(1, abs=0.2)
    assert logit_spread(plain * torch.nan) == 0


# Other loops


@pytest.mark.parametrize(
    ("losses", "in_nats", "told"),
    [
        ([0.0, -0.002, 0.001], False, False),  # of GRPO
        ([3.0, -40.0, 90.0], False, False),  # of REINFORCE
        ([1e-7, 1e-4, 0.3], True, False),  # of a student that begins as its teacher
        ([0.2, 0.3, 1.3], True, True),
        ([0.1, float("nan")], False, True),
    ],
)
def test_a_loss_that_may_take_any_value_does_not_run_away(losses, in_nats, told):
    assert (loss_diverged(losses, 1.0, in_nats) is not None) == told


class OtherLoss(Trainer):
    """A loop whose loss goes from below 0 to far above."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs)
        return loss * 0.0 + loss.detach() ** 0 * (50.0 * self.state.global_step - 3)


def test_other_loops_raise_no_alarm(caplog):
    callback = pruning(target_layers=5)
    args = plain_trainer(make_model(), callback).args
    trainer = OtherLoss(make_model(), args, train_dataset=examples(), callbacks=[callback])
    callback.set_trainer(trainer)
    trainer.train()
    assert not any("diverges" in sign for sign in callback.record.warnings)


def test_which_loss_in_nats(llama):
    class SFTTrainer(OtherLoss):  # as trl's, by name
        compute_loss = OtherLoss.compute_loss

    callback = pruning()
    trainer = plain_trainer(llama, callback)
    assert callback.trainer is trainer
    assert pruning().trainer is None
    assert loss_in_nats(trainer, trainer.args)
    trainer.compute_loss_func = len
    assert not loss_in_nats(trainer, trainer.args)
    for kind, known in ((OtherLoss, False), (SFTTrainer, True)):
        assert loss_in_nats(kind(llama, trainer.args), trainer.args) == known
    assert loss_in_nats(None, make_trainer(llama).args)
    assert not loss_in_nats(None, trainer.args)


def test_gradients_that_are_no_numbers_are_usual_with_float16(llama):
    callback = pruning()
    trainer = plain_trainer(llama, callback, max_steps=2)
    trainer.train()
    for half, told in ((True, False), (False, True)):
        callback._run.losses.start_phase()
        callback.record.warnings = []
        args = TrainingArguments(output_dir="out", use_cpu=True, report_to="none")
        args.fp16 = half
        state, control = trainer.state, trainer.control
        callback.on_log(args, state, control, model=llama, logs={"loss": 1.0, "grad_norm": float("inf")})
        assert bool(callback.record.warnings) == told


# Calibration


@pytest.mark.parametrize("kind", ["plain", "distillation"])
@pytest.mark.parametrize("form", ["data set", "several", "stream", "long"])
def test_the_evaluation_data_serves_as_calibration(kind, form, caplog, monkeypatch):
    rows = calibration()
    data = {"several": {"a": rows, "b": examples(2)}, "stream": rows.to_iterable_dataset()}.get(form, rows)
    used = rows
    if form == "long":
        monkeypatch.setattr("hf_layerprune.pruning.calibration.EVALUATION_ROWS", 2)
        used = rows.select([0, 2])
    tables = []
    for given, evaluated in ((None, data), (used, None)):
        callback = pruning(calibration=given, target_layers=5)
        output = {"output_dir": f"out-{len(tables)}", "max_steps": 1}
        if kind == "plain":
            args = plain_trainer(make_model(), callback, **output).args
            trainer = Trainer(
                make_model(), args, train_dataset=examples(), eval_dataset=evaluated, callbacks=[callback]
            )
            callback.set_trainer(trainer)
        else:
            trainer = make_trainer(make_model(), eval_dataset=evaluated, callbacks=[callback], **output)
        trainer.train()
        tables.append(callback.record.phases[0].removals[0].table)
    assert tables[0] == tables[1]
    name = "eval_dataset['a']" if form == "several" else "eval_dataset"
    assert f"layers are scored on {len(used)} rows of {name}." in caplog.text


def test_without_any_text_the_run_is_refused(llama):
    with pytest.raises(LayerPruneError, match=r"give `calibration`.* or give the Trainer an eval_dataset"):
        make_trainer(llama, callbacks=[pruning(calibration=None)], max_steps=2).train()


# The student and its teacher by name, and code of their own


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_the_student_may_be_a_folder(folder):
    settings = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    args = DistillationTrainingArguments(output_dir="out", **settings)
    for name in (folder, Path(folder)):
        trainer = DistillationTrainer(name, args, train_dataset=examples())
        assert torch.equal(logits(trainer.model, tokens()), logits(make_model(), tokens()))
        assert trainer.model.dtype == torch.float32
        assert len(trainer.processing_class) == 258
    with pytest.raises(LayerPruneError, match="Cannot load a model from 'no/such-model'"):
        DistillationTrainer(model="no/such-model", args=args, train_dataset=examples())


@pytest.fixture
def own_code(folder):
    """The folder of a model that comes with its own code."""
    config = json.loads(Path(folder, "config.json").read_text())
    config |= {"model_type": "own_llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    Path(folder, "config.json").write_text(json.dumps(config))
    Path(folder, "own.py").write_text(OWN_CODE)
    return folder


def test_code_of_its_own_reaches_student_and_teacher_in_a_script(own_code):
    with pytest.raises(LayerPruneError, match="trust_remote_code=True"):
        make_trainer(make_model(), teacher_model=own_code)
    args = make_trainer(make_model(), max_steps=4, save_strategy="steps", save_steps=2).args
    ends = []
    for resume in (None, "out/checkpoint-2"):
        trainer = DistillationTrainer(
            own_code,
            args,
            teacher_model=own_code,
            trust_remote_code=True,
            train_dataset=examples(),
            data_collator=default_data_collator,
            callbacks=[pruning()],
        )
        assert type(trainer.teacher).__name__ == type(trainer.model).__name__ == "OwnModel"
        trainer.train(resume)
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_code_of_its_own_reaches_the_teacher_on_the_command_line(own_code, capsys):
    words = shlex.split(
        "distill model --teacher model --data text.txt --target_layers 5 --max_steps 1 --sequence_length 8 "
        "--calibration_sequences 2 --heldout_sequences 2 --report_to none --use_cpu True --output_dir out"
    )
    assert main(words) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert main([*words, "--trust_remote_code", "True"]) == 0


def test_code_of_its_own_reaches_every_phase_of_a_command(own_code, capsys):
    words = shlex.split(
        "phases model --data text.txt --target_layers 5 --sequence_length 8 --calibration_sequences 2 "
        "--heldout_sequences 2 --output_dir out"
    )
    command = ["--", "cp", "-r", "{model}", "{output_dir}"]
    assert main([*words, *command]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert main([*words, "--trust_remote_code", "True", *command]) == 0


# Several processes


RANK = """
import logging
import sys

sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from tests.conftest import make_model
from tests.pruning.test_callback import plain_trainer
from tests.distillation.test_trainer import make_trainer
from hf_layerprune import LayerPruningCallback

torch.set_num_threads(1)
calls = []


def task(model):
    calls.append(1)
    if len(calls) > {stop}:
        raise KeyboardInterrupt
    total = model(torch.arange(12)[None]).logits.mean().detach()
    dist.all_reduce(total)  # as a task that shares out its questions
    return float(total)


worth = dict(criterion="task", task=task, target_layers=4)
callback = LayerPruningCallback(**worth)
trainer = make_trainer(make_model(), teacher_model=make_model(seed=1), output_dir="two", max_steps=2,
                       callbacks=[callback])
try:
    trainer.train()
except KeyboardInterrupt:
    pass
sys.stdout.write(f"calls {{len(calls)}}\\n")  # at once: both processes write
trainer.accelerator.end_training()
"""


def launch(text, **values):
    Path("rank.py").write_text(textwrap.dedent(text).format(root=str(ROOT), **values))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "rank.py"]
    return subprocess.run(words, capture_output=True, text=True, timeout=600)


def test_scoring_that_goes_on_in_two_processes_leaves_out_the_same_work():
    """A task that all compute together would wait for the process that has the journal."""
    assert launch(RANK, stop=3).stdout.count("calls 4") == 2
    assert len(Path("two/scoring.jsonl").read_text().splitlines()) == 4
    done = launch(RANK, stop=99)
    assert done.returncode == 0, done.stderr[-3000:]
    # Of a first round of 5 results 3 are there; in the second all 4 are new.
    assert done.stdout.count("calls 6") == 2
    assert not Path("two/scoring.jsonl").exists()


WARNING = """
import sys

sys.path.insert(0, {root!r})
from tests.conftest import make_model
from tests.pruning.test_callback import pruning
from tests.distillation.test_trainer import examples, make_trainer

worth = {{6: 10.0, 5: 9.0, 4: 1.0}}
callback = pruning(criterion="task", task=lambda model: worth[model.config.num_hidden_layers])
trainer = make_trainer(make_model(), teacher_model=make_model(seed=1), max_steps=4, callbacks=[callback])
trainer.train()
trainer.accelerator.end_training()
"""


def test_warnings_are_of_the_main_process_alone():
    done = launch(WARNING)
    assert done.returncode == 0, done.stderr[-3000:]
    for text in ("recovered 0 % of what its removal cost", "cost 8.000, and", "cannot be compared"):
        assert done.stderr.count(text) == 1, text


NOT_JOINED = """
import sys

sys.path.insert(0, {root!r})
from tests.distillation.test_trainer import examples, make_model
from hf_layerprune import DistillationTrainer, DistillationTrainingArguments

args = DistillationTrainingArguments(output_dir="two", max_steps=2, report_to="none")
DistillationTrainer(make_model(), args, train_dataset=examples()).train()
"""


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there the processes are joined")
def test_processes_on_a_machine_without_gpus_are_told_to_say_use_cpu():
    done = launch(NOT_JOINED)
    assert "The launcher started 2 processes, but each would train alone" in done.stderr
    assert "set use_cpu=True" in done.stderr
    assert not Path("two").exists()


@pytest.mark.parametrize("kind", ["plain", "distillation"])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_are_not_joined_are_refused(kind, name, monkeypatch, llama):
    trainer = plain_trainer(llama, pruning())
    args = make_trainer(llama).args
    monkeypatch.setenv(name, "2")
    with pytest.raises(
        LayerPruneError, match=r"started 2 processes, but each would train alone.*use_cpu=True"
    ):
        trainer.train() if kind == "plain" else DistillationTrainer(llama, args)
    monkeypatch.setenv(name, "1")
    DistillationTrainer(llama, args, train_dataset=examples())


# Layer numbers


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor, lambda number: np.array(number)])
def test_layers_are_named_by_whole_numbers_of_any_type(kind, llama):
    several = [kind(layer) for layer in (1, 3)]
    both = [several, np.array([1, 3]), torch.tensor([1, 3]), {1, 3}]
    for named, gone in [(kind(3), [3]), *((layers, [1, 3]) for layers in both)]:
        model = make_model()
        remove_layers(model, named)
        assert get_lineage(model).removed == gone
        model.save_pretrained("numbers")
        assert get_lineage(LlamaForCausalLM.from_pretrained("numbers")).removed == gone
    batches = [{"input_ids": tokens()}]
    table = score_layers(llama, batches, protected=[kind(0), kind(5)], block_size=kind(2), progress=False)
    assert sorted(table.scores) == [1, 2, 3]
    assert len(select_layers(llama, batches, kind(2), protected=several, progress=False).layers) == 2
    settings = {"target_layers": kind(4), "layers_per_phase": kind(1), "steps_per_phase": kind(1)}
    trainer = make_trainer(
        llama,
        teacher_model=make_model(),
        max_steps=2,
        hidden_weight=0.1,
        hidden_layers=[kind(5)],
        top_k=kind(9),
        save_strategy="steps",
        save_steps=2,
        callbacks=[pruning(protected=[kind(0), kind(5)], **settings)],
    )
    trainer.train()
    assert json.loads(Path("out/layer_pruning.json").read_text())["pruning"]["protected"] == [0, 5]
    record = prune_layers(make_model(), target_layers=kind(5), calibration=batches, protected=several)
    assert json.loads(json.dumps(record.to_dict()))["pruning"]["target_layers"] == 5
    cache_teacher_logits(make_model(), batches, "said", top_k=kind(5), hidden_layers=[kind(5)])


@pytest.mark.parametrize("named", [True, 3.0, "3", [np.float64(3)], [True], torch.tensor(3.0), None])
def test_what_is_no_whole_number_is_no_layer(named, llama):
    with pytest.raises(LayerPruneError, match="No layers"):
        remove_layers(llama, named)
    assert len(get_lineage(llama).kept) == LAYERS
