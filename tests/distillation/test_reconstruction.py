import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

from hf_layerprune import LayerPruneError, Lineage, get_lineage, reconstruct_layers, remove_layers
from hf_layerprune.distillation import reconstruction as module
from hf_layerprune.distillation import window_states, window_training
from hf_layerprune.distillation.reconstruction import mean_kl
from hf_layerprune.distillation.windows import Window, find_windows
from hf_layerprune.surgery.decoder import find_decoder

from ..conftest import make_model, tokens
from ..tiny_models import tiny_model


def cut(family="llama", layers=(2, 3), **changes):
    """A model that lost layers, and what it was."""
    teacher = make_model(family, **changes)
    model = copy.deepcopy(teacher)
    remove_layers(model, list(layers))
    return model, teacher


def batches(count=4, rows=2, length=12):
    return [{"input_ids": tokens(rows, length, seed)} for seed in range(count)]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# Of the last batch the second of two processes has no row.
DATA = [*batches(rows=3), *batches(1, rows=1)]
SETTINGS = {"epochs": 2, "learning_rate": 1e-3, "progress": False}


def windows(kept, before=1, after=1, original=10, teacher=None):
    student = Lineage(original, list(kept))
    found = find_windows(student, Lineage(original, list(teacher or range(original))), before, after)
    return [(one.first, one.last, one.teacher_first, one.teacher_last) for one in found]


def test_windows_lie_around_each_cut():
    assert windows([0, 1, 2, 5, 6, 7, 8, 9]) == [(2, 3, 2, 5)]
    assert windows([0, 1, 2, 5, 6, 7, 8, 9], 2, 3) == [(1, 5, 1, 7)]
    assert windows([0, 1, 4, 5, 6, 9]) == [(1, 2, 1, 4), (4, 5, 6, 9)]


def test_windows_that_overlap_are_one_and_those_that_touch_are_two():
    assert windows([0, 2, 4, 5, 6, 7, 8, 9]) == [(0, 2, 0, 4)]
    assert windows([0, 2, 3, 5, 6, 7, 8, 9]) == [(0, 1, 0, 2), (2, 3, 3, 5)]


def test_windows_at_the_ends_have_one_side():
    assert windows([2, 3, 4, 5, 6, 7, 8, 9]) == [(0, 0, 2, 2)]
    assert windows([0, 1, 2, 3, 4, 5, 6, 7]) == [(7, 7, 7, 7)]
    assert windows([2, 3, 4, 5, 6, 7, 8, 9], 0, 2) == [(0, 1, 2, 3)]


def test_a_cut_that_the_teacher_has_too_is_none():
    assert windows([0, 1, 2, 5, 8, 9], teacher=[0, 1, 2, 5, 6, 7, 8, 9]) == [(3, 4, 3, 6)]


def test_windows_of_some_cuts():
    student, teacher = Lineage(10, [0, 1, 4, 5, 6, 9]), Lineage(10, list(range(10)))
    assert find_windows(student, teacher, 1, 1, removed=[3]) == [Window(1, 2, 1, 4)]
    assert find_windows(student, teacher, 1, 1, removed=[7]) == [Window(4, 5, 6, 9)]
    assert len(find_windows(student, teacher, 1, 1, removed=[2, 8])) == 2
    with pytest.raises(LayerPruneError, match="No layer was removed"):
        find_windows(student, teacher, 1, 1, removed=[])


@pytest.mark.parametrize(
    ("kept", "before", "after", "teacher", "message"),
    [
        (range(10), 1, 1, None, "No layer was removed"),
        ([0, 1, 9], 0, 0, None, "at least 1|at least one layer"),
        ([0, 1, 9], -1, 1, None, "layers_before is -1"),
        ([0, 1, 9], 1, 1, [0, 1, 2], "all layers of the student"),
    ],
)
def test_impossible_windows_are_refused(kept, before, after, teacher, message):
    with pytest.raises(LayerPruneError, match=message):
        windows(kept, before, after, teacher=teacher)


