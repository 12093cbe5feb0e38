import json

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, default_data_collator

from hf_layerprune import LayerPruneError, cache_teacher_logits, remove_layers
from hf_layerprune.distillation import teacher_cache as module
from hf_layerprune.distillation.losses import TopKLogProbs, divergence, top_k_log_probs
from hf_layerprune.distillation.teacher_cache import CachedTeacherLogits, row_keys
from hf_layerprune.forward.hooks import LAST

from ..conftest import logits, make_model, tokens
from .test_trainer import examples, gradients, make_trainer, students


ROWS = [12, 7, 12, 3, 9, 12, 2, 5]


def ragged():
    """Rows of different length, of which the first token has no label."""
    rows = [row[:length].tolist() for row, length in zip(tokens(8, 12), ROWS, strict=True)]
    return Dataset.from_dict(
        {
            "input_ids": rows,
            "attention_mask": [[1] * len(row) for row in rows],
            "labels": [[-100, *row[1:]] for row in rows],
        }
    )


def padding(tokenizer, side="right"):
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer)


def loader(dataset=None, collator=default_data_collator, batch_size=4):
    return DataLoader(examples() if dataset is None else dataset, batch_size, collate_fn=collator)


SETTINGS = {"hidden_weight": 0.3, "ce_weight": 0.2, "temperature": 2.0, "hidden_layers": [3, 5]}


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd"])
def test_a_run_with_written_outputs_is_the_run_with_the_teacher(kind, tokenizer):
    results = []
    for written in (False, True):
        student, teacher = students("qwen3")
        if written:  # in another order and other batches than they are read in
            backwards = ragged().select(range(7, -1, -1))
            batches = loader(backwards, padding(tokenizer), 3)
            cache_teacher_logits(teacher, batches, "said", top_k=20, temperature=2.0, hidden_layers=[5, 3])
            assert isinstance(CachedTeacherLogits("said").read(next(iter(batches)), [LAST])[0], TopKLogProbs)
        trainer = make_trainer(
            student,
            ragged(),
            padding(tokenizer),
            teacher_model="said" if written else teacher,
            processing_class=tokenizer,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            divergence=kind,
            top_k=None if written else 20,
            **SETTINGS,
        )
        results.append(gradients(trainer))
    (plain, logged), (found, read) = results
    assert sum(gradient.norm() for gradient in plain.values()) > 0
    for term in ("loss", kind, "ce", "hidden_mse"):
        assert read[term] == pytest.approx(logged[term], rel=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_epochs_and_evaluation_are_read(tokenizer):
    student, teacher = students()
    cache_teacher_logits(teacher, loader(), "said", top_k=9)
    losses = []
    for teaches in (teacher, "said"):
        student, _ = students()
        settings = {"max_steps": 12, "per_device_train_batch_size": 2, "top_k": 9}
        trainer = make_trainer(student, teacher_model=teaches, eval_dataset=examples(), **settings)
        trainer.train()
        metrics = trainer.evaluate()
        losses.append(
            [log["loss"] for log in trainer.state.log_history if "loss" in log] + [metrics["eval_kl"]]
        )
    assert len(losses[0]) == 13
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_is_written_is_what_the_teacher_said(model):
    rows = tokens(3, 9)
    cache_teacher_logits(model, [{"input_ids": rows}], "said", top_k=5, hidden_layers=[2, 5])
    found, states = CachedTeacherLogits("said").read({"input_ids": rows}, [2, LAST])
    expected = top_k_log_probs(logits(model, rows), 5)
    seen = model(input_ids=rows, output_hidden_states=True, use_cache=False).hidden_states
    assert torch.equal(found.ids[:, :-1], expected.ids[:, :-1])
    torch.testing.assert_close(found.log_probs[:, :-1], expected.log_probs[:, :-1])
    torch.testing.assert_close(states[2][0][:, :-1], seen[3][:, :-1])
    torch.testing.assert_close(states[LAST][0][:, :-1], seen[-1][:, :-1])
    assert not states[LAST][0][:, -1].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_any_side_is_the_same_row(side, tokenizer):
    teacher = make_model("qwen3")
    cache_teacher_logits(teacher, loader(ragged(), padding(tokenizer), 1), "said", top_k=5)
    batch = next(iter(loader(ragged(), padding(tokenizer, side), 8)))
    found, _ = CachedTeacherLogits("said").read(batch, [])
    labels = batch.pop("labels")
    expected = top_k_log_probs(logits(teacher, **batch), 5).log_probs
    follows = (labels != -100)[:, 1:] & (batch["attention_mask"][:, :-1] == 1)
    assert follows.sum() == sum(ROWS) - 8
    torch.testing.assert_close(
        found.log_probs[:, :-1][follows], expected[:, :-1][follows], rtol=1e-4, atol=1e-4
    )


def test_the_divergence_of_the_likeliest_is_of_these_and_the_rest():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(6, 30, generator=generator).double() * 3 for _ in range(2))
    found = top_k_log_probs(theirs, 4, temperature=2.0)
    p, q = ((one / 2).softmax(-1) for one in (theirs, ours))
    order = p.argsort(-1, descending=True)
    assert torch.equal(found.ids, order[:, :4])
    p, q = (one.gather(-1, order) for one in (p, q))
    p, q = (torch.cat([one[:, :4], one[:, 4:].sum(-1, keepdim=True)], -1) for one in (p, q))
    m = 0.3 * p + 0.7 * q
    kl = {"kl": (p, q), "reverse_kl": (q, p)}
    for kind, (a, b) in kl.items():
        total = 4 * (a * (a / b).log()).sum()
        assert divergence(ours, found, kind, 2.0).item() == pytest.approx(total.item(), rel=1e-5)
        assert divergence(ours, found, kind, 2.0) <= divergence(ours, theirs, kind, 2.0)
    jsd = 4 * (0.3 * (p * (p / m).log()).sum() + 0.7 * (q * (q / m).log()).sum())
    assert divergence(ours, found, "jsd", 2.0, 0.3).item() == pytest.approx(jsd.item(), rel=1e-5)


