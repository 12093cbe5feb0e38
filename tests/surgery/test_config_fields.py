import pytest

from hf_layerprune import LayerPruneError
from hf_layerprune.surgery.config_fields import cut_fields, cut_name, cut_names, is_per_layer


KEPT = [0, 1, 3, 5]  # of six layers, 2 and 4 go


def cut(**fields):
    return cut_fields({"model_type": "x", **fields}, 6, KEPT) | {"model_type": "x"}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("layer_types", list("abcdef"), list("abdf")),
        ("no_rope_layers", [1, 1, 0, 1, 1, 0], [1, 1, 1, 0]),
        ("no_rope_layers", (1, 1, 0, 1, 1, 0), [1, 1, 1, 0]),
        ("moe_topk", [1, 2, 3, 4, 5, 6], [1, 2, 4, 6]),
        ("intermediate_size", [8, 8, 8, 9, 9, 9], [8, 8, 9, 9]),
        # By index, from 0, and from 1 as a 6 among six layers shows.
        ("attn_layer_indices", [1, 2, 5], [1, 3]),
        ("mlp_only_layers", [], []),
        ("moe_layers", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3]),
        ("hybrid_layer_ids", [1, 3, 6], [1, 4]),
        ("ple_layer_ids", [2, 4], [2, 3]),
        # Thresholds from the front, from the end, and the last of a kind.
        ("first_k_dense_replace", 3, 2),
        ("num_dense_layers", 0, 0),
        ("max_window_layers", 6, 4),
        ("num_kv_shared_layers", 2, 1),
        ("moe_layer_end_index", 3, 2),
        ("moe_layer_end_index", -1, -1),
        ("per_layer_config", {"1": "a", "2": "b", "5": "c"}, {"1": "a", "3": "c"}),
        # Not of single layers.
        ("mlp_multipliers", [1.0] * 6, [1.0] * 6),
        ("eos_token_id", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        ("mtp_layer_types", list("abcdef"), list("abcdef")),
        ("hidden_size", 6, 6),
        ("cross_attention_layers", [3, 8, 13], [3, 8, 13]),
    ],
)
def test_a_field_follows(name, before, after):
    assert cut(**{name: before})[name] == after


def test_periods_are_written_out():
    # Layers 1, 3 and 5 have experts by their period, but 3 is listed as dense.
    found = cut(decoder_sparse_step=2, mlp_only_layers=[3])
    assert (found["decoder_sparse_step"], found["mlp_only_layers"]) == (1, [0, 2])
    assert cut(block_types=["r", "r", "a"])["block_types"] == ["r", "r", "r", "a"]
    assert cut(attention_types=[[["g", "l"], 3]])["attention_types"] == [[["g", "l", "l", "l"], 1]]
    assert cut(scale_depth=3.0)["scale_depth"] / 4**0.5 == pytest.approx(3.0 / 6**0.5)


def test_two_switches_are_no_indices():
    assert is_per_layer("no_rope_layers", [0, 1], 2)
    assert not is_per_layer("attn_layer_indices", [0, 1], 2)
    assert cut_fields({"model_type": "x", "no_rope_layers": [0, 1]}, 2, [1])["no_rope_layers"] == [1]
    assert cut_fields({"model_type": "x", "moe_layer_ids": [0, 1]}, 2, [1])["moe_layer_ids"] == [0]


def test_what_could_not_run_is_refused():
    types = ["full", "shared", "shared"]
    assert cut_fields({"model_type": "x", "indexer_types": types}, 3, [0, 2])["indexer_types"] == types[:2]
    with pytest.raises(LayerPruneError, match="layer 1 shares the indexer of layer 0"):
        cut_fields({"model_type": "x", "indexer_types": types}, 3, [1, 2])
    kinds = {"model_type": "minimax", "layer_types": ["full_attention", "linear_attention", "full_attention"]}
    assert cut_fields(kinds, 3, [2])["layer_types"] == ["full_attention"]
    with pytest.raises(LayerPruneError, match="cannot count cached tokens"):
        cut_fields(kinds, 3, [1, 2])


STACK, OTHERS, LEFT = "model.layers", ["vision.encoder.layers"], [0, 2, 3, 12]


@pytest.mark.parametrize(
    ("name", "followed"),
    [
        ("model.layers.2", "model.layers.1"),
        ("model.layers.12.mlp.up_proj", "model.layers.3.mlp.up_proj"),
        ("layers.3.self_attn", "layers.2.self_attn"),
        ("language_model.model.layers.2", "language_model.model.layers.1"),
        (r"re:.*layers\.3\.mlp.*", r"re:.*layers\.2\.mlp.*"),
        (r"model\.layers\.2\..*|model\.layers\.3\..*", r"model\.layers\.1\..*|model\.layers\.2\..*"),
        ("model.layers.1", None),
        ("model.layers.1.mlp", None),
        ("lm_head", "lm_head"),
        ("mlp.experts.1.up_proj", "mlp.experts.1.up_proj"),
        ("model.layers.*.mlp", "model.layers.*.mlp"),
        (r"re:.*layers\.\d+\.mlp", r"re:.*layers\.\d+\.mlp"),
        ("model.mtp_layers.1", "model.mtp_layers.1"),
        ("vision.encoder.layers.1.mlp", "vision.encoder.layers.1.mlp"),
        ("encoder.layers.1.mlp", "encoder.layers.1.mlp"),
    ],
)
def test_names_of_modules_follow(name, followed):
    assert cut_name(name, STACK, OTHERS, LEFT) == followed


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.(2|3)\.mlp",
        r"layers\.[0-3]\.",
        "model.layers.1[0-9]",
        r"layers\.\d\.",
        r"layers\.1\..*|layers\.2\..*",
    ],
)
def test_patterns_that_cannot_follow_are_refused(pattern):
    with pytest.raises(LayerPruneError, match=r"cannot follow|a part would be gone"):
        cut_names({"ignore": [pattern]}, STACK, OTHERS, LEFT)


def test_names_follow_in_lists_and_tables():
    names = {"skip": ["model.layers.1", "model.layers.2"], "by": {"model.layers.3": {"bits": 4}}, "n": 3}
    expected = {"skip": ["model.layers.1"], "by": {"model.layers.2": {"bits": 4}}, "n": 3}
    assert cut_names(names, STACK, OTHERS, LEFT) == expected
    assert cut_names(("layers.2", 2, None), STACK, OTHERS, LEFT) == ("layers.1", 2)