def plain_loop(model, teacher, data, steps):
    """The same training, written down without hooks: for one Llama whose layers 2 and 3 are gone."""
    inner, original = model.model, teacher.model
    trained = [p for layer in inner.layers[1:3] for p in layer.parameters()]
    squares = torch.cat([p.detach().flatten() ** 2 for p in trained if p.ndim == 2])
    optimizer = torch.optim.AdamW(trained, float(f"{0.003 * squares.mean() ** 0.5:.2g}"), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    for epoch in range(steps // len(data)):
        for number in torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).tolist():
            ids = data[number]["input_ids"]
            with torch.no_grad():
                states = original(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            given, wanted = states[1], states[5]  # before layer 1, after layer 4
            places = torch.arange(ids.shape[1])[None]
            rotary = original.rotary_emb(given, places)
            length = ids.shape[1]
            mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
            for layer in inner.layers[1:3]:
                given = layer(given, position_embeddings=rotary, attention_mask=mask)
            error = (given - wanted).square().mean(-1) / wanted.square().mean(-1)
            error.mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, window_training.MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def test_training_is_that_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(window_training, "MAX_GRAD_NORM", 0.05)  # so low that it is felt
    model, teacher = cut()
    expected = copy.deepcopy(model)
    plain_loop(expected, teacher, batches(), 8)
    result = reconstruct_layers(model, teacher, batches(), epochs=2, progress=False)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert result.steps == 8
    assert result.tokens == 4 * 2 * 12


def test_only_the_layers_around_the_cut_change_and_the_error_falls(model):
    teacher = copy.deepcopy(model)
    remove_layers(model, [2, 3])
    before, modes = weights(model), [one.training for one in model.modules()]
    state = torch.random.get_rng_state()
    result = reconstruct_layers(model, teacher, batches(), **SETTINGS | {"epochs": 8})
    inside = {id(p) for layer in find_decoder(model).layers[1:3] for p in layer.parameters()}
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(value, before[name]) == (id(value) not in inside), name
    assert result.windows[0].layers == [1, 4]
    assert result.windows[0].error_after < result.windows[0].error_before
    assert result.kl_before == pytest.approx(mean_kl_of(before, model, teacher), rel=1e-4)
    assert [one.training for one in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def mean_kl_of(state, model, teacher):
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return mean_kl(other, teacher, batches())


def test_the_divergence_is_that_of_the_logits():
    model, teacher = cut()
    expected = []
    for batch in batches():
        with torch.no_grad():
            own, theirs = (one(**batch).logits[:, :-1].log_softmax(-1) for one in (model, teacher))
        expected.append((theirs.exp() * (theirs - own)).sum(-1))
    assert mean_kl(model, teacher, batches()) == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)


def test_padding_changes_nothing():
    found = []
    for padding in (0, 5):
        model, teacher = cut()
        data = [
            {
                "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, padding), value=257),
                "attention_mask": torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, padding)),
            }
            for batch in batches()
        ]
        reconstruct_layers(model, teacher, data, **SETTINGS)
        found.append(weights(model))
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_several_cuts_are_trained_one_after_another():
    model, teacher = cut(layers=(1, 4))
    result = reconstruct_layers(model, teacher, batches(), **SETTINGS)
    assert [one.layers for one in result.windows] == [[0, 2], [3, 5]]
    assert all(one.error_after < one.error_before for one in result.windows)


def test_a_stopped_run_goes_on_to_the_same_bits(monkeypatch, tmp_path):
    expected, teacher = cut(layers=(1, 4))
    reconstruct_layers(expected, teacher, batches(), **SETTINGS | {"epochs": 3})
    model, _ = cut(layers=(1, 4))
    untouched = copy.deepcopy(model)
    save, saved = window_training.WindowTraining._save, []

    def stop(self, *args):
        save(self, *args)
        saved.append(args[1])
        if len(saved) == 4:  # after the first epoch of the second window
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(window_training.WindowTraining, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            reconstruct_layers(model, teacher, batches(), **SETTINGS | {"epochs": 3}, folder=tmp_path)
    result = reconstruct_layers(untouched, teacher, batches(), **SETTINGS | {"epochs": 3}, folder=tmp_path)
    assert saved == [1, 2, 3, 1]
    assert all(
        torch.equal(value, untouched.state_dict()[name]) for name, value in expected.state_dict().items()
    )
    assert result.steps == 2 * 3 * 4


def test_states_that_do_not_fit_in_memory_are_kept_in_files(monkeypatch, tmp_path):
    expected, teacher = cut()
    reconstruct_layers(expected, teacher, batches(), **SETTINGS)
    monkeypatch.setattr(window_states.psutil, "virtual_memory", lambda: type("Free", (), {"available": 0}))
    model, _ = cut()
    with pytest.raises(LayerPruneError, match="Give a folder to keep them in"):
        reconstruct_layers(model, teacher, batches(), **SETTINGS)
    from_file, sizes = torch.from_file, []
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: sizes.append(k["size"]) or from_file(*a, **k))
    reconstruct_layers(model, teacher, batches(), **SETTINGS, folder=tmp_path)
    assert sizes == [4 * 2 * 12 * 32] * 2
    assert list(tmp_path.iterdir()) == []  # and not left there
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


