import copy
import gc
import json
import logging
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    LayerPruningCallback,
    get_lineage,
    remove_layers,
)
from hf_layerprune.surgery.decoder import find_decoder
from hf_layerprune.surgery.peft import base_of

from ..conftest import logits, make_model, tokens
from ..flash_attention import use_flash_attention


def examples(count=8, length=12):
    """Blocks of the same text length and, padded to more, of different ones."""
    ids = tokens(count, length).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def make_trainer(student, dataset=None, collator=default_data_collator, eval_dataset=None, **settings):
    settings = {
        "output_dir": "out",
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    } | settings
    teacher = settings.pop("teacher_model", None)
    others = {name: settings.pop(name, None) for name in ("callbacks", "peft_config", "processing_class")}
    return DistillationTrainer(
        student,
        DistillationTrainingArguments(**settings),
        teacher_model=teacher,
        train_dataset=examples() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        **others,
    )


def gradients(trainer):
    """The gradients of the first optimizer step, and its logged loss."""
    seen = {}

    def keep(optimizer, args, kwargs):
        parameters = trainer.model.named_parameters()
        seen.update({name: p.grad.clone() for name, p in parameters if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.args.max_grad_norm = 0
    trainer.train()
    return seen, trainer.state.log_history[0]


def students(family="llama"):
    teacher = make_model(family)
    student = copy.deepcopy(teacher)
    remove_layers(student, [1, 2])
    return student, teacher


def test_the_loss_and_its_gradient_are_the_definition():
    student, teacher = students()
    reference = copy.deepcopy(student).double()
    batch = tokens(8, 12)
    weights = {"kl_weight": 0.7, "hidden_weight": 0.3, "ce_weight": 0.2, "temperature": 2.0}
    found, logged = gradients(make_trainer(student, teacher_model=teacher, **weights))

    exact = copy.deepcopy(teacher).double()
    kept = {"output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        taught = exact(input_ids=batch, **kept)
    learnt = reference(input_ids=batch, **kept)
    p = (taught.logits[:, :-1] / 2).softmax(-1)
    q = (learnt.logits[:, :-1] / 2).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean() * 4
    ce = F.cross_entropy(learnt.logits[:, :-1].reshape(-1, 260), batch[:, 1:].reshape(-1))
    # Layers 1 and 2 are gone: layer 3 of the teacher is layer 1 of the student. Entry i + 1 is the
    # output of layer i, the last entry is after the final norm.
    middle = (learnt.hidden_states[2] - taught.hidden_states[4])[:, :-1].square().mean()
    last = (learnt.hidden_states[-1] - taught.hidden_states[-1])[:, :-1].square().mean()
    loss = 0.7 * kl + 0.3 * (middle + last) / 2 + 0.2 * ce
    loss.backward()

    assert logged["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert logged["ce"] == pytest.approx(ce.item(), rel=1e-4)
    assert logged["hidden_mse"] == pytest.approx((middle + last).item() / 2, rel=1e-4)
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-3, atol=1e-5)


ALL_TERMS = {"hidden_weight": 0.3, "ce_weight": 0.2}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_accumulation_changes_nothing(family):
    student, teacher = students(family)
    # Rows of different length, so that a mean of means would differ.
    ids = tokens(8, 12)
    labels = ids.clone()
    for row, cut in enumerate([0, 0, 3, 5, 9, 2, 7, 1]):
        labels[row, :cut] = -100
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    results = []
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(
            copy.deepcopy(student),
            dataset,
            teacher_model=copy.deepcopy(teacher),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **ALL_TERMS,
        )
        results.append(gradients(trainer))
    (whole, logged), *others = results
    assert sum(g.abs().sum() for g in whole.values()) > 0
    for found, log in others:
        for term in ("loss", "kl", "hidden_mse", "ce"):
            assert log[term] == pytest.approx(logged[term], rel=1e-4)
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labelled", [True, False])
def test_padding_is_never_trained_on(side, labelled):
    student, teacher = students()

    def pad(rows):
        ids = torch.stack([torch.tensor(row["input_ids"]) for row in rows])
        filler, zero = torch.full((len(rows), 4), 7), torch.zeros(len(rows), 4, dtype=torch.long)
        parts = [(filler, zero), (ids, torch.ones_like(ids))]
        ordered = parts if side == "left" else parts[::-1]
        batch = {"input_ids": torch.cat([part[0] for part in ordered], 1)}
        batch["attention_mask"] = torch.cat([part[1] for part in ordered], 1)
        if labelled:  # with labels that forgot the padding
            batch["labels"] = batch["input_ids"].clone()
        return batch

    results = []
    for collator in (default_data_collator, pad):
        trainer = make_trainer(
            copy.deepcopy(student),
            collator=collator,
            teacher_model=copy.deepcopy(teacher),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            **ALL_TERMS,
        )
        results.append(gradients(trainer))
    (plain, logged), (padded, log) = results
    for term in ("loss", "kl", "hidden_mse", "ce"):
        assert log[term] == pytest.approx(logged[term], rel=1e-3)
    for name, gradient in plain.items():
        torch.testing.assert_close(padded[name], gradient, rtol=2e-2, atol=1e-4)


def test_gradient_reaches_the_student_and_never_the_teacher(model):
    teacher = copy.deepcopy(model)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    remove_layers(model, 3)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(model, teacher_model=teacher, max_steps=2, hidden_weight=0.1)
    trainer.train()
    for name, value in model.named_parameters():
        assert not torch.equal(value, weights[name]), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not {id(p) for p in trainer.model.parameters()} & {id(p) for p in teacher.parameters()}


def test_the_teacher_is_a_frozen_copy_of_the_starting_model(llama):
    start = copy.deepcopy(llama)
    trainer = make_trainer(llama)
    assert trainer.evaluate(examples())["eval_kl"] == pytest.approx(0, abs=1e-6)
    remove_layers(llama, 2)
    assert trainer.evaluate(examples())["eval_kl"] > 0.01
    trainer.train()
    assert torch.equal(logits(trainer.teacher, tokens()), logits(start, tokens()))
    assert len(find_decoder(trainer.teacher).layers) == 6


def test_a_teacher_can_be_a_folder(llama, tmp_path):
    llama.save_pretrained(tmp_path / "teacher")
    before = logits(llama, tokens())
    remove_layers(llama, 2)
    trainer = make_trainer(llama, teacher_model=str(tmp_path / "teacher"))
    assert torch.equal(logits(trainer.teacher, tokens()), before)


def test_evaluation_reports_the_labels_loss_and_every_term(llama):
    trainer = make_trainer(llama, hidden_weight=1.0)
    remove_layers(llama, 2)
    found = trainer.evaluate(examples())
    mask = torch.ones(8, 11, dtype=torch.bool)
    scores = logits(llama, tokens(8, 12))[:, :-1][mask]
    expected = F.cross_entropy(scores, tokens(8, 12)[:, 1:][mask]).item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert found["eval_ce"] == pytest.approx(expected, rel=1e-4)
    assert found["eval_kl"] > 0
    assert found["eval_hidden_mse"] > 0


def test_each_evaluation_has_its_own_terms(llama):
    remove_layers(llama, 2)
    trainer = make_trainer(llama, teacher_model=make_model())
    alone = trainer.evaluate(examples(4))
    trainer.predict(examples(8))  # leaves nothing behind
    both = trainer.evaluate({"a": examples(4), "b": examples(8)})
    assert both["eval_a_kl"] == pytest.approx(alone["eval_kl"])
    assert both["eval_b_kl"] == pytest.approx(trainer.evaluate(examples(8))["eval_kl"])
    assert both["eval_a_kl"] != pytest.approx(both["eval_b_kl"])
    assert trainer.predict(examples(4)).metrics["test_kl"] == pytest.approx(alone["eval_kl"])


def test_an_evaluation_that_broke_off_leaves_nothing_behind(llama):
    class Broken(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(llama, teacher_model=make_model(seed=1))
    expected = trainer.evaluate(examples(4))["eval_kl"]
    trainer.add_callback(Broken)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(examples(8))
    trainer.remove_callback(Broken)
    assert trainer.evaluate(examples(4))["eval_kl"] == pytest.approx(expected)


def test_the_loss_of_the_student_falls():
    student, _ = students()
    trainer = make_trainer(student, teacher_model=students()[1], max_steps=30, learning_rate=3e-3)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.6 * losses[0]


def test_dropout_of_the_student_stays_on():
    student = make_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
    trainer = make_trainer(student)
    trainer.train()
    # The same weights: only dropout makes a difference to the teacher.
    assert trainer.state.log_history[0]["kl"] > 1e-3
    assert not any(module.training for module in trainer.teacher.modules())


def test_the_saved_config_is_plain(llama):
    trainer = make_trainer(llama)
    trainer.train()
    trainer.save_model()
    again = type(llama).from_pretrained("out")
    assert again.config.use_cache is True
    assert torch.equal(logits(again, tokens()), logits(llama, tokens()))


def test_paper_preset():
    # The paper's sum(KL) / 100 over 2 x 2048 positions, and the sum of two hidden-state errors.
    args = DistillationTrainingArguments(output_dir="out", loss_preset="paper", use_cpu=True)
    assert (args.kl_weight, args.hidden_weight, args.ce_weight) == (4096 / 100, 2.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"hidden_weight": float("nan")}, "hidden_weight is nan"),
        ({"kl_weight": 0.0}, "All loss weights are 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"loss_preset": "papr"}, "loss_preset is 'papr': choose from paper"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"balance_hidden": True}, "balance_hidden needs a hidden_weight"),
        ({"hidden_weight": 1.0, "kl_weight": 0.0, "balance_hidden": True}, "and kl_weight or ce_weight"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 260}, "below the 260 tokens"),
        (
            {"hidden_weight": 1.0, "hidden_layers": [2, 9]},
            r"layers \[9\], whose hidden states the teacher does not have",
        ),
    ],
)
def test_bad_settings_are_refused(llama, settings, message):
    with pytest.raises(LayerPruneError, match=message):
        make_trainer(llama, **settings)


def test_bad_teachers_are_refused(llama):
    def refused(teacher, message, **settings):
        with pytest.raises(LayerPruneError, match=message):
            make_trainer(llama, teacher_model=teacher, **settings)

    refused(make_model(vocab_size=300), "vocabulary has 300 tokens, the student's 260")
    refused(make_model(num_hidden_layers=4), "Set hidden_weight=0", hidden_weight=1.0)
    refused(llama, "share 57 weights")
    refused("no/such-model", "Cannot load a model from 'no/such-model'")
    wide = make_model(hidden_size=64)
    refused(wide, "Set hidden_weight=0", hidden_weight=1.0)
    make_trainer(llama, teacher_model=wide)
    remove_layers(llama, 2)
    short = make_model()
    remove_layers(short, [2, 3])
    refused(short, r"still has \[0, 1, 3, 4, 5\].* set hidden_weight=0", hidden_weight=1.0)


def test_what_has_no_meaning_here_is_refused(llama, monkeypatch):
    args = DistillationTrainingArguments(output_dir="out", use_cpu=True)
    with pytest.raises(LayerPruneError, match="no use for `compute_loss_func`"):
        DistillationTrainer(llama, args, compute_loss_func=len)
    with pytest.raises(LayerPruneError, match="torch_compile"):
        make_trainer(llama, torch_compile=True, activation_checkpointing=True)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainingArguments, "n_gpu", 2)
        with pytest.raises(LayerPruneError, match="2 GPUs in one process: start with `accelerate launch`"):
            make_trainer(llama)
    with pytest.raises(LayerPruneError, match="make it a DistillationTrainingArguments"):
        DistillationTrainer(llama, TrainingArguments(output_dir="out", use_cpu=True))