def test_the_gradient_of_the_likeliest_is_exact_where_the_rest_is_almost_nothing():
    ours = (torch.randn(5, 30, generator=torch.Generator().manual_seed(1)) * 30).requires_grad_()
    theirs = top_k_log_probs(ours.detach() + 1e-2 * torch.randn(5, 30), 4)
    divergence(ours, theirs).backward()
    exact = ours.detach().double().requires_grad_()
    p = exact.softmax(-1).gather(-1, theirs.ids)
    expected = theirs.log_probs.double().exp()
    rest = exact.softmax(-1).scatter(-1, theirs.ids, 0).sum(-1, keepdim=True)
    q = torch.cat([p, rest], -1)
    (expected * (expected.log() - q.log())).sum().backward()
    assert torch.isfinite(ours.grad).all()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-3, atol=1e-5)


def test_writing_goes_on_where_it_stopped(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 20)
    teacher, reads = make_model(), []
    batches = list(loader(batch_size=2))

    def stop(*args):
        if len(reads) == 3:
            raise KeyboardInterrupt
        reads.append(1)
        return read(*args)

    read = module._compute_rows
    monkeypatch.setattr(module, "_compute_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher_logits(teacher, batches, "said", top_k=5)
    monkeypatch.setattr(module, "_compute_rows", lambda *args: reads.append(1) or read(*args))
    cache_teacher_logits(teacher, batches, "said", top_k=5)
    assert len(reads) == 4
    whole = CachedTeacherLogits("said")
    assert sum(len(file.get_tensor("keys")) for file in whole._files) == 8
    cache_teacher_logits(teacher, batches, "other", top_k=5)
    for batch in batches:
        one, other = (outputs.read(batch, [])[0] for outputs in (whole, CachedTeacherLogits("other")))
        assert torch.equal(one.log_probs, other.log_probs)
    cache_teacher_logits(teacher, batches, "said", top_k=5)
    assert len(reads) == 8  # of the other folder


def test_a_row_is_known_by_all_that_is_read():
    ids = tokens(1, 6)
    plain = row_keys({"input_ids": ids})
    padded = torch.cat([torch.full((1, 3), 257), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    assert row_keys({"input_ids": padded, "attention_mask": mask, "labels": padded}) == plain
    assert row_keys({"input_ids": padded}) != plain
    assert row_keys({"input_ids": ids, "position_ids": torch.arange(6)[None]}) != plain


def test_outputs_of_other_data_are_refused_before_training():
    student, teacher = students()
    cache_teacher_logits(teacher, loader(examples(4)), "said")
    settings = {
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "max_steps": 8,
    }
    trainer = make_trainer(student, teacher_model="said", **settings)
    with pytest.raises(LayerPruneError, match=r"of 4 rows, but not of the one that begins with tokens \["):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer = make_trainer(student, examples(4).to_iterable_dataset(), teacher_model="said")
    trainer.train()
    trainer = make_trainer(student, examples(8).to_iterable_dataset(), teacher_model="said")
    with pytest.raises(LayerPruneError, match="of 4 rows, but not"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 2.0}, "temperature is 2.0, but said was written with 1.0"),
        ({"top_k": 7}, "top_k is 7, but said was written with 5"),
        ({"hidden_weight": 1.0}, "holds no hidden states"),
        ({"hidden_layers": [3]}, r"layers \[3\], whose hidden states .* Available layers: \[\]"),
    ],
)
def test_outputs_of_other_settings_are_refused(settings, message):
    student, teacher = students()
    cache_teacher_logits(teacher, loader(), "said", top_k=5)
    with pytest.raises(LayerPruneError, match=message):
        make_trainer(student, teacher_model="said", **settings)