def test_a_model_of_16_bits_is_trained_in_32_and_stays_one_of_16():
    model, teacher = cut()
    model, teacher = model.bfloat16(), teacher.bfloat16()
    before = weights(model)
    result = reconstruct_layers(model, teacher, batches(), **SETTINGS, autocast=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all(".layers.1." in name or ".layers.2." in name for name in changed)
    assert result.windows[0].error_after < result.windows[0].error_before


def test_of_a_peft_model_only_the_adapters_are_trained():
    model, teacher = cut()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    before = weights(adapted)
    result = reconstruct_layers(adapted, teacher, batches(), **SETTINGS)
    changed = [name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])]
    assert changed
    assert all("lora_" in name and (".layers.1." in name or ".layers.2." in name) for name in changed)
    assert result.windows[0].error_after < result.windows[0].error_before


def test_what_cannot_be_reconstructed_is_refused_before_any_work(monkeypatch):
    model, teacher = cut()
    before = weights(model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    narrow = make_model(hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    padding = [batch | {"attention_mask": torch.zeros_like(batch["input_ids"])} for batch in batches()]
    cases = [
        (model, teacher, [], {}, "data is empty"),
        (model, teacher, ["a text"], {}, "tokenizer"),
        (model, teacher, batches(), {"epochs": 0}, "at least 1 epoch"),
        (model, teacher, batches(), {"learning_rate": -1.0}, "a rate above 0"),
        (model, narrow, batches(), {}, "hidden size"),
        (model, teacher, padding, {}, "No token of the batches counts"),
        (model, teacher, batches(), {"autocast": torch.float16}, "small gradients vanish"),
        (frozen, teacher, batches(), {}, "all of it is frozen"),
        (teacher, teacher, batches(), {}, "No layer was removed"),
    ]
    for one, taught, data, settings, message in cases:
        with pytest.raises(LayerPruneError, match=message):
            reconstruct_layers(one, taught, data, **SETTINGS | settings)
    monkeypatch.setattr(module, "can_replay", lambda *args: False)
    with pytest.raises(LayerPruneError, match="hand on more than one hidden state"):
        reconstruct_layers(model, teacher, batches(), **SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_result_goes_into_json():
    model, teacher = cut()
    values = reconstruct_layers(model, teacher, batches(), **SETTINGS).to_dict()
    assert set(values) == {"windows", "kl_before", "kl_after", "tokens", "steps"}
    assert values["windows"][0]["layers"] == [1, 4]


def test_a_window_names_layers_of_both_models():
    assert find_windows(get_lineage(cut()[0]), Lineage(6, list(range(6))), 1, 1) == [Window(1, 2, 1, 4)]


def test_a_stopped_run_with_other_settings_starts_anew(monkeypatch, tmp_path, caplog):
    model, teacher = cut()
    save = window_training.WindowTraining._save

    def stop(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(window_training.WindowTraining, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            reconstruct_layers(copy.deepcopy(model), teacher, batches(), **SETTINGS, folder=tmp_path)
    expected = copy.deepcopy(model)
    reconstruct_layers(expected, teacher, batches(), **SETTINGS | {"learning_rate": 2e-3})
    reconstruct_layers(model, teacher, batches(), **SETTINGS | {"learning_rate": 2e-3}, folder=tmp_path)
    assert "starts anew" in caplog.text
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


RANK = """
import sys
sys.path.insert(0, {root!r})
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tests.distillation.test_reconstruction import DATA, SETTINGS, cut
from hf_layerprune import reconstruct_layers

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
model, teacher = cut()
found = reconstruct_layers(model, teacher, DATA, **SETTINGS)
tensors = {{name: value.contiguous() for name, value in model.state_dict().items()}}
tensors["error"] = torch.tensor([found.windows[0].error_after])
save_file(tensors, f"{{accelerator.process_index}}.safetensors")
accelerator.end_training()
"""


def test_two_processes_reconstruct_what_one_does():
    Path("rank.py").write_text(RANK.format(root=str(Path(__file__).parents[2])))
    processes = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *processes, "rank.py"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    model, teacher = cut()
    before = weights(model)
    result = reconstruct_layers(model, teacher, DATA, **SETTINGS)
    found, other = load_file("0.safetensors"), load_file("1.safetensors")
    assert found["error"].item() == pytest.approx(result.windows[0].error_after, rel=1e-4)
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], other[name])
        moved = float((value - before[name]).abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-2 * moved, msg=name)


def test_a_batch_of_padding_alone_changes_nothing():
    found = []
    for more in (0, 1):
        model, teacher = cut()
        data = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches(1)]
        data += [{**data[0], "attention_mask": torch.zeros_like(data[0]["input_ids"])}] * more
        result = reconstruct_layers(model, teacher, data, epochs=1, progress=False)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        found.append(result.windows[0].error_before)
    assert found[1] == found[0]


def test_labels_change_nothing():
    found = []
    for labels in (False, True):
        model, teacher = cut()
        data = [
            batch | ({"labels": torch.full_like(batch["input_ids"], -100)} if labels else {})
            for batch in DATA
        ]
        found.append(reconstruct_layers(model, teacher, data, **SETTINGS))
    assert found[0] == found[1]
    assert found[0].kl_before > 0


def test_weights_stay_finite_where_the_teacher_is_not():
    model, teacher = cut()
    teacher.model.layers[4].mlp.down_proj.weight.data.fill_(float("nan"))
    before = weights(model)
    with pytest.raises(
        LayerPruneError, match=r"gradient of reconstruction is nan in epoch 1 of layers 1 to 2"
    ):
        reconstruct_layers(model, teacher, batches(), **SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_adapters_on_a_base_of_16_bits_are_trained(autocast):
    model, teacher = cut()
    adapted = get_peft_model(model.bfloat16(), LoraConfig(r=2, target_modules="all-linear"))
    before = weights(adapted)
    result = reconstruct_layers(adapted, teacher.bfloat16(), batches(), **SETTINGS, autocast=autocast)
    changed = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert {name: value.dtype for name, value in adapted.state_dict().items()} == {
        name: value.dtype for name, value in before.items()
    }
    assert result.windows[0].error_after < result.windows[0].error_before


@pytest.mark.parametrize("name", ["gemma3n_text", "zaya", "reformer"])
def test_layers_that_hand_on_more_than_a_hidden_state_are_refused(name):
    teacher = tiny_model(name)
    model = copy.deepcopy(teacher)
    remove_layers(model, 3)
    data = [{"input_ids": tokens(2, 8) + 4}]
    before = weights(model)
    with pytest.raises(LayerPruneError, match="hand on more than one hidden state"):
        reconstruct_layers(model, teacher, data, **SETTINGS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_text_does_not_go_on_where_this_one_stopped(monkeypatch, tmp_path, caplog):
    model, teacher = cut()
    save = window_training.WindowTraining._save

    def stop(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(window_training.WindowTraining, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            reconstruct_layers(copy.deepcopy(model), teacher, DATA[:4], **SETTINGS, folder=tmp_path)
    other = batches(4, rows=3, length=11)
    expected = copy.deepcopy(model)
    reconstruct_layers(expected, teacher, other, **SETTINGS)
    (tmp_path / "mine.txt").write_text("not of reconstruction")
    reconstruct_layers(model, teacher, other, **SETTINGS, folder=tmp_path)
    assert "starts anew" in caplog.text
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_data_set_is_read_as_its_batches():
    ids = torch.cat([batch["input_ids"] for batch in batches(8)])  # 16 rows, which make two batches
    found = []
    for data in (
        Dataset.from_dict({"input_ids": ids.tolist()}),
        ids,
        [{"input_ids": part} for part in ids.split(8)],
    ):
        model, teacher = cut()
        reconstruct_layers(model, teacher, data, **SETTINGS)
        found.append(weights(model))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)
