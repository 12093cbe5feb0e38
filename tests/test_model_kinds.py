"""Models that are no plain causal language models: each keeps its class and head, or is refused in words."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPVisionConfig,
    DistilBertConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2_5_VLConfig,
    Qwen3Config,
    T5Config,
    Trainer,
    TrainingArguments,
    ViTConfig,
    WhisperConfig,
)

from hf_layerprune import (
    DistillationTrainer,
    DistillationTrainingArguments,
    LayerPruneError,
    LayerPruningCallback,
    MultipleChoice,
    cache_teacher_logits,
    evaluate_text,
    load_model,
    load_pruned_adapter,
    remove_layers,
    save_adapter,
    save_model,
    score_layers,
)
from hf_layerprune.commands.cli import main
from hf_layerprune.data.sequences import token_sequences

from .conftest import TEXT, make_model, tokens
from .evaluation.test_multiple_choice import QUESTIONS


SMALL = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": None,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MARKED = {"cls_token_id": 256, "sep_token_id": 256, "bos_token_id": 256, "eos_token_id": 256}
HALVES = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "vocab_size": 260}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

WITHOUT_NEXT_TOKEN = {
    "LlamaForSequenceClassification": LlamaConfig(**GROUPED, num_labels=3),
    "MistralModel": MistralConfig(**GROUPED),
    "Qwen3ForTokenClassification": Qwen3Config(**GROUPED),
    "GPT2ForSequenceClassification": GPT2Config(
        vocab_size=260, n_embd=16, n_layer=5, n_head=2, num_labels=1, initializer_range=0.3
    ),
    "BertModel": BertConfig(**SMALL),
    "BertForMaskedLM": BertConfig(**SMALL),
    "DistilBertForSequenceClassification": DistilBertConfig(
        vocab_size=260, dim=16, n_heads=2, n_layers=5, hidden_dim=16, initializer_range=0.3
    ),
    "ModernBertForSequenceClassification": ModernBertConfig(**SMALL | MARKED | {"pad_token_id": 257}),
}
WITH_PICTURES = {
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VLConfig(
        text_config=GROUPED
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": 16,
        },
        image_token_id=258,
        video_token_id=259,
    ),
    "LlavaForConditionalGeneration": LlavaConfig(
        text_config=LlamaConfig(**GROUPED),
        vision_config=CLIPVisionConfig(**VISION, num_hidden_layers=3),
        image_token_index=258,
    ),
    "Gemma3ForConditionalGeneration": Gemma3Config(
        text_config=GROUPED | {"sliding_window": 8},
        vision_config=VISION | {"num_hidden_layers": 3},
        mm_tokens_per_image=4,
        image_token_id=258,
    ),
}
NOT_SUPPORTED = {
    "T5ForConditionalGeneration": T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=5, num_heads=2),
    "BartForConditionalGeneration": BartConfig(**HALVES),
    "WhisperForConditionalGeneration": WhisperConfig(**HALVES | SPECIAL),
    "ViTForImageClassification": ViTConfig(**VISION, num_hidden_layers=5),
    "CLIPModel": CLIPConfig(),
}
DATA = ["--data", "text.txt", "--sequence_length", "16", "--calibration_sequences", "4"]


def build(name, configs=WITHOUT_NEXT_TOKEN):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, name)(copy.deepcopy(configs[name])).eval()


def labelled():
    ids = tokens(4, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return [{"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])}]


@pytest.fixture
def saved(tokenizer):
    def save(name, configs=WITHOUT_NEXT_TOKEN):
        model = build(name, configs)
        model.save_pretrained("kind")
        tokenizer.save_pretrained("kind")
        Path("text.txt").write_text(TEXT)
        return model

    return save


def without_layers_of(state, layers):
    """The tensors outside decoder layers."""
    return {name: tensor for name, tensor in state.items() if not any(f".{i}." in name for i in layers)}


@pytest.mark.parametrize("name", WITHOUT_NEXT_TOKEN)
def test_prune_keeps_class_and_head(name, saved):
    model = saved(name)
    flags = ["--target_layers", "4", "--criterion", "block_influence", "--output_dir", "cut"]
    assert main(["prune", "kind", *DATA, *flags]) == 0
    cut = getattr(transformers, name).from_pretrained("cut")
    assert json.loads(Path("cut/config.json").read_text())["architectures"] == [name]
    assert type(load_model("cut")) is type(cut) is type(model)
    head, before = (without_layers_of(one.state_dict(), range(5)) for one in (cut, model))
    assert head.keys() == before.keys()
    assert all(torch.equal(head[key], before[key]) for key in head)
    card = Path("cut/README.md").read_text()
    auto = {
        "Model": "AutoModel",
        "MaskedLM": "AutoModelForMaskedLM",
        "Token": "AutoModelForTokenClassification",
    }
    expected = next((auto[key] for key in auto if key in name), "AutoModelForSequenceClassification")
    assert f"model = {expected}.from_pretrained" in card
    assert "text-generation" not in card
    assert json.loads(Path("cut/layer_pruning.json").read_text())["dense"] is None


@pytest.mark.parametrize("name", WITHOUT_NEXT_TOKEN)
def test_what_needs_no_next_token_scores_every_kind(name):
    model, batches = build(name), labelled()
    for criterion in ("block_influence", "angular", "hidden_mse", "positional"):
        assert sorted(score_layers(model, batches, criterion, progress=False).scores) == [1, 2, 3]
    table = score_layers(
        model, criterion="task", task=lambda model: float(model.num_parameters()), progress=False
    )
    assert all(score > 0 for score in table.scores.values())
    remove_layers(model, 2)
    save_model(model, "cut")
    for criterion in ("loss", "kl", "taylor"):
        with pytest.raises(LayerPruneError, match=rf"'{criterion}' needs logits of the next token.*{name}"):
            score_layers(model, batches, criterion, progress=False)


def test_the_error_of_the_last_state_counts_every_token_of_a_classifier():
    model, (batch,) = build("LlamaForSequenceClassification"), labelled()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        whole = model.model(**inputs).last_hidden_state[real]
        shorter = copy.deepcopy(model)
        remove_layers(shorter, 2)
        error = (shorter.model(**inputs).last_hidden_state[real] - whole).square().sum(-1)
    expected = (error / whole.square().sum(-1)).mean()
    found = score_layers(model, [batch], "hidden_mse", progress=False).scores[2]
    assert found == pytest.approx(float(expected), rel=1e-4)


COMMANDS = {
    "score": ["kind", *DATA],
    "prune": ["kind", *DATA, "--target_layers", "4", "--output_dir", "out"],
    "distill": ["kind", *DATA, "--target_layers", "4", "--output_dir", "out", "--max_steps", "2"],
    "cache-teacher": ["kind", *DATA[:4], "--output_dir", "out"],
    "evaluate": ["kind", *DATA[:4]],
    "run": ["shortgpt", "--model", "kind", "--keep", "4", *DATA, "--output_dir", "out"],
    "phases": ["kind", *DATA, "--target_layers", "4", "--output_dir", "out", "--", "true"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("LlamaForSequenceClassification", "a sequence classifier (LlamaForSequenceClassification)"),
        ("BertForMaskedLM", "a masked language model (BertForMaskedLM)"),
        ("MistralModel", "a model without a language-model head (MistralModel)"),
    ],
)
def test_other_kinds_are_refused_before_their_weights_are_loaded(command, name, words, saved, capsys):
    saved(name)
    Path("kind/model.safetensors").write_bytes(b"whoever reads this fails")
    assert main([command, *COMMANDS[command]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "needs logits of the next token, but the model is " + words in error
    assert not any(Path("out").glob("*"))


@pytest.mark.parametrize("command", ["inspect", *COMMANDS])
@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_models_of_other_inputs_are_named_and_refused(command, name, tokenizer, capsys):
    config = copy.deepcopy(NOT_SUPPORTED[name])
    config.architectures = [name]
    config.save_pretrained("kind")
    tokenizer.save_pretrained("kind")
    Path("text.txt").write_text(TEXT)
    assert main([command, *COMMANDS.get(command, ["kind"])]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error
    assert "supports causal language models, text encoders, classifiers" in error


def test_scoring_names_an_encoder_decoder_model():
    model = transformers.BartForConditionalGeneration(NOT_SUPPORTED["BartForConditionalGeneration"])
    with pytest.raises(LayerPruneError, match=r"an encoder-decoder model \(BartForConditionalGeneration\)"):
        score_layers(model, labelled(), "block_influence", progress=False)


def test_half_of_an_encoder_decoder_model_is_a_language_model():
    model = BartForCausalLM(copy.deepcopy(NOT_SUPPORTED["BartForConditionalGeneration"]))
    model.save_pretrained("kind")
    assert type(load_model("kind")) is BartForCausalLM


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_text_layers_of_vision_language_models_are_pruned(name, saved):
    saved(name, WITH_PICTURES)
    companions = ("preprocessor_config.json", "processor_config.json", "chat_template.json")
    for file in companions:
        Path("kind", file).write_text(f'{{"of": "{file}"}}')
    assert main(["prune", "kind", *DATA, "--target_layers", "3", "--output_dir", "cut"]) == 0
    cut = transformers.AutoModelForImageTextToText.from_pretrained("cut")
    assert type(cut).__name__ == name
    assert cut.config.get_text_config().num_hidden_layers == 3
    assert all(Path("cut", file).read_bytes() == Path("kind", file).read_bytes() for file in companions)
    assert "AutoModelForImageTextToText.from_pretrained" in Path("cut/README.md").read_text()
    more = ["--max_steps", "1", "--use_cpu", "--report_to", "none"]
    assert main(["distill", "kind", *DATA, "--target_layers", "4", "--output_dir", "healed", *more]) == 0
    assert Path("healed/preprocessor_config.json").is_file()


def test_an_embedding_model_keeps_its_pooling(saved):
    saved("BertModel")
    Path("kind/1_Pooling").mkdir()
    Path("kind/1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    Path("secret").mkdir()
    Path("secret/config.json").write_text("{}")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "../secret"}]
    Path("kind/modules.json").write_text(json.dumps(modules))
    flags = ["--target_layers", "4", "--criterion", "block_influence", "--output_dir", "deep/cut"]
    assert main(["prune", "kind", *DATA, *flags]) == 0
    assert json.loads(Path("deep/cut/modules.json").read_text()) == modules
    assert "mean" in Path("deep/cut/1_Pooling/config.json").read_text()
    assert not Path("deep/secret").exists()


def training(model, callback, labels):
    rows = Dataset.from_dict({"input_ids": tokens(8, 12).tolist(), "labels": labels})
    settings = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments("out", max_steps=4, per_device_train_batch_size=4, **settings)
    return Trainer(model, args, train_dataset=rows, callbacks=[callback])


def test_a_classifier_loses_layers_while_it_is_fine_tuned():
    model = BertForSequenceClassification(BertConfig(**SMALL))
    rows = Dataset.from_dict({"input_ids": tokens(4, 12).tolist(), "labels": [0, 1, 0, 1]})
    settings = {"target_layers": 3, "calibration": rows}
    trainer = training(model, LayerPruningCallback(criterion="block_influence", **settings), [0, 1] * 4)
    trainer.train()
    assert model.config.num_hidden_layers == 3
    trainer.save_model("fine")
    assert type(load_model("fine")) is BertForSequenceClassification
    trainer = training(
        BertForSequenceClassification(BertConfig(**SMALL)), LayerPruningCallback(**settings), [0] * 8
    )
    with pytest.raises(LayerPruneError, match="'loss' needs logits of the next token"):
        trainer.train()


def test_what_is_of_next_tokens_refuses_other_kinds(tokenizer):
    model = build("LlamaForSequenceClassification")
    args = DistillationTrainingArguments(output_dir="out", report_to="none", use_cpu=True)
    batches = [{"input_ids": tokens()}]
    for use in (
        lambda: DistillationTrainer(make_model(), args, teacher_model=model),
        lambda: DistillationTrainer(model, args),
        lambda: evaluate_text(model, batches),
        lambda: cache_teacher_logits(model, batches, "outputs"),
        lambda: score_layers(model, criterion="task", task=MultipleChoice(QUESTIONS, tokenizer)),
    ):
        with pytest.raises(LayerPruneError, match="needs logits of the next token"):
            use()


def test_labels_of_rows_are_no_labels_of_tokens():
    with pytest.raises(LayerPruneError, match="one label for each token"):
        score_layers(make_model(), labelled(), progress=False)


def test_blocks_for_an_encoder_are_marked_as_it_was_trained(tokenizer):
    from tokenizers.processors import TemplateProcessing

    marked = copy.deepcopy(tokenizer)
    marked.eos_token = None
    marked.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    ends = [("[CLS]", marked.cls_token_id), ("[SEP]", marked.sep_token_id)]
    marked.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    blocks = token_sequences(["abc", "defg"], marked, 5)["input_ids"]
    letters = marked("abcdefg", add_special_tokens=False)["input_ids"]
    first = [marked.cls_token_id, *letters[:3], marked.sep_token_id]
    assert blocks == [first, [marked.cls_token_id, *letters[3:]]]


def test_a_model_of_no_named_class_is_a_language_model(llama):
    llama.save_pretrained("kind")
    path = Path("kind/config.json")
    for architectures in (None, [], ["LLaMAForCausalLM"], ["BertForMaskedLM"], [7], "x"):
        config = json.loads(path.read_text()) | {"architectures": architectures}
        path.write_text(json.dumps(config))
        assert type(load_model("kind")) is type(llama)


@pytest.mark.parametrize("cls", [BertModel, BertForMaskedLM, LlamaForSequenceClassification])
def test_a_class_is_described_before_it_is_loaded(cls):
    from hf_layerprune.surgery.decoder import predicts_next_token

    assert not predicts_next_token(cls)


@pytest.mark.parametrize("stored", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_adapters_of_a_classifier_come_back_on_a_classifier(stored):
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(**GROUPED | {"pad_token_id": 1}, num_labels=3)
    getattr(transformers, stored)(config).save_pretrained("base")
    base = LlamaForSequenceClassification.from_pretrained("base", num_labels=3)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2))
    remove_layers(model, 2)
    save_adapter(model, "adapters")
    again = load_pruned_adapter("adapters")
    assert type(again.get_base_model()) is LlamaForSequenceClassification
    inputs = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with torch.no_grad():
        found, expected = again.eval()(**inputs).logits, model.eval()(**inputs).logits
    assert found.shape == (2, 3)
    assert torch.allclose(found, expected, atol=1e-5)