def test_resuming_without_a_checkpoint_is_refused(llama):
    with pytest.raises(LayerPruneError, match="No checkpoint to resume from"):
        make_trainer(llama).train(resume_from_checkpoint=True)


def test_arguments_come_in_the_order_of_the_trainer(llama):
    args = DistillationTrainingArguments(output_dir="out", use_cpu=True)
    trainer = DistillationTrainer(llama, args, default_data_collator, examples(3), examples(2))
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (3, 2)


def test_a_student_keeps_its_lineage(llama):
    remove_layers(llama, 4)
    trainer = make_trainer(llama)
    trainer.train()
    assert get_lineage(trainer.model).kept == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
def test_checkpoints_are_checked(llama, settings):
    trainer = make_trainer(llama, max_steps=2, save_strategy="steps", save_steps=1, **settings)
    trainer.train()
    assert Path("out/checkpoint-2/model.safetensors").exists()
    llama.model.layers[2].self_attn.scaling *= 2  # nothing in the config says so
    with pytest.raises(LayerPruneError, match=r"saved model differs.*safe in other"):
        trainer.save_model("other")
    trained = llama.model.layers[0].mlp.up_proj.weight
    assert torch.equal(load_file("other/model.safetensors")["model.layers.0.mlp.up_proj.weight"], trained)
    trainer.args.verify_save = False
    trainer.save_model("unchecked")


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules=["q_proj"])])
def test_float32_weights_under_flash_attention_are_checked_in_bfloat16(llama, peft_config, monkeypatch):
    trainer = make_trainer(
        use_flash_attention(llama, monkeypatch),
        peft_config=peft_config,
        bf16=True,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    llama.model.layers[2].self_attn.scaling *= 2  # nothing in the config says so
    with pytest.raises(LayerPruneError, match="saved model differs"):
        trainer.save_model("other")


def test_a_run_stops_when_a_checkpoint_is_not_the_model(llama):
    llama.model.layers[2].self_attn.scaling *= 2
    trainer = make_trainer(
        llama, max_steps=4, save_strategy="steps", save_steps=2, teacher_model=make_model()
    )
    with pytest.raises(LayerPruneError, match=r"safe in out/checkpoint-2"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_legacy_rotary_keys_are_written_when_asked(llama):
    trainer = make_trainer(llama, legacy_rope=True)
    trainer.save_model()
    assert "rope_theta" in json.loads(Path("out/config.json").read_text())


@pytest.mark.parametrize("kind", ["mse", "normalized_mse", "cosine"])
def test_errors_of_hidden_states_are_of_the_layers_after_each_cut(kind):
    student, teacher = students()
    trainer = make_trainer(
        student, teacher_model=teacher, hidden_weight=0.5, hidden_loss=kind, divergence="jsd"
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["jsd"] + 0.5 * log[f"hidden_{kind}"], rel=1e-4)
    student, teacher = students()
    batch, kept = tokens(8, 12), {"output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        learnt, taught = (m(input_ids=batch, **kept).hidden_states for m in (student, teacher))
    pairs = [(learnt[2][:, :-1], taught[4][:, :-1]), (learnt[-1][:, :-1], taught[-1][:, :-1])]
    errors = {
        "mse": lambda s, t: (s - t).square().mean(),
        "normalized_mse": lambda s, t: ((s - t).square().mean(-1) / t.square().mean(-1)).mean(),
        "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1).mean(),
    }
    expected = sum(errors[kind](s, t).item() for s, t in pairs) / 2
    assert log[f"hidden_{kind}"] == pytest.approx(expected, rel=1e-4)


def test_metrics_see_whole_logits_and_a_plain_evaluation_makes_none(llama):
    shapes = []

    def metric(prediction):
        shapes.append(prediction.predictions.shape)
        return {"mean": float(prediction.predictions.mean())}

    teacher = copy.deepcopy(llama)
    remove_layers(llama, 2)
    trainer = make_trainer(llama, teacher_model=teacher, eval_dataset=examples(4))
    trainer.compute_metrics = metric
    found = trainer.evaluate()
    assert shapes == [(4, 12, 260)]
    assert found["eval_mean"] == pytest.approx(logits(llama, tokens(4, 12)).mean().item(), rel=1e-4)
    trainer.compute_metrics = None
    whole = []
    llama.lm_head.register_forward_hook(lambda module, args, output: whole.append(output.shape[-2]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found["eval_loss"])
    assert 4 * 12 not in whole


@pytest.mark.parametrize("what", ["all", "around_cuts"])
def test_activation_checkpointing_changes_nothing(what):
    results = []
    for checkpointing in (False, True):
        student, teacher = students()
        settings = {"activation_checkpointing": True} if checkpointing else {}
        trainer = make_trainer(student, teacher_model=teacher, trainable=what, hidden_weight=0.1, **settings)
        results.append(gradients(trainer)[0])
    assert results[0].keys() == results[1].keys()
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The speedups for torchdynamo", "ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("settings", [{}, {"trainable": "around_cuts"}, {"peft_config": True}])
def test_compiled_layers_change_nothing(settings):
    gone, seen = [], []

    class Cut(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            if state.global_step == 2:
                gone.append(weakref.ref(find_decoder(base_of(model)).layers[2]))
                remove_layers(model, [2])

    losses, graphs = [], []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.manual_seed(0)  # adapters begin at random
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        given = dict(settings)
        if given.pop("peft_config", False):
            teacher, student = None, make_model("gemma2")
            given["peft_config"] = LoraConfig(target_modules="all-linear", r=4)
        else:
            student, teacher = students("gemma2")
        trainer = make_trainer(
            student,
            teacher_model=teacher,
            max_steps=4,
            callbacks=[Cut()],
            **ALL_TERMS | compiled | given,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history[:4]])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for model in (student, trainer.teacher):
            assert not any("forward" in vars(layer) for layer in find_decoder(model).layers)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert graphs[0] == 0
    assert seen[4] == 0 < seen[5] == seen[6] < seen[7]  # compiled in the first step, and anew after the cut
    gc.collect()
    assert gone[1]() is None


def test_packed_sequences_are_trained_as_apart():
    """Two texts in one row, with positions that begin anew, against one row each."""
    ids = tokens(2, 12)
    student, teacher = students()
    apart = make_trainer(copy.deepcopy(student), teacher_model=copy.deepcopy(teacher), **ALL_TERMS)
    expected = apart.compute_loss(apart.model.train(), {"input_ids": ids, "labels": ids.clone()})
    labels = ids.clone()
    labels[:, 0] = -100  # nothing predicts the beginning of a text
    batch = {
        "input_ids": ids.reshape(1, -1),
        "labels": labels.reshape(1, -1),
        "position_ids": torch.arange(12).repeat(2)[None],
    }
    packed = make_trainer(student, teacher_model=teacher, **ALL_TERMS)
    found = packed.compute_loss(packed.model.train(), batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_step(llama):
    teacher = copy.deepcopy(llama)
    remove_layers(llama, 2)
    before = copy.deepcopy(llama.state_dict())
    trainer = make_trainer(llama, teacher_model=teacher, max_steps=3, save_strategy="steps", save_steps=1)

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.teacher.lm_head.weight.data[5] = float("nan")
                before.update(copy.deepcopy(llama.state_dict()))

    trainer.add_callback(Spoil())
    with pytest.raises(
        LayerPruneError, match=r"loss of step 2 is nan, on a batch of \(8, 12\) .*checkpoint-1"
    ):
        trainer.train()
    torch.testing.assert_close(llama.state_dict(), before, rtol=0, atol=0)
    assert load_file("out/checkpoint-1/model.safetensors")


def test_vocabularies_that_are_only_filled_up(tokenizer):
    """As of Qwen2.5, whose sizes pad the same tokens to different lengths."""
    teacher = make_model()
    student = copy.deepcopy(teacher)
    remove_layers(student, 2)
    plain = make_trainer(copy.deepcopy(student), teacher_model=copy.deepcopy(teacher))
    plain.train()
    for padded in (0, 1):
        models = [copy.deepcopy(student), copy.deepcopy(teacher)]
        models[padded].resize_token_embeddings(272)
        torch.nn.init.normal_(models[padded].lm_head.weight.data[260:], std=3.0)
        with pytest.raises(LayerPruneError, match="give the tokenizer as processing_class"):
            make_trainer(copy.deepcopy(models[0]), teacher_model=models[1])
        trainer = make_trainer(models[0], teacher_model=models[1], processing_class=tokenizer)
        trainer.train()
        expected = plain.state.log_history[0]["kl"]
        assert trainer.state.log_history[0]["kl"] == pytest.approx(expected, rel=1e-4)
    small = make_model(vocab_size=250, pad_token_id=None, bos_token_id=0, eos_token_id=0)
    with pytest.raises(LayerPruneError, match="the tokenizer knows 258: logits can only be compared"):
        make_trainer(small, teacher_model=make_model(), processing_class=tokenizer)


BALANCED = {"hidden_weight": 0.5, "balance_hidden": True, "ce_weight": 0.2}


def test_hidden_states_count_in_proportion_to_the_other_terms():
    student, teacher = students()
    trainer = make_trainer(
        student, teacher_model=teacher, max_steps=3, learning_rate=0.1, optim="sgd", **BALANCED
    )
    trainer.train()
    logs = trainer.state.log_history[:3]
    terms = [(log["kl"] + 0.2 * log["ce"], log["hidden_mse"]) for log in logs]
    expected, logits_sum, hidden_sum = [], 0.0, 0.0
    for other, error in terms:
        weight = 0.5 * logits_sum / hidden_sum if hidden_sum else 0.0
        expected.append(other + weight * error)
        logits_sum, hidden_sum = logits_sum + other, hidden_sum + error
    assert [log["loss"] for log in logs] == pytest.approx(expected, rel=1e-4)
    assert expected[1] > 1.3 * terms[1][0]


def test_the_balance_is_the_same_with_accumulation_and_after_resuming():
    losses, ends = [], []
    for size, steps in ((8, 1), (2, 4), (2, 4)):
        student, teacher = students()
        trainer = make_trainer(
            student,
            teacher_model=teacher,
            max_steps=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            save_strategy="steps",
            save_steps=2,
            **BALANCED,
        )
        trainer.train(resume_from_checkpoint="out/checkpoint-2" if len(losses) == 2 else None)
        losses.append([log["loss"] for log in trainer.state.log_history[:4]])
        ends.append(student.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[2].items())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == losses[1]


def test_the_balance_begins_anew_after_a_cut():
    class Cut(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                remove_layers(model, [2])

    student, teacher = students()
    settings = {"optim": "sgd", "max_steps": 4, "callbacks": [Cut()], "kl_weight": 1.0}
    trainer = make_trainer(student, teacher_model=teacher, hidden_weight=0.5, balance_hidden=True, **settings)
    trainer.train()
    logs = trainer.state.log_history[:4]
    alone = [log["loss"] == pytest.approx(log["kl"], rel=1e-5) for log in logs]
    assert alone == [True, False, True, False]


def test_a_stream_is_read_as_a_data_set(tokenizer):
    losses = []
    for data in (examples(), examples().to_iterable_dataset()):
        student, teacher = students()
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = make_trainer(student, data, collator, teacher_model=teacher, **ALL_TERMS, **settings)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history[:4]])
    assert losses[1] == losses[0]


def test_training_in_bfloat16_is_near_training_in_float32():
    results = []
    for precision in ({}, {"bf16": True}):
        student, teacher = students()
        results.append(gradients(make_trainer(student, teacher_model=teacher, **ALL_TERMS, **precision)))
    (plain, logged), (found, cast) = results
    assert cast["loss"] != logged["loss"]
    assert cast["loss"] == pytest.approx(logged["loss"], rel=0.02)
    for name, gradient in plain.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_what_was_chosen_is_told(caplog):
    student, teacher = students()
    remove_layers(student, [2])
    size = sum(parameter.nbytes for parameter in teacher.parameters()) / 2**20
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        make_trainer(student, teacher_model=teacher, trainable="1").train()
        make_trainer(teacher, peft_config=LoraConfig(target_modules=["q_proj"]))
    layer = sum(parameter.numel() for parameter in student.model.layers[0].parameters())
    whole = student.num_parameters()
    trained = layer + student.lm_head.weight.numel()
    told = caplog.text
    assert f"Teacher: a second model, {size:.1f} MB." in told
    assert f"Training {trained} of {whole} parameters" in told
    assert "The first 1 of 3 layers run once for teacher and student" in told
    assert f"Teacher: the student's own weights, {size:.1f} MB that are not held twice." in told


def test_what_has_no_labels_is_evaluated_on_its_own_tokens(llama):
    remove_layers(llama, 2)
    trainer = make_trainer(llama, teacher_model=make_model())
    expected = trainer.evaluate(examples())
    trainer.data_collator = lambda rows: {"input_ids": default_data_collator(rows)["input_ids"]}
    found = trainer.evaluate(examples())
    for name in ("eval_loss", "eval_kl"):
        assert found[name] == pytest.approx(expected[name])


def test_the_models_are_not_told_to_skip_their_logits(llama):
    """As Trainer does in evaluation with Liger's kernels, whose forward then wants labels."""
    trainer = make_trainer(llama)
    seen = []
    llama.model.register_forward_pre_hook(lambda m, args, given: seen.append(set(given)), with_kwargs=True)
    llama.eval()
    batch = {"input_ids": tokens(2, 12), "labels": tokens(2, 12)}
    loss = trainer.compute_loss(llama, batch | {"skip_logits": True})
    assert loss == trainer.compute_loss(llama, batch)
    assert not any("skip_logits" in given for given in seen)


def test_weights_of_layers_that_went_are_free(llama):
    gone = []

    class Cut(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step in (1, 2):
                gone.append(weakref.ref(model.model.layers[2].mlp.up_proj.weight))
                drop = list(model.model.layers[2].parameters())
                remove_layers(model, [2])
                for parameter in drop:
                    kwargs["optimizer"].state.pop(parameter, None)
                for group in kwargs["optimizer"].param_groups:
                    group["params"] = [p for p in group["params"] if not any(p is one for one in drop)]

    trainer = make_trainer(llama, teacher_model=make_model(), max_steps=4, callbacks=[Cut()])
    trainer.train()
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_arguments_may_be_given_in_trainers_order(llama, tokenizer):
    args = DistillationTrainingArguments(output_dir="out", report_to="none", use_cpu=True)
    trainer = DistillationTrainer(llama, args, default_data_collator, examples(), None, tokenizer)
    assert trainer.processing_class is tokenizer
    with pytest.raises(LayerPruneError, match="no use for `compute_loss_func`"):
        DistillationTrainer(llama, args, None, examples(), None, None, None, lambda *args: 0.0)
    with pytest.raises(LayerPruneError, match="hidden_layers names none"):
        DistillationTrainingArguments(output_dir="out", hidden_weight=1.0, hidden_layers=[])


def test_a_teacher_is_a_path_too(llama):
    llama.save_pretrained("teacher")
    trainer = make_trainer(llama, teacher_model=Path("teacher"))
    assert torch.equal(logits(trainer.teacher, tokens()), logits(llama, tokens()))


def test_of_several_processes_only_one_writes_adapters(llama, monkeypatch):
    trainer = make_trainer(llama, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda self: False))
    for folder in ("checkpoint-1", "out"):
        trainer._save(folder)
        assert not list(Path(folder).glob("*"))


@pytest.fixture
def without_pad(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.pad_token = None
    return plain


@pytest.mark.parametrize("lengths", [[12, 12, 12, 12], [12, 5, 9, 7]])
def test_a_tokenizer_without_a_padding_token_trains(llama, without_pad, lengths):
    rows = [row[:length].tolist() for row, length in zip(tokens(4, 12), lengths, strict=True)]
    data = Dataset.from_dict({"input_ids": rows})
    args = {"output_dir": "out", "max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    pruning = LayerPruningCallback(target_layers=5, calibration=data)
    trainer = DistillationTrainer(
        llama,
        DistillationTrainingArguments(**args, disable_tqdm=True),
        train_dataset=data,
        eval_dataset=data,
        processing_class=without_pad,
        callbacks=[pruning],
    )
    trainer.train()
    measured = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        alone = [llama(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in rows]
    counts = [len(row) - 1 for row in rows]
    total = sum(loss * count for loss, count in zip(alone, counts, strict=True))
    assert measured == pytest.approx(total / sum(counts), rel=1e-4)
    assert without_pad.pad_token is None  # it is saved as it came


def test_a_tokenizer_without_any_special_token_trains_rows_of_one_length(llama, without_pad):
    without_pad.eos_token = None
    args = DistillationTrainingArguments(
        "out", max_steps=1, report_to="none", use_cpu=True, save_strategy="no"
    )
    data = Dataset.from_dict({"input_ids": tokens(4, 12).tolist()})
    trainer = DistillationTrainer(llama, args, train_dataset=data, processing_class=without_pad)
    trainer.train()
    assert trainer.state.global_step == 1
