import math

import pytest
import torch

from hf_layerprune import LayerPruneError, evaluate_text

from .conftest import logits, tokens
from .test_scoring import batches, mean_loss


def test_perplexity_is_over_all_tokens_not_a_mean_of_batches(model):
    model.train()
    found = evaluate_text(model, batches())
    assert model.training
    model.eval()
    assert found["loss"] == pytest.approx(mean_loss(model), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] == 22 + 8 + 5
    assert found["tokens_per_second"] > 0


def test_nothing_to_predict_is_refused(llama):
    labels = torch.full((2, 5), -100)
    with pytest.raises(LayerPruneError, match="no token to predict"):
        evaluate_text(llama, [{"input_ids": tokens(2, 5), "labels": labels}])
    assert logits(llama, tokens()).isfinite().all()