def test_outputs_of_a_teacher_that_cannot_teach_are_refused(tokenizer):
    cut, other = make_model(), make_model(vocab_size=300)
    remove_layers(cut, [1, 2])
    cache_teacher_logits(cut, loader(), "cut", top_k=5)
    with pytest.raises(LayerPruneError, match="Give the original model as teacher"):
        make_trainer(make_model(), teacher_model="cut", hidden_weight=1.0)
    cache_teacher_logits(other, loader(), "other", top_k=5)
    with pytest.raises(LayerPruneError, match="The teacher's vocabulary has 300 tokens"):
        make_trainer(make_model(), teacher_model="other")
    with pytest.raises(
        LayerPruneError, match="other is of 300 tokens, the student knows 260: give the teacher"
    ):
        make_trainer(make_model(), teacher_model="other", processing_class=tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "above 0 and below 260"),
        ({"top_k": 260}, "above 0 and below 260"),
        ({"temperature": 0.0}, "above 0"),
        ({"hidden_layers": [6]}, r"no layers \[6\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, llama):
    with pytest.raises(LayerPruneError, match=message):
        cache_teacher_logits(llama, loader(), "said", **settings)


def test_a_folder_of_something_else_stays_as_it_is(llama, tmp_path):
    llama.save_pretrained("model")
    with pytest.raises(LayerPruneError, match="model holds no cached teacher logits"):
        cache_teacher_logits(llama, loader(), "model")
    cache_teacher_logits(llama, loader(), "said", top_k=5)
    with pytest.raises(LayerPruneError, match="logits with another temperature, top_k"):
        cache_teacher_logits(llama, loader(), "said", top_k=6, temperature=2.0)
    with pytest.raises(LayerPruneError, match="logits with another weights"):
        cache_teacher_logits(make_model(seed=1), loader(), "said", top_k=5)
    head = json.loads((tmp_path / "said" / module.HEAD).read_text())
    (tmp_path / "said" / module.HEAD).write_text(json.dumps(head | {"kept_layers": [3, 1]}))
    with pytest.raises(LayerPruneError, match="Not a lineage"):
        CachedTeacherLogits("said")
    (tmp_path / "said" / module.HEAD).write_text(json.dumps(head))
    shard = tmp_path / "said" / "outputs-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(LayerPruneError, match="said are damaged"):
        CachedTeacherLogits("said")


def test_writing_leaves_the_teacher_as_it_was(llama):
    llama.train()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    cache_teacher_logits(llama, loader(), "said", top_k=5)
    assert llama.training
    assert all(parameter.requires_grad for parameter in llama.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert not any(module._forward_hooks for module in llama.modules())
